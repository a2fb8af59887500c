"""load_into: what goes where, what is refused before anything is read, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save, save_file
from torch import nn

import streamload
from streamload.checksums import Checksum, PartChecksums
from streamload.errors import (
    AccessError,
    ChecksumError,
    MismatchError,
    ObjectChangedError,
    OptionError,
    PeerError,
    StreamloadError,
    TransientError,
    UnsupportedDtypeError,
)
from streamload.loan import Loan
from streamload.pipeline.engine import new_event_loop
from streamload.sources.base import Source, SourceObject
from streamload.sources.memory import MemorySource
from streamload.testing import FaultSource
from tests.checkpoints import freed, raw_checkpoint, same_tensor, varied_tensors, wrapped, write_sharded

Content = dict[str, bytes]
UNDEFINED = "the content of the tensors that were to be filled is now undefined"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves no thread of ours and no open file behind."""
    new_event_loop().close()  # libuv opens a pipe for the whole process with its first loop
    files = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("streamload"):
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} is left"
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Source], Source]:
    """Have loads read from this source, whatever the URI."""

    def serve(source: Source) -> Source:
        monkeypatch.setattr("streamload.planning.open_source", lambda uri, **_: source)
        return source

    return serve


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind with other content."""
    other = torch.empty(tensor.shape, dtype=tensor.dtype)
    if other.numel():
        other.view(-1).view(torch.uint8).fill_(0xA5)
    return other


def write(folder: Path, tensors: Mapping[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name)
    return folder


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose memory is nothing but the elements."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def check(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_tensor(plain(found[name]), tensor), name


# Into what.


@pytest.mark.parametrize("read_bytes", [4096, 100_000, 8 << 20])
def test_tensors_are_filled_in_place(tmp_path: Path, read_bytes: int) -> None:
    tensors = varied_tensors()
    write_sharded(tmp_path / "model", tensors)
    into = {name: poisoned(tensor) for name, tensor in tensors.items()}
    places = {name: tensor.data_ptr() for name, tensor in into.items()}
    report = streamload.load_into(into, tmp_path / "model", read_bytes=read_bytes)
    check(into, tensors)
    assert {name: tensor.data_ptr() for name, tensor in into.items()} == places
    assert (report.state, report.tensors, report.device) == ("done", len(tensors), "cpu")
    assert report.nbytes == report.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert report.peak_staged_bytes == 0, "something was staged that could be read into its place"


def test_tensors_that_are_not_contiguous_are_filled_in_place(tmp_path: Path) -> None:
    tensors = {f"{at}": torch.randn(33, 70, 2) for at in range(5)}
    write(tmp_path / "model", tensors)
    wide = torch.full((33, 70, 5), -1.0)
    into = {
        "0": torch.empty(2, 70, 33).permute(2, 1, 0),
        "1": wide[:, :, 1:3],
        "2": torch.empty(70, 33, 2).transpose(0, 1),
        "3": torch.empty(33, 70, 4)[:, :, ::2],
        "4": torch.empty(33, 70, 2),
    }
    report = streamload.load_into(into, tmp_path / "model", memory_bytes=1 << 20)
    check(into, tensors)
    assert bool((wide[:, :, 0] == -1).all())
    assert bool((wide[:, :, 3:] == -1).all())
    assert 0 < report.peak_staged_bytes <= 1 << 20


class Tied(nn.Module):
    """Parameters, buffers of both kinds, tied weights, and one that covers two others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.norm = nn.BatchNorm1d(8)
        self.lm_head = nn.Linear(8, 50, bias=False)
        self.lm_head.weight = self.embed.weight
        self.qkv = nn.Parameter(torch.zeros(24, 8), requires_grad=False)
        self.register_buffer("q", self.qkv[:8])
        self.register_buffer("inverse", torch.full((3,), 7.0), persistent=False)


TIED = {
    "embed.weight": torch.randn(50, 8),
    "qkv": torch.randn(24, 8),
    "norm.weight": torch.randn(8),
    "norm.bias": torch.randn(8),
    "norm.running_mean": torch.randn(8),
    "norm.running_var": torch.rand(8),
    "norm.num_batches_tracked": torch.tensor(12),
}


def check_tied(model: Tied) -> None:
    for name, tensor in TIED.items():
        assert same_tensor(model.state_dict()[name], tensor), name
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model.get_buffer("q"), TIED["qkv"][:8])
    assert model.get_buffer("inverse").tolist() == [7, 7, 7]
    assert model.embed.weight.requires_grad
    assert model.embed.weight.is_leaf


