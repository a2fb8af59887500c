"""An S3 server on this machine that checks credentials: for tests and demonstrations. Needs ``ministack``."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import IO, Any

from streamload.errors import MissingDependencyError

__all__ = ["S3Server", "run_ministack"]

_REGION = "us-east-1"
_USER = "streamload"
_ALLOW_ALL = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}

# It starts in a third of a second; a machine that is busy with a test suite may take many times that.
_START_S = 30.0
_STOP_S = 5.0
# How long to wait between two looks at whether it listens.
_LOOK_AGAIN_S = 0.02

# The kernel ends the server if this process is killed and cannot.
_START = """
import ctypes, runpy, signal
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
runpy.run_module("ministack", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running S3 server, and the credentials that it accepts.

    Attributes:
        endpoint: Its URL.
        access_key: The access key's id.
        secret_key: The secret that belongs to it.
        region: What to call its region.
    """

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    region: str = _REGION

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point everything that speaks S3 at this server, and at no other credentials."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @contextlib.contextmanager
    def client(self, service: str = "s3") -> Iterator[Any]:
        """A synchronous botocore client of this server, closed at the end."""
        import botocore.session
        from botocore.config import Config

        session = botocore.session.Session()
        # Whatever profile and files the environment names are the user's own and nothing to do with this server.
        store = session.get_component("config_store")
        for name, value in {"profile": None, "config_file": os.devnull, "credentials_file": os.devnull}.items():
            store.set_config_variable(name, value)
        client = session.create_client(
            service,
            region_name=self.region,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(proxies={}, retries={"total_max_attempts": 1}),
        )
        try:
            yield client
        finally:
            client.close()


@contextlib.contextmanager
def run_ministack() -> Iterator[S3Server]:
    """Run ministack, with S3, IAM and STS, on a free port of 127.0.0.1.

    It keeps everything in memory, about twice over, and ends with the context or with this process.

    Yields:
        The server, listening, and a user of it who may do everything.

    Raises:
        MissingDependencyError: ministack is not installed.
        RuntimeError: The server ended at once, or does not listen; its output is in the text.
    """
    if find_spec("ministack") is None:
        raise MissingDependencyError("this needs an S3 server to run: pip install 'ministack>=1.5'")
    port = _free_port()
    root = S3Server(f"http://127.0.0.1:{port}", "root" + secrets.token_hex(8), secrets.token_hex(20))
    with tempfile.TemporaryFile() as output, _running(root, port, output) as process:
        _wait_until_it_listens(process, port, output)
        yield _user_of(root)


@contextlib.contextmanager
def _running(root: S3Server, port: int, output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    settings = {
        "AUTH": "true",
        "SERVICES": "s3,iam,sts",
        "IOT_MTLS_ENABLED": "0",
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "AWS_ACCESS_KEY_ID": root.access_key,
        "AWS_SECRET_ACCESS_KEY": root.secret_key,
        "AWS_DEFAULT_REGION": root.region,
    }
    process = subprocess.Popen(
        # env adds to what this process has, without this process having to read or change it.
        ["env", *[f"{name}={value}" for name, value in settings.items()], sys.executable, "-c", _START],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for each in (signal.SIGTERM, signal.SIGKILL):
        # The group, because the server may have started processes of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, each)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, output: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=_START_S).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"ministack does not listen after {_START_S:g} s: {_text(output)}") from None
        # Waiting for its end is waiting, too, and notices when it cannot start.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_AGAIN_S)
            raise RuntimeError(f"ministack ended with exit code {process.returncode}: {_text(output)}")


def _user_of(root: S3Server) -> S3Server:
    """A user with a key and all permissions: the server does not verify its root's own credentials."""
    with root.client("iam") as iam:
        iam.create_user(UserName=_USER)
        iam.put_user_policy(UserName=_USER, PolicyName="all", PolicyDocument=json.dumps(_ALLOW_ALL))
        key = iam.create_access_key(UserName=_USER)["AccessKey"]
    return S3Server(root.endpoint, key["AccessKeyId"], key["SecretAccessKey"], root.region)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _text(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")[-2000:]
