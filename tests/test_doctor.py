"""`streamload.doctor`, and the command of that name."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import streamload
from streamload import Diagnosis, Finding
from streamload.errors import AccessError, OptionError
from streamload.host import HostLimits
from streamload.sources.local import LocalSource
from streamload.testing.s3server import S3Server
from tests.cli.models import shard
from tests.servers import S3Bucket

_MIB, _GIB = 1 << 20, 1 << 30


def _find(diagnosis: Diagnosis, topic: str, name: str) -> Finding:
    (found,) = [each for each in diagnosis.findings if (each.topic, each.name) == (topic, name)]
    return found


def _wrong(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    return [(each.topic, each.name) for each in diagnosis.findings if not each.ok]


@pytest.fixture(autouse=True)
def no_proxy(clean_aws_env: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No credentials and no proxy, but those of a test."""
    return clean_aws_env


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A torch that was built with CUDA, on a machine without a GPU."""
    cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
    fake = SimpleNamespace(__version__="2.99", version=SimpleNamespace(cuda="13.0", hip=None), cuda=cuda)
    module = ModuleType("torch")
    module.__dict__.update(vars(fake))
    monkeypatch.setitem(sys.modules, "torch", module)
    return cuda


def _set_limits(monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    usual = HostLimits(available_bytes=16 * _GIB, bound_by="machine", open_files=4096, locked_bytes=None)
    monkeypatch.setattr("streamload.diagnosis.host_limits", lambda: dataclasses.replace(usual, **given))


class TestDiagnosis:
    _GOOD = Finding("host", "memory", "16 GiB", "what the machine leaves")
    _BAD = Finding("host", "open files", "64", ok=False)
    _OTHER = Finding("use", "device", "cpu")

    def test_one_wrong_finding_is_enough(self) -> None:
        assert Diagnosis(()).ok
        assert Diagnosis((self._GOOD, self._OTHER)).ok
        assert not Diagnosis((self._GOOD, self._BAD)).ok

    def test_text(self) -> None:
        assert str(Diagnosis((self._GOOD, self._BAD, self._OTHER))).splitlines() == [
            "host",
            "  memory      16 GiB - what the machine leaves",
            "! open files  64",
            "",
            "use",
            "  device  cpu",
            "",
            "! needs attention: 1 of 3",
        ]
        assert str(Diagnosis((self._OTHER,))).endswith("\n\neverything is in order")

    def test_dict(self) -> None:
        assert Diagnosis((self._BAD,)).to_dict() == {
            "ok": False,
            "findings": [{"topic": "host", "name": "open files", "value": "64", "note": "", "ok": False}],
        }


class TestThisMachine:
    def test_versions(self) -> None:
        found = streamload.doctor()
        assert _find(found, "versions", "streamload").value == streamload.__version__
        assert _find(found, "versions", "python").value == ".".join(map(str, sys.version_info[:3]))
        assert _find(found, "versions", "aiobotocore").value == importlib.metadata.version("aiobotocore")
        assert os.uname().machine == _find(found, "versions", "system").note

    def test_a_package_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def version(package: str) -> str:
            raise importlib.metadata.PackageNotFoundError(package)

        monkeypatch.setattr("streamload.diagnosis.version", version)
        found = _find(streamload.doctor(), "versions", "runai-model-streamer")
        assert (found.value, found.ok) == ("not installed", True)

    def test_options_and_where_they_come_from(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STREAMLOAD_ORDER", "file")
        found = streamload.doctor(memory_bytes=2 * _MIB)
        assert str(_find(found, "options", "order")) == "file - environment (STREAMLOAD_ORDER)"
        assert str(_find(found, "options", "memory_bytes")) == "2097152 (2.0 MiB) - argument"
        assert _find(found, "options", "verify").note == "default"

    def test_limits_that_are_wide_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _set_limits(monkeypatch)
        found = streamload.doctor(concurrency=1000)
        assert str(_find(found, "host", "memory")) == "16.0 GiB available - what the machine leaves"
        assert _find(found, "host", "open files").value == "4096"
        assert _find(found, "host", "locked memory").value == "no limit"
        assert not {topic for topic, _ in _wrong(found)} & {"host", "options", "use"}

    def test_too_few_open_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _set_limits(monkeypatch, open_files=1024)
        assert _find(streamload.doctor(concurrency=64), "host", "open files").ok
        found = _find(streamload.doctor(concurrency=1000), "host", "open files")
        assert not found.ok
        assert "ulimit -n" in found.note

    def test_too_little_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _set_limits(monkeypatch, available_bytes=64 * _MIB, bound_by="cgroup v2", locked_bytes=65536)
        found = streamload.doctor(memory_bytes=128 * _MIB)
        assert not _find(found, "host", "memory").ok
        assert "cgroup v2" in _find(found, "host", "memory").note
        assert _find(found, "host", "locked memory").value == "64.0 KiB"

    @pytest.mark.parametrize(
        ("proxy", "shown"),
        [
            ("http://user:secret@proxy:3128", "http://proxy:3128"),
            ("user:sec@ret@proxy:3128", "proxy:3128"),
            ("http://proxy:3128", "http://proxy:3128"),
        ],
    )
    def test_proxies_without_passwords(self, no_proxy: pytest.MonkeyPatch, proxy: str, shown: str) -> None:
        no_proxy.setenv("https_proxy", proxy)
        no_proxy.setenv("NO_PROXY", "localhost,169.254.169.254")
        found = streamload.doctor()
        assert _find(found, "host", "HTTPS_PROXY").value == shown
        assert _find(found, "host", "NO_PROXY").value == "localhost,169.254.169.254"

    def test_what_would_be_used(self) -> None:
        found = streamload.doctor(memory_bytes=_MIB)
        assert _find(found, "use", "event loop").value == "uvloop"
        assert _find(found, "use", "memory").value == "1.0 MiB"
        assert [each.name for each in found.findings if each.topic == "use"] == ["event loop", "device", "memory"]

    @pytest.mark.parametrize("given", [{"order": "random"}, {"devise": "cpu"}])
    def test_bad_options_are_errors(self, given: dict[str, Any]) -> None:
        with pytest.raises(OptionError):
            streamload.doctor(**given)


class TestDevice:
    @pytest.mark.torch
    def test_in_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _set_limits(monkeypatch)
        assert _wrong(streamload.doctor()) == []

    def test_without_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        found = _find(streamload.doctor(), "device", "torch")
        assert (found.value, found.ok) == ("not installed", True)
        assert "stage and serve need none" in found.note
        assert not _find(streamload.doctor(device="cuda"), "device", "torch").ok

    def test_a_torch_that_is_broken(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
            monkeypatch.delitem(sys.modules, name)
        (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
        monkeypatch.syspath_prepend(tmp_path)
        found = _find(streamload.doctor(), "device", "torch")
        assert (found.value, found.ok) == ("cannot be imported", False)
        assert "libtorch.so" in found.note

    def test_without_a_gpu(self, torch: SimpleNamespace) -> None:
        found = _find(streamload.doctor(), "device", "cuda")
        assert (found.value, found.ok) == ("none", True)
        assert "no GPU is visible" in found.note

    def test_gpus(self, torch: SimpleNamespace) -> None:
        torch.is_available = lambda: True
        torch.device_count = lambda: 2
        torch.get_device_properties = lambda number: SimpleNamespace(name=f"GPU {number}", total_memory=80 * _GIB)
        found = streamload.doctor()
        assert str(_find(found, "device", "cuda:1")) == "GPU 1 - 80.0 GiB"
        assert _find(found, "device", "cuda:0").ok

    @pytest.mark.torch
    def test_one_that_does_not_exist(self) -> None:
        found = _find(streamload.doctor(device="cuda:99"), "device", "cuda:99")
        assert (found.value, found.ok) == ("cannot be used", False)
        assert found.note != ""

    @pytest.mark.torch
    @pytest.mark.parametrize("allowed", [True, False])
    def test_page_locked_staging_is_tried(self, monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
        from streamload.testing.devices import LateDevice

        device = LateDevice(page_lock=allowed)
        monkeypatch.setattr("streamload.sinks.device.open_device", lambda name: device)
        found = _find(streamload.doctor(device="cuda:0", memory_bytes=_MIB), "device", "page-locked staging")
        assert found.ok is allowed
        assert found.value == ("possible" if allowed else "refused")
        assert (device.closed, device.registered) == (1, False)


class TestLocal:
    def test_a_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(shard({"a": ("F32", (256,))}))
        found = streamload.doctor(tmp_path, read_bytes=_MIB, concurrency=3)
        checkpoint = _find(found, "checkpoint", str(tmp_path))
        assert (checkpoint.value, checkpoint.ok) == ("1 file, 1 tensor, 1.0 KiB", True)
        assert checkpoint.note.endswith("with 1 request")
        assert str(_find(found, "use", "source")) == "file - LocalSource"
        assert _find(found, "use", "reads").value == "3 of 1.0 MiB in flight"

    def test_one_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(b"")
        found = streamload.doctor(tmp_path)
        checkpoint = _find(found, "checkpoint", str(tmp_path))
        assert (checkpoint.value, checkpoint.ok) == ("cannot be read", False)
        assert "a.safetensors" in checkpoint.note
        assert "\n" not in checkpoint.note
        assert _find(found, "use", "reads").value == f"{LocalSource.concurrency} of 8.0 MiB in flight"

    def test_globs_that_match_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(shard({"a": ("F32", (256,))}))
        with pytest.raises(OptionError, match="'b'"):
            streamload.doctor(tmp_path, include=["b"])

    def test_a_uri_that_nothing_serves(self) -> None:
        with pytest.raises(OptionError, match="'ftp'"):
            streamload.doctor("ftp://bucket")


class TestSource:
    def _describing(self, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str]) -> None:
        async def describe(self: LocalSource) -> dict[str, str]:
            return facts

        monkeypatch.setattr(LocalSource, "describe", describe)

    def test_what_it_says_of_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._describing(monkeypatch, {"endpoint": "http://user:secret@host", "clock offset": "+12 s"})
        found = streamload.doctor(tmp_path)
        assert _find(found, "source", "endpoint").value == "http://***@host"
        assert _find(found, "source", "clock offset").ok

    @pytest.mark.parametrize("offset", ["+301 s", "-7200 s"])
    def test_a_clock_that_is_off(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: str) -> None:
        self._describing(monkeypatch, {"clock offset": offset})
        found = _find(streamload.doctor(tmp_path), "source", "clock offset")
        assert (found.value, found.ok) == (offset, False)
        assert "clock" in found.note

    def test_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def describe(self: LocalSource) -> dict[str, str]:
            raise AccessError("go away")

        monkeypatch.setattr(LocalSource, "describe", describe)
        found = _find(streamload.doctor(tmp_path), "source", "file")
        assert (found.value, found.note, found.ok) == ("cannot be asked", "go away", False)

    def test_that_does_not_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def describe(self: LocalSource) -> dict[str, str]:
            await asyncio.Event().wait()
            return {}

        monkeypatch.setattr(LocalSource, "describe", describe)
        monkeypatch.setattr("streamload.diagnosis._DESCRIBE_TIMEOUT_S", 0.0)
        found = _find(streamload.doctor(tmp_path), "source", "file")
        assert (found.value, found.ok) == ("does not answer", False)


class TestS3:
    def test_in_order(self, s3_bucket: S3Bucket) -> None:
        s3_bucket.put("llama/a.safetensors", shard({"a": ("F32", (256,))}))
        found = streamload.doctor(f"{s3_bucket.uri}/llama")
        assert _find(found, "source", "endpoint").value == s3_bucket.server.endpoint
        assert _find(found, "source", "region").value == s3_bucket.server.region
        assert _find(found, "source", "credentials").value == "env"
        assert _find(found, "source", "clock offset").ok
        assert _find(found, "checkpoint", f"{s3_bucket.uri}/llama").ok
        assert _find(found, "use", "source").value == "s3"
        text = json.dumps(found.to_dict()) + str(found)
        assert s3_bucket.server.access_key not in text
        assert s3_bucket.server.secret_key not in text

    def test_no_credentials(self, aws_env: S3Server, no_proxy: pytest.MonkeyPatch) -> None:
        no_proxy.delenv("AWS_ACCESS_KEY_ID")
        no_proxy.delenv("AWS_SECRET_ACCESS_KEY")
        found = streamload.doctor("s3://bucket/model")
        assert _find(found, "source", "credentials").value.startswith("none: no AWS credentials were found")
        assert not _find(found, "checkpoint", "s3://bucket/model").ok

    def test_no_bucket(self, aws_env: S3Server) -> None:
        found = streamload.doctor("s3://there-is-none/model")
        assert "404" in _find(found, "source", "answer").value
        assert "there is no bucket" in _find(found, "checkpoint", "s3://there-is-none/model").note

    def test_credentials_in_the_uri_are_not_shown(self, aws_env: S3Server) -> None:
        with pytest.raises(OptionError) as caught:
            streamload.doctor("s3://AKIAIOSFODNN7EXAMPLE:hunter2@bucket/model")
        assert "hunter2" not in str(caught.value)
