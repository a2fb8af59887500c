"""Engines of other users than the sidecar's: what only root can make."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamload
from streamload.errors import AccessError
from tests.service.origins import Origin, origin_of
from tests.service.sidecars import running

pytestmark = [pytest.mark.root, pytest.mark.torch]

_NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    with origin_of(tmp_path / "source") as origin:
        yield origin


def _load_as_nobody(uri: str, names: set[str]) -> str:
    """How a load of another user's ends."""
    ear, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
            try:
                said = "loaded" if streamload.load(uri).keys() == names else "something else"
            except AccessError as error:
                said = str(error)
            os.write(told, said.encode())
        finally:
            os._exit(0)
    os.close(told)
    with os.fdopen(ear, "rb") as file:
        heard = file.read().decode()
    os.waitpid(child, 0)
    return heard


def test_an_engine_of_another_user(origin: Origin, open_folder: Path) -> None:
    volume = open_folder / "volume"
    names = {"first", "second"}
    with running(origin.uri, volume) as sidecar:
        # Everything is imported then: the others may not read where Python lies.
        assert streamload.load(sidecar.uri).keys() == names
        assert _load_as_nobody(sidecar.uri, names) == "loaded"
    with running(origin.uri, volume, "--socket-mode", "660") as sidecar:
        refused = _load_as_nobody(sidecar.uri, names)
        assert sidecar.uri in refused
        assert "Permission denied" in refused
        assert "--socket-mode" in refused
        assert streamload.load(sidecar.uri).keys() == names
    with running(origin.uri, volume, "--socket-mode", "660", "--socket-group", _NOBODY) as sidecar:
        assert _load_as_nobody(sidecar.uri, names) == "loaded"