def test_of_a_module_what_covers_the_rest_is_loaded(tmp_path: Path) -> None:
    model = Tied()
    report = streamload.load_into(model, write(tmp_path / "model", TIED))
    check_tied(model)
    assert report.tensors == len(TIED)


@pytest.mark.parametrize(
    "names",
    [
        {"lm_head.weight": "embed.weight"},  # the other name of a tied weight
        {"lm_head.weight": "embed.weight", "embed.weight": "embed.weight"},  # both of them
        {"q": "q", "qkv": "qkv"},  # what is covered, too
    ],
)
def test_other_names_for_the_same_memory_are_accepted(tmp_path: Path, names: dict[str, str]) -> None:
    tensors = {name: tensor for name, tensor in TIED.items() if name not in names.values()}
    tensors |= {name: (TIED["qkv"][:8] if of == "q" else TIED[of]).clone() for name, of in names.items()}
    model = Tied()
    assert streamload.load_into(model, write(tmp_path / "model", tensors)).tensors == len(TIED)
    check_tied(model)


def test_what_covers_may_come_in_parts(tmp_path: Path) -> None:
    whole = torch.zeros(9, 4)
    into = {"fused": whole, "q": whole[:3], "kv": whole[3:]}
    parts = {"q": torch.randn(3, 4), "kv": torch.randn(6, 4)}
    streamload.load_into(into, write(tmp_path / "parts", parts))
    assert torch.equal(whole, torch.cat(tuple(parts.values())))
    with pytest.raises(MismatchError) as caught:
        streamload.load_into(into, write(tmp_path / "part", {"q": parts["q"]}))
    assert caught.value.missing == ("fused", "kv")


def test_empty_tensors_need_not_be_there(tmp_path: Path) -> None:
    into = {"none": torch.zeros(0, 3), "some": torch.zeros(2)}
    write(tmp_path / "without", {"some": torch.ones(2)})
    write(tmp_path / "with", {"some": torch.ones(2), "none": torch.zeros(0, 3)})
    for folder in ("without", "with"):
        into["some"].zero_()
        streamload.load_into(into, tmp_path / folder)
        assert into["some"].tolist() == [1, 1]


def test_inference_tensors_are_filled(tmp_path: Path) -> None:
    write(tmp_path / "model", {"weight": torch.ones(4, 3), "bias": torch.ones(4)})
    with torch.inference_mode():
        model = nn.Linear(3, 4)
        model.weight = nn.Parameter(torch.zeros(3, 4).T, requires_grad=False)
    streamload.load_into(model, tmp_path / "model")
    assert torch.equal(model.weight, torch.ones(4, 3))
    assert torch.equal(model.bias, torch.ones(4))


def test_a_trained_module_goes_on_training(tmp_path: Path) -> None:
    write(tmp_path / "model", {"weight": torch.ones(4, 3), "bias": torch.zeros(4)})
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    streamload.load_into(model, tmp_path / "model")
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, torch.full((4, 3), 0.5))


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (torch.zeros(3, device="meta"), "on the meta device"),
        (torch.zeros(1).expand(3), "is expanded"),
        (torch.zeros(3).to_sparse(), "is not a dense tensor"),
        (nn.UninitializedParameter(), "has no shape"),
        (wrapped(), "has no memory of its own"),
        (freed(), "has no memory of its own"),
    ],
)
def test_what_has_no_memory_to_fill_is_refused(tmp_path: Path, target: torch.Tensor, problem: str) -> None:
    with pytest.raises(OptionError, match=rf"'it' cannot be loaded into: .*{problem}"):
        streamload.load_into({"it": target}, write(tmp_path / "model", {"it": torch.ones(3)}))


@pytest.mark.parametrize("model", [[torch.zeros(3)], {"it": 3}, {3: torch.zeros(3)}, None])
def test_what_is_neither_a_module_nor_tensors_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(OptionError):
        streamload.load_into(model, tmp_path)


