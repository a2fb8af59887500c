"""A rank that fails tells the others: real processes, and what only a store and a clock can show."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from streamload import peers
from streamload.errors import DeadlineError, ObjectChangedError, PeerError, StreamloadError
from streamload.peers import Peers
from tests.ranks import Task

PATIENCE_S = 240  # of a process that is about to fail
# The listing and a header; the next operation reads the tensors. Files have no checksums, and one is asked for.
FIRST_READ = 4


class Rank:
    """A process that is one rank."""

    def __init__(self, task: Task) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.write(task.to_json())

    def write(self, line: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def read(self, at: str, after: str = "") -> dict[str, Any]:
        """What it says next, which must be this; or first, perhaps, the other."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the process ended with {self.process.wait()} and not at {at!r}"
        said = cast("dict[str, Any]", json.loads(line))
        if said["at"] == after:
            return self.read(at)
        assert said["at"] == at, said
        return said

    def end(self) -> None:
        assert self.read("end") == {"at": "end", "left": []}
        assert self.process.wait(PATIENCE_S) == 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[Rank]]]:
    """Start ranks on a checkpoint of their own, and see to it that none outlives the test."""
    stores: list[TCPStore] = []  # each for as long as it is needed
    with ExitStack() as stack:

        def start(size: int, *, rank_0_holds_the_store: bool = False, **of_ranks: dict[str, Any]) -> list[Rank]:
            port = 0
            if not rank_0_holds_the_store:
                # As torchrun's agent does.
                store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                stores.append(store)
                port = store.port
            ranks: list[Rank] = []
            for number in range(size):
                tensors = {"weight": torch.full((300, 300), float(number)), "rank": torch.tensor(number)}
                save_file(tensors, tmp_path / f"model-rank-{number}-part-0.safetensors")
                ranks.append(Rank(Task(number, size, port, str(tmp_path), **of_ranks.get(f"rank_{number}", {}))))
                process = ranks[-1].process
                stack.enter_context(process)
                stack.callback(process.kill)
                timer = threading.Timer(PATIENCE_S, process.kill)
                timer.start()
                stack.callback(timer.cancel)
                if port == 0:
                    port = ranks[-1].read("store")["port"]
            for rank in ranks[1 if rank_0_holds_the_store else 0 :]:
                rank.read("store")
            return ranks

        yield start


def check_told(rank: Rank, failed: int, text: str, *, after: str = "") -> None:
    """Its load ends with another rank's error; it may have said before that it has come so far."""
    said = rank.read("failed", after)
    assert said["kind"] == "PeerError"
    assert said["rank"] == failed
    assert f"rank {failed} failed: " in said["text"]
    assert text in said["text"]


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_load_their_own_one_load_after_the_other(size: int, start: Callable[..., list[Rank]]) -> None:
    ranks = start(size, **{f"rank_{rank}": {"loads": 2} for rank in range(size)})
    for _ in range(2):
        for number, rank in enumerate(ranks):
            rank.read("finishing")
            assert rank.read("loaded")["ranks"] == [number, number]
    for rank in ranks:
        rank.end()


def test_a_rank_whose_model_does_not_fit_ends_all(start: Callable[..., list[Rank]]) -> None:
    ranks = start(4, rank_2={"extra_name": True}, **{f"rank_{rank}": {"block_at": FIRST_READ} for rank in (0, 1, 3)})
    assert ranks[2].read("failed")["kind"] == "MismatchError"
    for rank in (0, 1, 3):
        # Whether it has begun to read by then or not.
        check_told(ranks[rank], 2, "'extra'", after="blocked")
    for each in ranks:
        each.end()


def test_none_returns_where_another_fails_at_its_last_read(start: Callable[..., list[Rank]], tmp_path: Path) -> None:
    ranks = start(2, rank_0={"block_at": FIRST_READ})
    ranks[0].read("blocked")
    ranks[1].read("finishing")
    # Now rank 1 has everything, and waits for rank 0 only, whose file is another one now.
    os.utime(tmp_path / "model-rank-0-part-0.safetensors", ns=(1, 1))
    ranks[0].write()
    assert ranks[0].read("failed")["kind"] == "ObjectChangedError"
    check_told(ranks[1], 0, "model-rank-0-part-0.safetensors")
    for rank in ranks:
        rank.end()


