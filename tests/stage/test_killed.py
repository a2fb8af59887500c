"""SIGKILL at any moment: what has landed is not read again, and what comes out is whole."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamload
from streamload.loan import Loan
from streamload.sources import SourceObject
from streamload.sources.local import LocalSource
from streamload.stage.journal import read_journal
from streamload.stage.names import JOURNAL_NAME, unfinished_name
from streamload.stage.pieces import Ranges
from streamload.stage.ready import is_as_staged
from tests.cli.programs import TIMEOUT_S, program
from tests.stage.models import FIRST, PIECE, same, source_of, total_bytes

_MOMENTS = 20
# With 1 MiB of memory, at most so many pieces are on their way at once.
_WORKERS = 12


class Dying:
    """Stages in processes that die."""

    def __init__(self, source: Path, process: subprocess.Popen[str]) -> None:
        self.source = source
        self._process = process

    def stage(self, number: int, folder: Path) -> int:
        """Stage until the operation of that number: the answer, see `tests.stage.dying`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{number} {folder}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dying]:
    source = source_of(tmp_path_factory.mktemp("killed") / "source")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.stage.dying", str(source), str(PIECE)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Dying(source, process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(TIMEOUT_S)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all reads of files, as the source sees them."""
    lengths: list[int] = []
    real = LocalSource.read

    async def counted(self: LocalSource, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        lengths.append(end - start)
        await real(self, object, start, end, loan)

    monkeypatch.setattr(LocalSource, "read", counted)
    return lengths


def _landed_bytes(folder: Path) -> int:
    """What a killed process has noted as being there."""
    noted = read_journal(str(folder))
    whole = [file for file in noted.whole.values() if is_as_staged(str(folder), file)]
    landed = sum(file.size_bytes for file in whole)
    for of, pieces in noted.landed.items():
        if of not in {file.identity for file in whole}:
            ranges = Ranges()
            for piece in pieces:
                ranges.add(piece.start, piece.end)
            landed += sum(piece.nbytes for piece in pieces)
    return landed


def _stage(source: Path, folder: Path) -> streamload.Staged:
    return streamload.stage_checkpoint(source, folder, read_bytes=PIECE, memory_bytes=1 << 20)


def test_any_moment(dying: Dying, tmp_path: Path, read: list[int]) -> None:
    operations = dying.stage(0, tmp_path / "undisturbed")
    assert same(dying.source, tmp_path / "undisturbed")
    assert operations > 2 * _MOMENTS
    total = total_bytes(dying.source)
    most = 0
    for moment in range(_MOMENTS):
        number = 1 + moment * (operations - 1) // (_MOMENTS - 1)
        folder = tmp_path / str(number)
        assert dying.stage(number, folder) == -1
        landed = _landed_bytes(folder)
        done = (folder / "READY").exists()
        read.clear()
        staged = _stage(dying.source, folder)
        if done:  # between the marker and the end: that it is there was seen without writing anything
            (folder / JOURNAL_NAME).unlink(missing_ok=True)
        assert same(dying.source, folder), f"killed at {number} of {operations}"
        # The index is read anew, where it is not known what it names.
        assert sum(read) <= total - landed + (dying.source / "model.safetensors.index.json").stat().st_size
        assert staged.fetched_bytes == (0 if done else total - landed)
        most = max(most, landed)
    # It does get somewhere: what is lost is what was on its way.
    assert most > total - _WORKERS * PIECE


def test_again_and_again(dying: Dying, tmp_path: Path) -> None:
    """Each one gets a few operations further, the marker included."""
    kills = 0
    folder = tmp_path / "folder"
    done = False
    while dying.stage(25, folder) == -1:
        kills += 1
        done = (folder / "READY").exists()
    assert kills > 1
    if done:  # between the marker and the end: that it is there was seen without writing anything
        (folder / JOURNAL_NAME).unlink(missing_ok=True)
    assert same(dying.source, folder)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_what_has_landed_is_not_trusted(dying: Dying, tmp_path: Path, damage: str) -> None:
    # Somewhere in the middle of the weights.
    assert dying.stage(40, tmp_path / "folder") == -1
    unfinished = tmp_path / "folder" / unfinished_name(FIRST)
    content = bytearray(unfinished.read_bytes())
    landed = _landed_bytes(tmp_path / "folder")
    if damage == "flipped":
        for at in range(0, len(content), PIECE):
            content[at] ^= 1
        unfinished.write_bytes(content)
    elif damage == "truncated":
        os.truncate(unfinished, len(content) // 2)
    else:
        unfinished.unlink()
    staged = _stage(dying.source, tmp_path / "folder")
    assert same(dying.source, tmp_path / "folder")
    assert staged.fetched_bytes > total_bytes(dying.source) - landed


@pytest.mark.parametrize("others", [1, 4])
def test_who_waits_takes_over(dying: Dying, tmp_path: Path, others: int) -> None:
    """One download: one works, the others wait; it is killed, and one of them goes on."""
    folder = tmp_path / "folder"
    leader = dying.stage(-30, folder)
    landed = _landed_bytes(folder)
    assert landed
    command = ("stage", dying.source, folder, "--json", "--read-bytes", PIECE, "--memory-bytes", "1MiB")
    with program(*command) as first:
        # Both the log line and the lock of a living process say that it waits.
        assert first.stderr is not None
        while "another process is at work there" not in (line := first.stderr.readline()):
            assert line
        running = [program(*command) for _ in range(others - 1)]
        processes = [first, *[each.__enter__() for each in running]]
        try:
            assert [process.poll() for process in processes] == [None] * others
            os.kill(leader, signal.SIGKILL)
            outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        finally:
            for each in running:
                each.__exit__(None, None, None)
    assert [process.returncode for process in processes] == [0] * others
    fetched = sorted(int(re.findall(r'"fetched_bytes": (\d+)', output)[0]) for output in outputs)
    assert fetched == [0] * (others - 1) + [total_bytes(dying.source) - landed]
    assert same(dying.source, folder)