class Copying(nn.Linear):
    """Gives a copy away as its state."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()}


def test_a_state_that_is_a_copy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'weight', which is none of its parameters and buffers"):
        streamload.load_into(Copying(3, 4), tmp_path)


# What must fit; nothing is read where it does not.


def refuse(
    serve: Callable[[Source], Source], into: Mapping[str, torch.Tensor], content: bytes, **options: Any
) -> StreamloadError:
    """The error of a load that must be refused, before any byte of a tensor is read."""
    source = FaultSource(MemorySource({"model.safetensors": content}))
    serve(source)
    before = {name: tensor.clone() for name, tensor in into.items()}
    with pytest.raises(StreamloadError) as caught:
        streamload.load_into(into, "memory://", **options)
    check(into, before)
    # The listing, the header, and the checksum that is asked for at the same time.
    assert source.operations == 3
    assert UNDEFINED not in str(caught.value)
    assert caught.value.uri == "memory://"
    return caught.value


def test_missing_and_unexpected_names_are_listed(serve: Callable[[Source], Source]) -> None:
    into = {name: torch.zeros(2) for name in ("same", "gone", "lost")}
    content = save({"same": torch.ones(2), "new": torch.ones(2)})
    error = refuse(serve, into, content)
    assert isinstance(error, MismatchError)
    assert (error.missing, error.unexpected) == (("gone", "lost"), ("new",))
    assert error.cause == (
        "2 names ['gone', 'lost'] of the model missing from the checkpoint; 1 name ['new'] of the checkpoint not in "
        "the model (ignore_unexpected=True leaves such out)"
    )
    again = pickle.loads(pickle.dumps(error))
    assert (again.missing, str(again)) == (error.missing, str(error))
    error = refuse(serve, into, content, ignore_unexpected=True)
    assert isinstance(error, MismatchError)
    assert (error.missing, error.unexpected) == (("gone", "lost"), ())


def test_unexpected_names_can_be_left_out_and_are_not_read(tmp_path: Path) -> None:
    tensors = {"wanted": torch.ones(3), "other": torch.zeros(1 << 20)}
    into = {"wanted": torch.zeros(3)}
    report = streamload.load_into(into, write(tmp_path / "model", tensors), ignore_unexpected=True)
    assert into["wanted"].tolist() == [1, 1, 1]
    assert report.fetched_bytes - report.header_bytes == 12


def test_with_include_only_those_names_take_part(tmp_path: Path) -> None:
    into = {"a.x": torch.zeros(2), "a.y": torch.zeros(2), "b": torch.zeros(2)}
    write(tmp_path / "model", {name: torch.ones(2) for name in ("a.x", "a.y", "c")})
    streamload.load_into(into, tmp_path / "model", include=["a.*"], exclude=["*.y"])
    assert [tensor.tolist() for tensor in into.values()] == [[1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("target", "there", "problem"),
    [
        ((4, 3), (5, 3), r"of shape \[5, 3\] is larger than the one that it is to fill, of shape \[4, 3\]"),
        ((4, 3), (2, 4), r"of shape \[2, 4\] is larger"),
        ((4, 3), (12,), r"of shape \[12\] has not as many dimensions"),
        ((), (1,), "has not as many dimensions"),
        ((1,), (), "has not as many dimensions"),
    ],
)
def test_larger_and_other_shapes_are_errors(
    serve: Callable[[Source], Source], target: tuple[int, ...], there: tuple[int, ...], problem: str
) -> None:
    error = refuse(serve, {"it": torch.zeros(target)}, save({"it": torch.ones(there)}))
    assert isinstance(error, MismatchError)
    assert error.object == "model.safetensors"
    assert error.start is not None
    with pytest.raises(MismatchError, match=problem):
        raise error


@pytest.mark.parametrize("shape", [(2, 3), (4, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smaller_ones_go_into_the_narrowed_view_with_a_warning(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    padded, whole = torch.full((4, 3), -1.0), torch.zeros(2)
    tensors = {"padded": torch.randn(shape, dtype=dtype), "whole": torch.ones(2)}
    write(tmp_path / "model", tensors)
    with pytest.warns(UserWarning, match=rf"'padded' \[{shape[0]}, {shape[1]}\] in \[4, 3\]$") as caught:
        streamload.load_into({"padded": padded, "whole": whole}, tmp_path / "model", cast=dtype == torch.float64)
    assert caught[0].filename == __file__
    expected = torch.full((4, 3), -1.0)
    expected[: shape[0], : shape[1]] = tensors["padded"]
    assert torch.equal(padded, expected)
    assert whole.tolist() == [1, 1]


def test_other_dtypes_are_errors_unless_they_are_to_be_cast(serve: Callable[[Source], Source]) -> None:
    content = save({"it": torch.randn(300, 300)})
    into = {"it": torch.zeros(300, 300, dtype=torch.bfloat16)}
    error = refuse(serve, into, content)
    assert isinstance(error, MismatchError)
    assert error.cause == "tensor 'it' is F32, but is to fill torch.bfloat16: cast=True converts it"
    serve(MemorySource({"model.safetensors": content}))
    report = streamload.load_into(into, "memory://", cast=True)
    assert torch.equal(into["it"], load_bytes(content)["it"].to(torch.bfloat16))
    assert report.nbytes == report.total_bytes


def test_what_torch_does_not_convert_is_refused_in_time(serve: Callable[[Source], Source]) -> None:
    into = {"it": torch.zeros(4, 4)}
    error = refuse(serve, into, raw_checkpoint({"it": ("F4", (4, 8))}), cast=True)
    assert "which torch does not convert to torch.float32" in error.cause
    error = refuse(serve, into, raw_checkpoint({"it": ("F6_E2M3", (4, 4))}), cast=True)
    assert isinstance(error, UnsupportedDtypeError)


@pytest.mark.parametrize(
    "options", [{"device": "cpu"}, {"cast": 1}, {"ignore_unexpected": None}, {"rank": 4, "world_size": 4}]
)
def test_options_without_meaning_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        streamload.load_into({"it": torch.zeros(1)}, write(tmp_path / "model", {"it": torch.ones(1)}), **options)


def test_the_environments_device_is_not_meant_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMLOAD_DEVICE", "cuda:7")
    into = {"it": torch.zeros(1)}
    streamload.load_into(into, write(tmp_path / "model", {"it": torch.ones(1)}))
    assert into["it"].tolist() == [1]


# How it is called.


def test_from_a_running_loop_and_from_a_thread(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {"it": torch.ones(3)})

    async def notebook() -> torch.Tensor:
        into = {"it": torch.zeros(3)}
        streamload.load_into(into, folder)
        other = {"it": torch.zeros(3)}
        await asyncio.to_thread(streamload.load_into, other, folder)
        return into["it"] + other["it"]

    assert asyncio.run(notebook()).tolist() == [2, 2, 2]


# What a failure leaves behind.

TENSORS = {**varied_tensors(large_bytes=1 << 19), "last": torch.randn(100, 100)}
CONTENT: Content = {
    f"model-{at}.safetensors": save({name: TENSORS[name] for name in sorted(TENSORS)[at::2]}) for at in range(2)
}
SMALL: dict[str, Any] = {"read_bytes": 30_000, "concurrency": 3}
# For the only rank of a world, which has others to listen to and yet loads an ordinary checkpoint whole.
EVERYWHERE = {"*": streamload.Replicate()}


def targets() -> dict[str, torch.Tensor]:
    """Half of them can be read into, and half not."""
    into = {}
    for at, (name, tensor) in enumerate(TENSORS.items()):
        into[name] = poisoned(tensor) if at % 2 else torch.empty((*tensor.shape, 2), dtype=tensor.dtype)[..., 0]
    return into


def operations_of_a_load() -> int:
    source = FaultSource(MemorySource(CONTENT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamload.planning.open_source", lambda uri, **_: source)
        into = targets()
        streamload.load_into(into, "memory://", **SMALL)
    check(into, TENSORS)
    return source.operations


OPERATIONS = operations_of_a_load()
# Two headers and their checksums, and the listing.
BEFORE_READING = 5


def bits(into: Mapping[str, torch.Tensor]) -> list[bytes]:
    return [plain(tensor).reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in into.values()]


@pytest.mark.parametrize("k", range(1, OPERATIONS + 1))
def test_the_first_error_at_any_operation_ends_it_and_says_what_is_left(
    k: int, serve: Callable[[Source], Source]
) -> None:
    source = FaultSource(MemorySource(CONTENT), fail_at=k, error=lambda: ObjectChangedError("replaced"))
    serve(source)
    into = targets()
    with pytest.raises(ObjectChangedError) as caught:
        streamload.load_into(into, "memory://", **SMALL)
    assert source.closed
    assert source.running == 0
    # Before anything is read nothing is lost; after it, the error says so.
    assert (UNDEFINED in str(caught.value)) is (k > BEFORE_READING)


class FakePeers:
    """Another rank, which fails when this rank's source waits."""

    def __init__(self, source: FaultSource) -> None:
        self._source = source
        self.told: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def when_failed(self, call: Callable[[PeerError], None]) -> None:
        def fail() -> None:
            self._source.blocked.result(timeout=60)
            call(PeerError("rank 1 failed: it happens", rank=1))

        self.threads.append(threading.Thread(target=fail))
        self.threads[-1].start()

    def finish(self, timeout_s: float | None, *, versions: Mapping[str, str]) -> None:
        raise AssertionError("the load must not succeed")

    def failed(self, error: BaseException) -> None:
        self.told.append(error)

    def close(self) -> None:
        for thread in self.threads:
            thread.join()


