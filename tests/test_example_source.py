"""The example of a source that another package brings: it passes the suite, and is found where it is installed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from examples.tar_source.tar_source import TarSource
from streamload.sources import Source
from streamload.testing import SourceConformance
from tests.cli.models import write_model

_PACKAGE = Path(__file__).parent.parent / "examples" / "tar_source"


class TestTar(SourceConformance):
    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.path = tmp_path / "llama.tar"
        self.contents: dict[str, bytes] = {}

    def open(self) -> Source:
        return TarSource(f"tar://{self.path}")

    def put(self, key: str, content: bytes) -> None:
        self.contents[key] = content
        self._write()

    def remove(self, key: str) -> None:
        del self.contents[key]
        self._write()

    def _write(self) -> None:
        beside = self.path.with_suffix(".new")
        with tarfile.open(beside, "w") as archive:
            for key, content in self.contents.items():
                member = tarfile.TarInfo(key)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        os.replace(beside, self.path)


def _install(folder: Path) -> dict[str, str]:
    """What installing the package does, as far as it matters here: its entry points are found beside its module."""
    project = tomllib.loads((_PACKAGE / "pyproject.toml").read_text())["project"]
    info = folder / f"tar_source-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines: list[str] = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (folder / "tar_source.py").symlink_to(_PACKAGE / "tar_source.py")
    return os.environ | {"PYTHONPATH": str(folder)}


def _streamload(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "streamload", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_installed_it_serves_its_scheme(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "model.tar", "w") as archive:
        archive.add(write_model(tmp_path / "model"), arcname="")
    (tmp_path / "site").mkdir()
    installed = _install(tmp_path / "site")
    uri = f"tar://{tmp_path}/model.tar"

    found = _streamload("inspect", uri, environment=installed)
    assert (found.returncode, found.stderr) == (0, "")
    assert "model.embed.weight" in found.stdout

    refused = _streamload("inspect", uri, environment=dict(os.environ))
    assert refused.returncode == 2
    assert "nothing serves the scheme 'tar'" in refused.stderr


@pytest.mark.torch
def test_installed_it_loads(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "model.tar", "w") as archive:
        archive.add(write_model(tmp_path / "model"), arcname="")
    (tmp_path / "site").mkdir()
    loaded = _streamload(
        "load", f"tar://{tmp_path}/model.tar", "--quiet", "--json", environment=_install(tmp_path / "site")
    )
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert '"source": "tar"' in loaded.stdout
