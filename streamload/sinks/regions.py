"""Into parts of tensors that are there already, as copies say that were recorded; and whole tensors, handed out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from streamload.checkpoint import TensorInfo
from streamload.plan.copies import Arrangement, Axis, Copy, Staged, arrange
from streamload.sinks.dtypes import torch_dtypes, torch_shape
from streamload.sinks.targets import Target, copy_into, memory_at, readable, staged_tensor

if TYPE_CHECKING:
    import torch

__all__ = ["Handed", "RegionCopy", "region_target"]

# Smaller tensors are copied out of memory that they share with others, which would live as long as they do.
_SHARED_BYTES = 64 << 10


class RegionCopy(NamedTuple):
    """What one copy took out of a tensor, and where it wrote it.

    Attributes:
        start: The first element's place in the tensor, in bytes.
        dtype: What the bytes were taken for.
        converted: The dtypes that the elements went through on their way, the target's own left out.
        axes: The dimensions, in bytes.
        target: The memory that was written, dense or not; its first element is the first one.
    """

    start: int
    dtype: torch.dtype
    converted: tuple[torch.dtype, ...]
    axes: tuple[Axis, ...]
    target: torch.Tensor


def region_target(tensor: TensorInfo, copies: Sequence[RegionCopy]) -> tuple[TensorInfo, Target]:
    """What is to be read of a tensor for some copies, and where it goes.

    Args:
        tensor: All of it.
        copies: At least one.
    """
    arranged = arrange(tensor, [_plain(copy) for copy in copies])
    if arranged.low is None:
        return arranged.part, _Staged(copies, arranged.staged)
    return arranged.part, _Direct(copies, arranged)


def _plain(copy: RegionCopy) -> Copy:
    target = copy.target
    return Copy(
        start=copy.start,
        itemsize=copy.dtype.itemsize,
        axes=copy.axes,
        direct=not copy.converted and readable(target, copy.dtype),
        block=target.untyped_storage().data_ptr(),
        target=int(target.storage_offset()) * target.element_size(),
    )


class _Direct(Target):
    """Parts of one tensor's memory, which the file is read into."""

    direct = True

    def __init__(self, copies: Sequence[RegionCopy], arranged: Arrangement) -> None:
        assert arranged.low is not None
        self._targets = tuple(copy.target for copy in copies)
        self._address = self._targets[0].untyped_storage().data_ptr() + arranged.low
        self._nbytes = arranged.span

    def memory(self) -> memoryview:
        return memory_at(self._address, self._nbytes)

    def fill(self, tensor: TensorInfo, region: memoryview, start: int) -> torch.Tensor:
        raise AssertionError("what is read into its place is not staged")

    @property
    def filled(self) -> tuple[torch.Tensor, ...]:
        return self._targets


class _Staged(Target):
    """Parts of tensors, into which elements are copied as the model's loader would have done it."""

    direct = False

    def __init__(self, copies: Sequence[RegionCopy], places: Sequence[Staged]) -> None:
        self._copies = copies
        self._places = places

    def memory(self) -> memoryview:
        raise AssertionError("what is staged is not read into its place")

    def fill(self, tensor: TensorInfo, region: memoryview, start: int) -> torch.Tensor:
        for copy, place in zip(self._copies, self._places, strict=True):
            itemsize, size = copy.dtype.itemsize, copy.target.element_size()
            nbytes = (tensor.nbytes - place.start) // itemsize * itemsize
            elements = staged_tensor(region, start + place.start, nbytes, copy.dtype).as_strided(
                [axis.size for axis in place.axes], [axis.source // itemsize for axis in place.axes]
            )
            for dtype in copy.converted:
                elements = elements.to(dtype)
            into = copy.target.as_strided(
                elements.shape, [axis.target // size for axis in place.axes], copy.target.storage_offset()
            )
            copy_into(into, elements, tensor.name)
        return staged_tensor(region, start, tensor.nbytes, _bytes())

    @property
    def filled(self) -> tuple[torch.Tensor, ...]:
        return tuple(copy.target for copy in self._copies)


class Handed(Target):
    """A whole tensor, which fills nothing but is handed out: the consumer's own."""

    direct = False

    def memory(self) -> memoryview:
        raise AssertionError("what is staged is not read into its place")

    def fill(self, tensor: TensorInfo, region: memoryview, start: int) -> torch.Tensor:
        found = staged_tensor(region, start, tensor.nbytes, torch_dtypes()[tensor.dtype]).view(torch_shape(tensor))
        return found.clone() if tensor.nbytes < _SHARED_BYTES else found

    @property
    def filled(self) -> tuple[torch.Tensor, ...]:
        return ()


def _bytes() -> torch.dtype:
    import torch

    return torch.uint8