@pytest.mark.parametrize("k", range(1, OPERATIONS + 1))
def test_ended_by_another_rank_at_any_operation_nothing_writes_any_more(
    k: int, serve: Callable[[Source], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FaultSource(MemorySource(CONTENT), fail_at=k, times=None, block=True)
    serve(source)
    peers = FakePeers(source)
    monkeypatch.setattr("streamload.filling.join_peers", lambda: peers)
    into = targets()
    with pytest.raises(PeerError, match="rank 1 failed: it happens") as caught:
        streamload.load_into(into, "memory://", rank=0, world_size=1, placements=EVERYWHERE, **SMALL)
    after = bits(into)
    source.release()
    assert peers.told == [caught.value]
    assert caught.value.uri == "memory://"
    assert (UNDEFINED in str(caught.value)) is (k > BEFORE_READING)
    assert source.closed
    assert source.running == 0
    assert bits(into) == after


def test_where_another_rank_fails_at_the_end_the_content_does_not_count(
    serve: Callable[[Source], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(FakePeers):
        def finish(self, timeout_s: float | None, *, versions: Mapping[str, str]) -> None:
            assert timeout_s is not None
            assert 0 < timeout_s < 1000
            raise PeerError("rank 1 failed: late")

    source = FaultSource(MemorySource(CONTENT))
    source.blocked.set_result(None)
    serve(source)
    peers = Late(source)
    monkeypatch.setattr(peers, "when_failed", lambda call: None)
    monkeypatch.setattr("streamload.filling.join_peers", lambda: peers)
    with pytest.raises(PeerError, match=f"rank 1 failed: late; {UNDEFINED}") as caught:
        streamload.load_into(
            targets(), "memory://", rank=0, world_size=1, placements=EVERYWHERE, deadline_s=1000, **SMALL
        )
    assert peers.told == [caught.value]


def test_an_operation_that_fails_once_is_made_again(serve: Callable[[Source], Source]) -> None:
    serve(FaultSource(MemorySource(CONTENT), fail_at=BEFORE_READING + 4, let_through_bytes=1000))
    into = targets()
    assert streamload.load_into(into, "memory://", **SMALL).retries == 1
    check(into, TENSORS)


class Flipped(MemorySource):
    """Flips one bit of one object's last byte on its way."""

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        await super().read(object, start, end, loan)
        if object.key.startswith("model-1") and end == object.size_bytes:
            loan.views[-1][-1] ^= 4


def test_it_returns_only_what_was_compared_with_its_checksum(serve: Callable[[Source], Source]) -> None:
    serve(MemorySource(CONTENT))
    report = streamload.load_into(targets(), "memory://", **SMALL)
    assert report.verified == {"CRC64NVME of the whole object": report.total_bytes}
    serve(Flipped(CONTENT))
    with pytest.raises(ChecksumError, match=UNDEFINED):
        streamload.load_into(targets(), "memory://", **SMALL)


class Hanging(MemorySource):
    """One read never lets go of its memory."""

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if end == object.size_bytes:
            loan.quarantine()
            raise TransientError("the kernel holds it")
        await super().read(object, start, end, loan)


def test_a_read_that_hangs_is_said_to(serve: Callable[[Source], Source]) -> None:
    serve(Hanging(CONTENT))
    with pytest.raises(TransientError, match=f"{UNDEFINED}, and a read that hangs may still write into them"):
        streamload.load_into(targets(), "memory://", **SMALL)


class Secretive(MemorySource):
    """Does not tell its checksums."""

    async def checksum(self, object: SourceObject) -> Checksum | PartChecksums | None:
        raise AccessError("not for you")


def test_a_refused_checksum_does_not_end_it(serve: Callable[[Source], Source]) -> None:
    serve(Secretive(CONTENT))
    into = targets()
    report = streamload.load_into(into, "memory://", **SMALL)
    check(into, TENSORS)
    assert report.unverified == {"its checksum could not be had: not for you": report.total_bytes}
