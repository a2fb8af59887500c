"""Which tensors share memory, and which of them covers the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

__all__ = ["Extent", "Memory", "covering", "extent", "has_memory"]

Extent: TypeAlias = "tuple[torch.device, int, int]"


def extent(tensor: torch.Tensor) -> Extent:
    """Where a tensor lies: its device, the address of its first byte, and that behind its last one."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return tensor.device, start, start + tensor.nbytes
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.device, start, start + (last + 1) * tensor.element_size()


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a dense tensor's elements lie anywhere.

    Those of one that only wraps others do not, nor of one whose storage was given back meanwhile, as FSDP does it.
    """
    if not tensor.numel():
        return True
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.data_ptr() != 0 and needed <= tensor.untyped_storage().nbytes()


def covering(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out every tensor whose memory another one covers, and every empty one.

    Only a contiguous tensor covers others. Of tensors with the very same memory the contiguous one stays, and of
    several such the one with the first name. Those that overlap without one covering the other all stay.

    The rule is that of vLLM's ``ShardedStateLoader``: what it saves of a model is what stays here.

    Args:
        tensors: By name.

    Returns:
        What stays, in the order of `tensors`.
    """
    by_device: dict[torch.device, list[tuple[int, int, bool, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            device, start, end = extent(tensor)
            by_device[device].append((start, -end, not tensor.is_contiguous(), name))
    kept: set[str] = set()
    for places in by_device.values():
        # Whatever can cover a tensor comes before it; of those, the one that reaches furthest covers it if any does.
        reached = 0
        places.sort()
        for _, negative_end, scattered, name in places:
            if -negative_end > reached:
                kept.add(name)
                if not scattered:
                    reached = -negative_end
    return {name: tensor for name, tensor in tensors.items() if name in kept}


class Memory:
    """The memory that some tensors fill.

    Args:
        tensors: Those that are filled.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        spans: dict[torch.device, list[tuple[int, int]]] = defaultdict(list)
        self._geometries: set[object] = set()
        for tensor in tensors:
            self._geometries.add(_geometry(tensor))
            device, start, end = extent(tensor)
            # What has holes fills nothing but itself.
            if end - start == tensor.numel() * tensor.element_size():
                spans[device].append((start, end))
        self._spans = {device: _joined(found) for device, found in spans.items()}

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether all of a tensor's memory is filled."""
        if not tensor.numel() or _geometry(tensor) in self._geometries:
            return True
        device, start, end = extent(tensor)
        return any(low <= start and end <= high for low, high in self._spans.get(device, ()))


def _geometry(tensor: torch.Tensor) -> object:
    return tensor.device, tensor.data_ptr(), tensor.element_size(), tensor.shape, tensor.stride()


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