def test_the_rank_that_holds_the_store_may_be_killed_too(start: Callable[..., list[Rank]]) -> None:
    ranks = start(2, rank_0_holds_the_store=True, rank_0={"block_at": FIRST_READ})
    ranks[0].read("blocked")
    ranks[1].read("finishing")
    ranks[0].process.kill()
    said = ranks[1].read("failed")
    assert said["kind"] == "PeerError"
    assert "rank 0" in said["text"]
    ranks[1].end()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_whose_source_fails_ends_all_wherever_the_store_is(
    failing: int, start: Callable[..., list[Rank]]
) -> None:
    ranks = start(2, rank_0_holds_the_store=True, **{f"rank_{failing}": {"fail_at": FIRST_READ}})
    said = ranks[failing].read("failed")
    assert said["kind"] == "AccessError"
    assert f"spoiled for rank {failing}" in said["text"]
    check_told(ranks[1 - failing], failing, f"spoiled for rank {failing}", after="finishing")
    for each in ranks:
        each.end()


def test_a_rank_that_is_killed_ends_all(start: Callable[..., list[Rank]]) -> None:
    ranks = start(4, rank_3={"block_at": FIRST_READ}, rank_1={"block_at": FIRST_READ})
    ranks[3].read("blocked")
    ranks[1].read("blocked")
    for rank in (0, 2):
        ranks[rank].read("finishing")
    ranks[3].process.kill()
    for rank in (0, 1, 2):
        check_told(ranks[rank], 3, "its process is gone")
        ranks[rank].end()


# With a store of this process.


def run_all(*calls: Callable[[], object]) -> list[object]:
    """Call each on a thread of its own; what each returned or raised."""
    results: list[object] = [None] * len(calls)

    def run(at: int) -> None:
        try:
            results[at] = calls[at]()
        except BaseException as error:
            results[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def together() -> Iterator[Callable[..., list[Peers]]]:
    made: list[Peers] = []

    def together(size: int, absent: int = 0, store: Any = None, **options: float) -> list[Peers]:
        shared = store or HashStore()
        for rank in range(size - absent):
            made.append(Peers(shared, rank, size, 0, **{"look_s": 0.001, "linger_s": 60, **options}))
            made[-1].start()
        return made

    yield together
    for each in made:
        each.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "streamload-peers"]


def test_all_finish_together(together: Callable[..., list[Peers]]) -> None:
    assert run_all(*[each.finish for each in together(5)]) == [None] * 5


def test_all_have_read_the_same_versions(together: Callable[..., list[Peers]]) -> None:
    """A branch of the Hub's may move between the moments at which two ranks look."""
    ranks = together(3)
    read = [{"a": "1", "b": "1"}, {"b": "1", "c": "1"}, {"c": "2", "a": "1"}]

    def end(rank: Peers, versions: dict[str, str]) -> None:
        try:
            rank.finish(versions=versions)
        except StreamloadError as error:
            rank.failed(error)
            raise

    results = run_all(*[partial(end, *each) for each in zip(ranks, read, strict=True)])
    (error,) = [result for result in results if isinstance(result, ObjectChangedError)]
    assert error.object == "c"
    assert "another rank has read version" in error.cause
    assert sum(isinstance(result, PeerError) for result in results) == 2


def test_who_has_read_the_same_finishes(together: Callable[..., list[Peers]]) -> None:
    read = [{"a": "1", "b": "1"}, {"b": "1"}]
    assert run_all(*[partial(r.finish, versions=v) for r, v in zip(together(2), read, strict=True)]) == [None] * 2


