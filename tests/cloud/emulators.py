"""Emulators of object stores, as processes: Google's and Azure's."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["AZURE_ACCOUNT", "AZURE_KEY", "run_azurite", "run_gcs"]

#: The one account that Azurite knows, as its documentation tells everybody.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

_AZURITE = Path(__file__).parents[2] / "build" / "azurite" / "node_modules" / ".bin" / "azurite-blob"

# Node takes three seconds to start; a busy machine many times that.
_START_S = 60.0
_LOOK_AGAIN_S = 0.02


@contextlib.contextmanager
def run_gcs() -> Iterator[int]:
    """Google Cloud Storage, in memory, on a free port of 127.0.0.1: the port."""
    port = _free_port()
    with _running(
        [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}", "--in-memory"],
        port,
    ):
        yield port


@contextlib.contextmanager
def run_azurite(certificate: Path, key: Path) -> Iterator[int]:
    """Azure Blob Storage, in memory, with TLS, on a free port of 127.0.0.1: the port."""
    port = _free_port()
    with _running(
        [
            *(str(_AZURITE), "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent"),
            *("--blobHost", "127.0.0.1", "--blobPort", str(port), "--cert", str(certificate), "--key", str(key)),
        ],
        port,
    ):
        yield port


@contextlib.contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=_START_S).close()
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not listen") from None
            # Waiting for its end is waiting, too, and notices when it cannot start.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_AGAIN_S)
                raise RuntimeError(f"{command[0]} ended with exit code {process.returncode}")
        yield
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
