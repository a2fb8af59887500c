"""A mode of torch's dispatcher that sees every operation and knows which of its tensors are in the model's memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streamload.recording.memory import Memory

__all__ = ["CONSTANTS", "SHAPES", "Watcher", "storage_key", "tensors_in"]

_aten = torch.ops.aten

# They ask for a tensor's shape only.
SHAPES = {
    *(_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default),
    *(_aten.new_empty.default, _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default),
    *(_aten.new_empty_strided.default, _aten.sym_size.default, _aten.sym_stride.default, _aten.sym_numel.default),
}

# They write what depends on no tensor of the checkpoint's.
CONSTANTS = {_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default}


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, and knows which of its tensors are in the model's memory."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by torch: to skip it, torch would import it, which takes a second."""
        return False

    def __init__(self, memories: dict[int, Memory]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memories = memories
        self._mutated: dict[Any, tuple[int | str, ...]] = {}
        self._views: set[Any] = set()
        self._composites: set[Any] = set()

    def written(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors that an operation writes into."""
        if func not in self._mutated:
            self._look_at(func)
        places = self._mutated[func]
        if not places:
            return []
        values = (args[place] if isinstance(place, int) and place < len(args) else None for place in places)
        named = [kwargs[place] for place in places if isinstance(place, str) and place in kwargs]
        return list(tensors_in([*values, *named]))

    def is_view(self, func: Any) -> bool:
        if func not in self._mutated:
            self._look_at(func)
        return func in self._views

    def is_composite(self, func: Any) -> bool:
        """Whether it is made of other operations.

        As a rule these are what the dispatcher shows, but not where autograd has no part: in inference mode.
        """
        if func not in self._mutated:
            self._look_at(func)
        return func in self._composites

    def _look_at(self, func: Any) -> None:
        places: list[int | str] = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                places += [place, argument.name]
        self._mutated[func] = tuple(places)
        if not places and any(result.alias_info is not None for result in func._schema.returns):
            self._views.add(func)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            self._composites.add(func)

    def memory(self, tensor: torch.Tensor) -> Memory | None:
        return self.memories.get(storage_key(tensor))


def storage_key(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # it has none: a sparse one
        return 0


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
