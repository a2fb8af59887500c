"""Tensors that share memory: which of them stand for the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = ["without_shared_memory"]


class _Span(NamedTuple):
    """A tensor's bytes in memory; sorted, whatever covers another one comes before it."""

    start: int
    minus_end: int
    strided: bool  # not contiguous: it does not own all of these bytes, and covers nothing
    name: str


def without_shared_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out tensors whose memory is a part of another one's, as vLLM's sharded_state does.

    Of tensors that share their storage, one is left out where a contiguous one covers all of its bytes; of several with
    the very same bytes, the first name of all stays. Tensors that overlap and do not cover each other both stay.
    Tensors without elements are left out: sharded_state knows none.

    Args:
        tensors: By name.

    Returns:
        Those that stay, in the same order.
    """
    groups: dict[tuple[torch.device, int], list[_Span]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            storage = (tensor.device, tensor.untyped_storage().data_ptr())
            groups.setdefault(storage, []).append(_span(name, tensor))
    kept: set[str] = set()
    for spans in groups.values():
        covered_to = 0
        for span in sorted(spans):
            if -span.minus_end > covered_to:
                kept.add(span.name)
            if not span.strided:
                covered_to = max(covered_to, -span.minus_end)
    return {name: tensor for name, tensor in tensors.items() if name in kept}


def _span(name: str, tensor: torch.Tensor) -> _Span:
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = start + (last + 1) * tensor.element_size()
    return _Span(start, -end, not tensor.is_contiguous(), name)
