"""The image `init`, built from the Dockerfile and run as a kubelet runs an init container."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from examples.demo.bucket import upload
from examples.demo.sample import LlamaShape, write_checkpoint
from scripts.build_image import BASE, build, podman, size_bytes
from streamload.testing.s3server import S3Server
from tests.hubserver import Hub

pytestmark = pytest.mark.image

_MIB = 1 << 20
_LIMIT_BYTES = 512 * _MIB
# What the image may have beyond its base.
_MOST_BYTES = 120_000_000

# A machine may be busy with much else; what hangs is ended all the same.
_TIMEOUT_S = 300.0
_UID = 1000
_VOLUME = "/mnt/models"

# As the pods of deploy/ run it. podman would put a writable /tmp over a root that is read-only; a kubelet does not.
_CONTAINER = (
    *("--rm", "--timeout", str(int(_TIMEOUT_S)), "--network", "host", "--read-only", "--read-only-tmpfs=false"),
    *("--cap-drop", "all", "--security-opt", "no-new-privileges"),
    *("--memory", str(_LIMIT_BYTES), "--memory-swap", str(_LIMIT_BYTES)),
    # Of the machine that builds; without these podman asks for more than it may have.
    *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"),
    # No shell: nothing can be executed there.
    *("--volume", "/dev/null:/usr/bin/dash:ro", "--volume", "/dev/null:/usr/bin/bash:ro"),
)


@dataclass
class _Pod:
    """What a container gets from its pod: a volume, a termination log, an environment."""

    image: str
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.volume, self.log = self.folder / "volume", self.folder / "termination-log"
        self.volume.mkdir()
        os.chown(self.volume, _UID, _UID)
        self.log.touch()
        self.log.chmod(0o666)

    def command(self, *arguments: object, entrypoint: str | None = None) -> list[str]:
        options = ["--volume", f"{self.volume}:{_VOLUME}", "--volume", f"{self.log}:/dev/termination-log"]
        for name, value in self.environment.items():
            options += ["--env", f"{name}={value}"]
        if entrypoint is not None:
            options += ["--entrypoint", entrypoint]
        return podman("run", *_CONTAINER, *options, self.image, *map(str, arguments))

    def run(self, *arguments: object, entrypoint: str | None = None) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments, entrypoint=entrypoint)
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)

    def last_words(self) -> str:
        (line,) = self.log.read_text().splitlines()
        return line


@pytest.fixture(scope="module")
def image() -> str:
    return build("init")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is larger than the container's memory."""
    folder = tmp_path_factory.mktemp("model")
    assert write_checkpoint(folder, LlamaShape(layers=20)) > _LIMIT_BYTES
    return folder


@pytest.fixture(scope="module")
def uri(model: Path, s3_server: S3Server) -> str:
    upload(s3_server, sorted(model.iterdir()), bucket="image", prefix="llama")
    return "s3://image/llama"


@pytest.fixture
def pod(image: str, tmp_path: Path, s3_server: S3Server) -> _Pod:
    return _Pod(image, tmp_path, s3_server.environment)


def _result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_it_is_small(image: str) -> None:
    assert size_bytes(image) - size_bytes(BASE) <= _MOST_BYTES


def test_it_is_what_the_kubelet_says(pod: _Pod) -> None:
    """What the other tests rely upon: the user, the limit that is around it, no torch, no shell."""
    code = (
        "import json, os; from importlib.util import find_spec; from streamload.host import host_limits; "
        "limits = host_limits(); "
        "print(json.dumps([os.getuid(), os.getgid(), limits.bound_by, limits.available_bytes, find_spec('torch'), "
        "os.access('/bin/sh', os.X_OK), os.statvfs('/').f_flag & os.ST_RDONLY, os.access('/tmp', os.W_OK)]))"
    )
    done = pod.run("-c", code, entrypoint="python")
    assert done.returncode == 0, done.stderr
    uid, gid, bound_by, available, torch, shell, read_only, writable = json.loads(done.stdout)
    assert (uid, gid) == (_UID, _UID)
    assert bound_by.startswith("cgroup")
    assert available <= _LIMIT_BYTES
    assert (torch, shell, writable) == (None, False, False)
    assert read_only


def test_stages_more_than_its_memory(pod: _Pod, uri: str, model: Path) -> None:
    staged = _result(pod.run(uri, _VOLUME))
    names = sorted(path.name for path in model.iterdir())
    assert filecmp.cmpfiles(model, pod.volume, names, shallow=False) == (names, [], [])
    assert sorted(file["key"] for file in json.loads((pod.volume / "READY").read_text())["files"]) == names
    assert {path.stat().st_uid for path in pod.volume.iterdir()} == {_UID}
    assert (staged["state"], staged["files"], staged["unverified"]) == ("staged", len(names), {})
    assert staged["peak_rss_bytes"] < 200 * _MIB
    assert pod.log.read_text() == ""
    # A container that is started again.
    again = _result(pod.run(uri, _VOLUME))
    assert (again["state"], again["fetched_bytes"]) == ("present", 0)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("s3://image/nothing-there", _VOLUME), 1, "s3://image/nothing-there"),
        (("s3://no-such-bucket/llama", _VOLUME), 1, "no-such-bucket"),
        (("gopher://llama", _VOLUME), 2, "nothing serves"),
        (("s3://image/llama", _VOLUME, "--keep-bytes", "plenty"), 2, "plenty"),
    ],
)
def test_its_last_words(pod: _Pod, uri: str, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = pod.run(*arguments)
    assert done.returncode == code, done.stderr
    assert said in pod.last_words()
    assert not (pod.volume / "READY").exists()


def test_sigterm(pod: _Pod, uri: str) -> None:
    slowly = ("--max-bytes-per-s", "1MB", "--read-bytes", "1MiB", "--concurrency", 1)
    with subprocess.Popen(pod.command(uri, _VOLUME, *slowly), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "config.json is whole" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=_TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert pod.last_words() == "stopped by SIGTERM; what has landed is kept"


def test_as_a_sidecar(pod: _Pod, uri: str) -> None:
    """Read by an engine of another user's, which has the volume at another path and may not write to it."""
    serve = pod.command(
        "serve", uri, _VOLUME, f"--socket={_VOLUME}/streamload.sock", "--port=0", entrypoint="streamload"
    )
    with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            while "all is staged" not in (line := process.stderr.readline()):
                assert line
            options = ["--user", "4321:4321", "--entrypoint", "streamload", "--volume", f"{pod.volume}:/weights:ro"]
            asked = ("inspect", "sidecar:///weights/streamload.sock", "--json")
            engine = podman("run", *_CONTAINER, *options, pod.image, *asked)
            done = subprocess.run(engine, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            assert len(_result(done)["files"]) == len(list(pod.volume.glob("*.safetensors")))
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=_TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.fixture
def on_the_hub(hub: Hub) -> Hub:
    hub.repositories["org/model"].commit({"config.json": b"{}", "model.safetensors": b"weights"})
    return hub


def test_from_the_hub(image: str, tmp_path: Path, on_the_hub: Hub) -> None:
    """huggingface_hub wants to write here and there; nothing can be written to but the volume."""
    (folder := tmp_path / "pod").mkdir()
    pod = _Pod(image, folder, {"HF_ENDPOINT": on_the_hub.endpoint})
    assert _result(pod.run("hf://org/model:main", _VOLUME))["state"] == "staged"
    assert (pod.volume / "model.safetensors").read_bytes() == b"weights"
