"""Loads from a real S3 server behind a proxy that spoils answers: the right tensors, or the right error.

After each, no connection is left, and no thread.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save_file

import streamload
from streamload.errors import ChecksumError, ObjectChangedError, SourceError
from streamload.options import Concurrency
from streamload.pipeline.policy import RetryPolicy
from streamload.report import Report
from streamload.sources.s3 import S3Source
from tests.checkpoints import read_with_safetensors, same_tensor
from tests.faultproxy import Fault, FaultProxy, Plan, run_fault_proxy
from tests.servers import S3Bucket

READ_BYTES = 256 << 10
NAME = "model.safetensors"
# One more request for a range comes first: the header's.
HEADER = 1

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty tensors of 256 KiB: a read each."""
    folder = tmp_path_factory.mktemp("faults")
    generator = torch.Generator().manual_seed(7)
    tensors = {f"layer.{number:02d}": torch.randn(1 << 16, generator=generator) for number in range(40)}
    save_file(tensors, folder / NAME)
    return folder


@pytest.fixture
def bucket(s3_bucket: S3Bucket, folder: Path) -> S3Bucket:
    """The checkpoint, with its checksum."""
    body = (folder / NAME).read_bytes()
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=f"m/{NAME}", Body=body, ChecksumAlgorithm="CRC32")
    return s3_bucket


@pytest.fixture
def load(bucket: S3Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Report, FaultProxy]]:
    """Load through a proxy with a plan, and compare every tensor."""

    def load(plan: Plan, concurrency: Concurrency = "auto") -> tuple[Report, FaultProxy]:
        threads = set(threading.enumerate())
        with _proxied(bucket, plan, monkeypatch) as proxy:
            with streamload.stream(f"{bucket.uri}/m", read_bytes=READ_BYTES, concurrency=concurrency) as stream:
                found = dict(stream)
            expected = read_with_safetensors(folder)
            assert found.keys() == expected.keys()
            assert all(same_tensor(found[name], expected[name]) for name in expected)
            assert stream.report.verified == {"CRC32 of the whole object": stream.report.total_bytes}
            _none_connected(proxy)
        assert set(threading.enumerate()) == threads
        return stream.report, proxy

    return load


@contextmanager
def _proxied(bucket: S3Bucket, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    endpoint = urlsplit(bucket.server.environment["AWS_ENDPOINT_URL"])
    assert endpoint.hostname is not None
    assert endpoint.port is not None
    with run_fault_proxy(endpoint.hostname, endpoint.port, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


def _none_connected(proxy: FaultProxy) -> None:
    """The proxy sees the connections end a moment after they did."""
    gone = threading.Event()
    for _ in range(1000):
        if proxy.connections == 0:
            return
        gone.wait(0.01)
    raise AssertionError(f"{proxy.connections} connections are left")


def at(*numbers: int, fault: Fault) -> Plan:
    """Spoil the answers to these requests for ranges."""
    return lambda number, head: fault if number in numbers else None


def asks_for_all(head: bytes) -> bool:
    """Whether a request is for a whole read, not for a header or for what another answer still lacked."""
    (asked,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"range:"))
    start, end = asked.removeprefix(b"range: bytes=").split(b"-")
    return int(start) > 0 and int(end) + 1 - int(start) == READ_BYTES


def at_whole_reads(*numbers: int, fault: Fault) -> Plan:
    """Spoil the answers to these requests for whole reads, counted from 1."""
    count = itertools.count(1)
    return lambda number, head: fault if asks_for_all(head) and next(count) in numbers else None


@pytest.mark.parametrize("then", ["reset", "close"])
@pytest.mark.parametrize("passed_bytes", [0, 1, 40, None, 1000, READ_BYTES - 1])
def test_answers_that_are_cut(load: Callable[..., tuple[Report, FaultProxy]], then: str, passed_bytes: int) -> None:
    """Before the head, in it, behind it, in the body: the first tensors', some in the middle, the last."""
    fault = Fault("reset" if then == "reset" else "close", passed_bytes)
    # What is asked for again is shorter, and may be passed whole: it does not count.
    report, proxy = load(at_whole_reads(1, 17, 18, 40, fault=fault))
    assert proxy.spoiled == 4
    # A connection that ends before an answer's first byte is not the server's fault: the request is sent again at once,
    # and where it was the first on its connection it counts as tried in vain. A reset takes with it what has arrived
    # and was not read yet, which may be all.
    assert report.retries <= 4
    if passed_bytes != 0 and then == "close":
        _retried(report, 4)


def _retried(report: Report, times: int) -> None:
    """So often; on a busy machine an answer that was late, too, may have been asked for again before it ended."""
    assert report.retries == times or (report.hedged_bytes > 0 and report.retries < times)


def test_the_header_is_cut(load: Callable[..., tuple[Report, FaultProxy]]) -> None:
    report, _ = load(at(HEADER, fault=Fault("close", 1000)))
    assert report.retries == 1


def test_every_answer_is_cut_once(load: Callable[..., tuple[Report, FaultProxy]]) -> None:
    spoiled: set[bytes] = set()

    def plan(number: int, head: bytes) -> Fault | None:
        """Once for each range, whoever asks for it again."""
        asked = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"range:"))
        if not asks_for_all(head) or asked in spoiled:
            return None
        spoiled.add(asked)
        return Fault("close", 100_000)

    report, proxy = load(plan)
    assert proxy.spoiled == 40
    _retried(report, 40)


