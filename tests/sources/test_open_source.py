"""Which source a URI gets."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from streamload.errors import MissingDependencyError, OptionError
from streamload.sources import Source, open_source
from streamload.sources.http import HttpSource
from streamload.sources.local import LocalSource
from streamload.sources.memory import MemorySource
from streamload.sources.s3 import S3Source


def make_memory(uri: str, *, concurrency: int | None = None) -> MemorySource:
    return MemorySource({}, uri=uri)


def make_nonsense(uri: str, *, concurrency: int | None = None) -> str:
    return uri


def _install(monkeypatch: pytest.MonkeyPatch, **factories: str) -> None:
    points = EntryPoints(EntryPoint(name, value, "streamload.sources") for name, value in factories.items())

    def entry_points(*, group: str) -> EntryPoints:
        return points.select(group=group)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("/models/llama", LocalSource),
        ("models/llama.safetensors", LocalSource),
        ("file:///models/llama", LocalSource),
        ("FILE:///models/llama", LocalSource),
        ("s3://bucket/llama", S3Source),
        ("https://host/llama", HttpSource),
        ("http://host:8080/llama/model.safetensors", HttpSource),
        ("S3://bucket", S3Source),
    ],
)
def test_schemes_that_come_with_the_package(uri: str, kind: type[Source]) -> None:
    source = open_source(uri, concurrency=3)
    assert type(source) is kind
    assert source.uri.lower() == uri.lower()
    assert source.requests == 0


def test_an_unknown_scheme_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, tape=f"{__name__}:make_memory")
    with pytest.raises(
        OptionError, match=r"'ftp'; known are: az, file, gs, hf, http, https, runai, .*, s3, sidecar, tape"
    ):
        open_source("ftp://user:secret@host/x")


def test_another_package_serves_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tapes", sys.modules[__name__])
    _install(monkeypatch, tape="tapes:make_memory", s3="tapes:make_memory")
    source = open_source("tape://shelf/7")
    assert isinstance(source, MemorySource)
    assert source.uri == "tape://shelf/7"
    assert type(open_source("s3://bucket")) is S3Source, "what comes with the package cannot be replaced unseen"


def test_what_another_package_brings_may_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tapes", sys.modules[__name__])
    _install(monkeypatch, tape="tapes:make_nonsense", gone="no_such_module:make", other="tapes:no_such_name")
    with pytest.raises(OptionError, match="made a str, not a Source"):
        open_source("tape://shelf")
    for uri in ("gone://x", "other://x"):
        with pytest.raises(MissingDependencyError, match="is broken"):
            open_source(uri)


def test_importing_the_package_imports_no_client() -> None:
    script = (
        "import sys, streamload.sources, streamload.sources.s3\n"
        "print(sorted({'aiobotocore', 'botocore', 'aiohttp', 'aiofiles', 'torch'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


def test_options_go_to_sources_that_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, tape=f"{__name__}:make_memory")
    with pytest.raises(OptionError, match="speed has no meaning for tape://"):
        open_source("tape://shelf", speed=3)
    # Set for a process, whatever it loads.
    assert open_source("tape://shelf", http_headers={"X-Token": "t"}).requests == 0
    with pytest.raises(OptionError, match="is set for each request"):
        open_source("https://host/x", http_headers={"Range": "bytes=0-1"})
