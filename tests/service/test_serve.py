"""``streamload serve`` as a program: an engine that loads while it stages, and all that can go wrong meanwhile."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import streamload
from streamload.errors import ChecksumError, ObjectChangedError, SourceError
from tests.cli.programs import TIMEOUT_S
from tests.servers import S3Bucket
from tests.service.origins import Origin, origin_of
from tests.service.sidecars import Running, ask, running
from tests.stage.models import FIRST, PIECE, SECOND, STAGED, source_of

# Of each shard: ten pieces, and what is left for the header.
_STARTS = [number * PIECE for number in range(11)]


def _late(name: str, start: int) -> bool:
    """What a load needs when it has all headers, and has read the first file."""
    return name == SECOND and start >= 6 * PIECE


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    with origin_of(tmp_path / "source") as origin:
        yield origin


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return tmp_path / "volume"


@pytest.fixture
def model() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(10 * PIECE, dtype=torch.uint8) for name in ("first", "second")}


@contextmanager
def _beside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(256) as threads:
        yield threads


def _loading(
    threads: ThreadPoolExecutor, model: dict[str, torch.Tensor], volume: Path, **options: Any
) -> Future[streamload.Report]:
    return threads.submit(
        streamload.load_into, model, f"sidecar://{volume}/streamload.sock", deadline_s=TIMEOUT_S, **options
    )


def _check(model: dict[str, torch.Tensor], folder: Path) -> None:
    expected = streamload.load(folder / FIRST) | streamload.load(folder / SECOND)
    assert model.keys() == expected.keys()
    assert all(torch.equal(model[name], expected[name]) for name in expected)


def _object(sidecar: Running, key: str) -> dict[str, Any]:
    objects = ask(sidecar.socket, "GET", "/v1/objects").json["objects"]
    found: dict[str, dict[str, Any]] = {each["key"]: each for each in objects}
    return found[key]


def _range(sidecar: Running, key: str, start: int, end: int, stamp: str | None = None) -> dict[str, Any]:
    """What to ask for a range."""
    version = _object(sidecar, key)["version"]
    return {"key": key, "version": version, "start": start, "end": end, "stamp": stamp}


class _Seen:
    """Knows when a load has read so much of a file."""

    def __init__(self) -> None:
        self._nbytes: dict[str, int] = {}
        self.first: Future[None] = Future()

    def __call__(self, event: streamload.Event) -> None:
        if event.kind == "read" and event.object is not None:
            self._nbytes[event.object] = self._nbytes.get(event.object, 0) + event.nbytes
            if self._nbytes.get(FIRST) == 10 * PIECE and not self.first.done():
                self.first.set_result(None)


class TestWhileItStages:
    def test_load_into_reads_what_has_landed_and_waits_for_the_rest(
        self, origin: Origin, tmp_path: Path, volume: Path, model: dict[str, torch.Tensor]
    ) -> None:
        origin.hold(_late)
        seen = _Seen()
        with _beside() as threads:
            loading = _loading(threads, model, volume, on_event=seen)  # before there is a sidecar
            with running(origin.uri, volume) as sidecar:
                seen.first.result(TIMEOUT_S)
                status = sidecar.status()
                assert (status["state"], loading.done()) == ("staging", False)
                assert 10 * PIECE < status["landed_bytes"] < status["total_bytes"]
                origin.release()
                report = loading.result(TIMEOUT_S)
                _check(model, tmp_path / "source")
                sidecar.until("all is staged")
                # The engine's container is begun again: all is there, and nothing is asked for range by range.
                answered = sidecar.status()["answered"]
                again = streamload.load_into(model, sidecar.uri)
                assert sidecar.status()["answered"] == answered
        assert report.source == again.source == "sidecar"
        assert sorted(origin.read(SECOND)) == _STARTS

    def test_what_is_waited_for_comes_first(self, origin: Origin, volume: Path) -> None:
        origin.hold(lambda name, start: name == FIRST and start == PIECE)
        with _beside() as threads, running(origin.uri, volume, "--concurrency", 1) as sidecar:
            origin.until_held()
            body = _range(sidecar, SECOND, 8 * PIECE + 5, 9 * PIECE - 5)
            asked = threads.submit(ask, sidecar.socket, "POST", "/v1/range", body)
            while not sidecar.status()["waiting"]:
                assert not asked.done()
            origin.release()
            answer = asked.result(TIMEOUT_S)
            assert answer.json["landed"] == [8 * PIECE, 9 * PIECE]
            sidecar.until("all is staged")
        # After what was under way, and before all that nobody has asked for.
        ranges = [seen.headers["range"] for seen in origin.server.seen if "range" in seen.headers]
        held = ranges.index(f"bytes={PIECE}-{2 * PIECE - 1}")
        assert ranges[held + 1] == f"bytes={8 * PIECE}-{9 * PIECE - 1}"

    def test_the_verdict_counts(
        self, origin: Origin, tmp_path: Path, volume: Path, model: dict[str, torch.Tensor]
    ) -> None:
        """Bytes that were handed out before they were verified, and turned out to be wrong."""
        streamload.write_manifest(tmp_path / "source")
        (manifest,) = (tmp_path / "source").glob("*manifest*")
        origin.put(manifest.name, manifest.read_bytes())
        right = (tmp_path / "source" / SECOND).read_bytes()
        origin.put(SECOND, right[:-1] + bytes([right[-1] ^ 1]))
        origin.hold(_late)
        with _beside() as threads, running(f"{origin.uri}", volume) as sidecar:
            loading = _loading(threads, model, volume)
            origin.until_held()
            told = ask(sidecar.socket, "POST", "/v1/range", _range(sidecar, SECOND, 100, 200)).json
            origin.release()
            with pytest.raises(ChecksumError) as failed:
                loading.result(TIMEOUT_S)
            message = str(failed.value)
            for part in (sidecar.uri, SECOND, origin.uri, "sums up to", "content of the tensors", "undefined"):
                assert part in message
            assert "\n" not in message
            assert "READY" not in os.listdir(volume)
            # Another attempt reads those bytes again: what was read before is not what gets the verdict now.
            origin.put(SECOND, right)
            assert ask(sidecar.socket, "POST", "/v1/start").json["state"] == "staging"
            version = {"key": SECOND, "version": _object(sidecar, SECOND)["version"]}
            assert ask(sidecar.socket, "POST", "/v1/verdict", version).status == 200
            stale = ask(sidecar.socket, "POST", "/v1/verdict", {**version, "stamp": told["stamp"]})
            assert stale.status == 409
            assert "load it again" in stale.error
            streamload.load_into(model, sidecar.uri)
            _check(model, tmp_path / "source")
            sidecar.until("all is staged")
            status = sidecar.status()
            assert (status["attempts"], status["errors"]) == (2, {"ChecksumError": 1})

    def test_an_object_that_changes(self, origin: Origin, volume: Path, model: dict[str, torch.Tensor]) -> None:
        origin.hold(_late)
        with _beside() as threads, running(origin.uri, volume) as sidecar:
            loading = _loading(threads, model, volume)
            origin.until_held()
            origin.put(SECOND, bytes(10 * PIECE))
            origin.release()
            with pytest.raises(ObjectChangedError) as failed:
                loading.result(TIMEOUT_S)
            assert origin.uri in str(failed.value)
            assert SECOND in str(failed.value)
            sidecar.until("staging failed")

    def test_from_s3_and_verified_by_it(
        self, s3_bucket: S3Bucket, tmp_path: Path, volume: Path, model: dict[str, torch.Tensor]
    ) -> None:
        source = source_of(tmp_path / "source")
        for name in STAGED:
            s3_bucket.put(name, (source / name).read_bytes())
        with running(s3_bucket.uri, volume) as sidecar:
            report = streamload.load_into(model, sidecar.uri)
            _check(model, source)
        # The sidecar has compared what the store keeps, and says so.
        (by,) = report.verified
        assert by.startswith("the sidecar: the store's ")
        assert (report.verified[by], report.unverified) == (20 * PIECE, {})


class TestKilled:
    def test_killed_and_begun_again_in_the_middle(
        self, origin: Origin, tmp_path: Path, volume: Path, model: dict[str, torch.Tensor]
    ) -> None:
        origin.hold(_late)
        seen = _Seen()
        with _beside() as threads:
            with running(origin.uri, volume) as sidecar:
                loading = _loading(threads, model, volume, on_event=seen)
                seen.first.result(TIMEOUT_S)
                sidecar.process.send_signal(signal.SIGKILL)
                assert sidecar.ended() == -signal.SIGKILL
            assert (volume / "streamload.sock").is_socket()  # nobody could remove it
            origin.release()
            with running(origin.uri, volume) as sidecar:
                loading.result(TIMEOUT_S)
                _check(model, tmp_path / "source")
        # What had landed was not read again.
        assert sorted(origin.read(FIRST)) == _STARTS

    def test_another_version_after_that(self, origin: Origin, volume: Path, model: dict[str, torch.Tensor]) -> None:
        """What was read of the old one does not make up a model with the new one."""
        origin.hold(_late)
        seen = _Seen()
        with _beside() as threads:
            with running(origin.uri, volume) as sidecar:
                loading = _loading(threads, model, volume, on_event=seen)
                seen.first.result(TIMEOUT_S)
                sidecar.process.send_signal(signal.SIGKILL)
                sidecar.ended()
            first = origin.server.files[f"/model/{FIRST}"].content
            origin.put(FIRST, first[:-1] + bytes([first[-1] ^ 1]))
            origin.release()
            with running(origin.uri, volume), pytest.raises(ObjectChangedError, match="another version"):
                loading.result(TIMEOUT_S)

    def test_what_had_landed_and_is_wrong_now(self, origin: Origin, tmp_path: Path, volume: Path) -> None:
        """What was read of it before gets no verdict, though it is right in the end."""
        origin.hold(_late)
        with running(origin.uri, volume) as sidecar:
            origin.until_held()
            asked = _range(sidecar, SECOND, 100, 200)
            told = ask(sidecar.socket, "POST", "/v1/range", asked).json
            sidecar.process.send_signal(signal.SIGKILL)
            sidecar.ended()
        with (volume / told["path"]).open("r+b") as file:
            file.seek(150)
            file.write(b"wrong")
        origin.release()
        with running(origin.uri, volume) as sidecar:
            verdict = {"key": SECOND, "version": asked["version"]}
            assert ask(sidecar.socket, "POST", "/v1/verdict", verdict).status == 200
            assert ask(sidecar.socket, "POST", "/v1/verdict", verdict | {"stamp": told["stamp"]}).status == 409
        assert (volume / SECOND).read_bytes() == (tmp_path / "source" / SECOND).read_bytes()

    def test_sigterm_while_clients_wait(self, origin: Origin, tmp_path: Path, volume: Path) -> None:
        origin.hold(lambda name, start: name == FIRST and start == 2 * PIECE)
        with _beside() as threads:
            with running(origin.uri, volume, "--concurrency", 1) as sidecar:
                origin.until_held()
                lands = _range(sidecar, FIRST, 2 * PIECE, 3 * PIECE)
                waits = _range(sidecar, SECOND, 0, 11 * PIECE - PIECE)
                landing = threads.submit(ask, sidecar.socket, "POST", "/v1/range", lands)
                waiting = [threads.submit(ask, sidecar.socket, "POST", "/v1/range", waits) for _ in range(20)]
                while sidecar.status()["waiting"] < 21:
                    pass
                sidecar.process.send_signal(signal.SIGTERM)
                sidecar.until("waiting for the reads that are under way")
                origin.release()
                assert sidecar.ended() == 143
                # What was under way has landed, and who waited for it is told; the others are sent to the next one.
                assert landing.result(TIMEOUT_S).status == 200
                assert {answer.result(TIMEOUT_S).status for answer in waiting} == {503}
            assert "streamload.sock" not in os.listdir(volume)
            with running(origin.uri, volume) as sidecar:
                sidecar.until("all is staged")
        assert sorted(origin.read(FIRST)) == _STARTS
        assert (volume / FIRST).read_bytes() == (tmp_path / "source" / FIRST).read_bytes()

    def test_sigterm_does_not_wait_for_a_store_that_hangs(self, origin: Origin, volume: Path) -> None:
        origin.hold(lambda name, start: name == FIRST)
        with running(origin.uri, volume, "--drain-s", 0.1) as sidecar:
            origin.until_held()
            sidecar.process.send_signal(signal.SIGTERM)
            assert sidecar.ended() == 143
            assert all(line["level"] != "error" or "SIGTERM" in line["message"] for line in sidecar.lines)


class TestCancelled:
    def test_cancelled_and_begun_again(
        self, origin: Origin, tmp_path: Path, volume: Path, model: dict[str, torch.Tensor]
    ) -> None:
        origin.hold(_late)
        seen = _Seen()
        with _beside() as threads, running(origin.uri, volume) as sidecar:
            loading = _loading(threads, model, volume, on_event=seen)
            seen.first.result(TIMEOUT_S)
            assert ask(sidecar.socket, "POST", "/v1/cancel").json["state"] == "cancelled"
            with pytest.raises(SourceError, match="staging was cancelled"):
                loading.result(TIMEOUT_S)
            events = ask(sidecar.socket, "GET", "/v1/progress").body.decode()
            assert events.startswith("event: cancelled\ndata: {")
            assert ask(sidecar.socket, "POST", "/v1/cancel").json["state"] == "cancelled"
            before = origin.read(FIRST)
            origin.release()
            # An engine that lists has it begun again.
            streamload.load_into(model, sidecar.uri)
            _check(model, tmp_path / "source")
            assert origin.read(FIRST) == before
            assert ask(sidecar.socket, "POST", "/v1/start").json["attempts"] == 2

    def test_progress_is_told_until_the_end(self, origin: Origin, volume: Path) -> None:
        origin.hold(_late)
        with _beside() as threads, running(origin.uri, volume) as sidecar:
            origin.until_held()
            telling = threads.submit(ask, sidecar.socket, "GET", "/v1/progress")
            origin.release()
            events = [event.split("\n") for event in telling.result(TIMEOUT_S).body.decode().strip().split("\n\n")]
        assert {event[0] for event in events[:-1]} <= {"event: staging"}
        assert events[-1][0] == "event: staged"
        landed = [json.loads(event[1].removeprefix("data: "))["landed_bytes"] for event in events]
        assert landed == sorted(landed)