def test_the_first_failure_is_what_the_others_hear(together: Callable[..., list[Peers]]) -> None:
    ranks = together(3)
    heard: list[PeerError] = []
    event = threading.Event()

    def hear(error: PeerError) -> None:
        heard.append(error)
        event.set()

    ranks[2].when_failed(hear)
    ranks[1].failed(ValueError("it broke"))
    event.wait()
    assert [(error.cause, error.rank) for error in heard] == [("rank 1 failed: it broke", 1)]
    again = pickle.loads(pickle.dumps(heard[0]))
    assert (again.cause, again.rank) == (heard[0].cause, 1)
    # Who asks later hears it at once, and who waits at the end does.
    ranks[2].when_failed(heard.append)
    assert len(heard) == 2
    for each in (ranks[0], ranks[2]):
        with pytest.raises(PeerError, match="rank 1 failed: it broke"):
            each.finish()
        each.failed(heard[0])


def test_who_does_not_come_is_named(together: Callable[..., list[Peers]]) -> None:
    ranks = together(4, absent=2)
    with pytest.raises(DeadlineError, match=r"of 4 ranks \[2, 3\] did not begin to load within deadline_s"):
        ranks[0].finish(0.0)


def test_the_process_groups_timeout_is_the_last_word(together: Callable[..., list[Peers]]) -> None:
    store = HashStore()
    store.set_timeout(timedelta(milliseconds=1))
    ranks = together(2, store=store)
    with pytest.raises(
        PeerError, match=r"of 2 ranks \[1\] did not end within .*, the process group's timeout"
    ) as caught:
        ranks[0].finish()
    assert caught.value.rank == 1


def test_a_rank_elsewhere_that_gives_no_sign_of_life_counts_as_gone(
    together: Callable[..., list[Peers]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers._Identity, "visible", False)
    ranks = together(3, silence_s=60)
    ranks[1].close()
    ranks[0]._silence_s = 0.05
    with pytest.raises(PeerError, match="rank 1 failed: it has given no sign of life for") as caught:
        ranks[2].finish()
    assert caught.value.rank == 1


def test_a_rank_that_was_taken_for_gone_hears_of_it(together: Callable[..., list[Peers]]) -> None:
    ranks = together(2)
    ranks[0]._tell(1, "it has given no sign of life for 30 s")
    with pytest.raises(PeerError, match=r"took this one for gone .*: it has given no sign") as caught:
        ranks[1].finish(30)
    assert caught.value.rank == 1
    ranks[1].failed(caught.value)


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    own = peers._Identity.own()
    assert own.visible
    assert not own.gone
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other = peers._Identity(own.host, own.pid_namespace, process.pid, peers._started(process.pid) or "")
    assert not other.gone
    assert peers._Identity(own.host, own.pid_namespace, process.pid, own.started).gone, "it has another one's number"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert other.gone, "a zombie does nothing any more"
    process.communicate()
    assert other.gone
    assert not peers._Identity("elsewhere", own.pid_namespace, process.pid, "1").visible


class BrokenStore:
    """A store whose process has gone."""

    timeout = timedelta(seconds=1)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*args: object) -> None:
            raise RuntimeError("Connection reset by peer")

        return fail


def test_a_store_that_is_gone_is_a_rank_that_is_gone(together: Callable[..., list[Peers]]) -> None:
    (one,) = together(2, absent=1, store=BrokenStore())
    heard: list[PeerError] = []
    one.when_failed(heard.append)
    assert "the store of torch.distributed does not answer (RuntimeError: Connection reset by peer)" in heard[0].cause
    with pytest.raises(PeerError, match="that of rank 0 as a rule, is gone"):
        one.finish()
    one.failed(heard[0])


class ClosingStore:
    """A store whose process goes as soon as all have loaded everything."""

    def __init__(self) -> None:
        self._store = HashStore()

    def add(self, key: str, count: int) -> int:
        if key.endswith("/left"):
            raise RuntimeError("Connection reset by peer")
        return int(self._store.add(key, count))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_store_that_goes_when_all_have_loaded_spoils_nothing(together: Callable[..., list[Peers]]) -> None:
    assert run_all(*[each.finish for each in together(3, store=ClosingStore())]) == [None] * 3


def test_without_a_process_group_nobody_is_told() -> None:
    assert peers.join_peers() is None