@pytest.mark.parametrize("number", [25, 40])
@pytest.mark.parametrize("passed_bytes", [0, None, 100_000])
def test_one_connection_stalls_for_ever(
    load: Callable[..., tuple[Report, FaultProxy]], number: int, passed_bytes: int | None
) -> None:
    """What it owes is asked for on another one, long before the stall limit."""
    report, proxy = load(at(HEADER + number, fault=Fault("stall", passed_bytes)), concurrency=4)
    assert proxy.spoiled == 1
    assert report.retries == 0
    assert 0 < report.hedged_bytes <= READ_BYTES
    assert report.fetched_bytes == report.total_bytes + report.header_bytes


def test_all_connections_stall(load: Callable[..., tuple[Report, FaultProxy]], monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = S3Source.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "read_timeout_s", 0.3)
    stalled = range(HEADER + 1, HEADER + 1 + S3Source.concurrency)
    report, proxy = load(at(*stalled, fault=Fault("stall", 5000)))
    assert proxy.spoiled == S3Source.concurrency
    assert report.retries == S3Source.concurrency


def test_a_server_that_asks_for_less(load: Callable[..., tuple[Report, FaultProxy]]) -> None:
    """A burst of refusals is waited out, with fewer reads at once."""
    answer = b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%s" % (len(_SLOW_DOWN), _SLOW_DOWN)
    report, proxy = load(at(*range(HEADER + 3, HEADER + 10), fault=Fault(instead=answer)))
    assert proxy.spoiled == 7
    assert report.retries == 7
    assert report.concurrency < S3Source.concurrency


def test_a_bit_that_flips_is_found(bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = at(HEADER + 20, fault=Fault("flip", 10_000))
    with _proxied(bucket, plan, monkeypatch) as proxy:
        with pytest.raises(ChecksumError) as caught:
            streamload.load(f"{bucket.uri}/m", read_bytes=READ_BYTES)
        assert caught.value.object == NAME
        assert proxy.spoiled == 1
        _none_connected(proxy)


def test_the_object_is_overwritten(bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(number: int, head: bytes) -> Fault | None:
        if number == HEADER + 10:
            bucket.put(f"m/{NAME}", b"another one")
        return None

    with _proxied(bucket, plan, monkeypatch) as proxy:
        with pytest.raises(ObjectChangedError) as caught:
            streamload.load(f"{bucket.uri}/m", read_bytes=READ_BYTES)
        assert caught.value.object == NAME
        _none_connected(proxy)


def test_the_server_is_restarted(
    bucket: S3Bucket, load: Callable[..., tuple[Report, FaultProxy]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All connections end at once, and for a moment nobody listens."""
    proxies: list[FaultProxy] = []
    started = FaultProxy.start

    async def start(self: FaultProxy) -> None:
        proxies.append(self)
        await started(self)

    monkeypatch.setattr(FaultProxy, "start", start)

    async def restart() -> None:
        (proxy,) = set(proxies)
        await proxy.stop()
        await proxy.start()

    restarts: list[asyncio.Task[None]] = []

    def plan(number: int, head: bytes) -> Fault | None:
        if number == HEADER + 12:
            restarts.append(asyncio.get_running_loop().create_task(restart()))
        return None

    _, proxy = load(plan)
    assert len(restarts) == 1
    assert restarts[0].done()
    assert proxy.ranges > HEADER + 40


def test_a_server_that_never_answers_well_again(bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamload.pipeline.fetch.RetryPolicy", lambda: _QUICK)
    with _proxied(bucket, lambda number, _: Fault("reset") if number > 10 else None, monkeypatch) as proxy:
        with pytest.raises(SourceError) as caught:
            streamload.load(f"{bucket.uri}/m", read_bytes=READ_BYTES)
        assert caught.value.attempts == _QUICK.attempts
        assert (caught.value.end or 0) - (caught.value.start or 0) == READ_BYTES
        _none_connected(proxy)


_QUICK = RetryPolicy(first_backoff_s=0.001)
