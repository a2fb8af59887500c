"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.models import write_model
from tests.cli.programs import Program


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Program:
    """The command line in this process."""
    return Program(capsys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small checkpoint in two files, with an index."""
    return write_model(tmp_path / "model")
