"""What a model was like before its loading code was run, to tell what that has changed, and to undo it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from streamload.recording.memory import Memory
from streamload.shared_memory import has_memory

__all__ = ["ModelState"]

_CONTAINERS = (dict, list, set)


class ModelState:
    """What a model was like before its loading code was run.

    Attributes:
        problem: Why it cannot be recorded at all, if it cannot.
        storages: The model's storages, by their address in torch.
        owners: The modules whose parameters or buffers lie in each of them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.problem: str | None = None
        self._modules = {module: _Attributes(module) for module in model.modules()}
        self._tensors: dict[torch.Tensor, tuple[torch.Tensor, _Attributes]] = {}
        self.owners: dict[int, set[torch.nn.Module]] = defaultdict(set)
        self.storages: dict[int, torch.UntypedStorage] = {}
        for module in self._modules:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                if torch.nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_quantized:
                    self.problem = f"{name!r} of a {type(module).__name__} is no dense tensor yet"
                elif tensor.is_meta:
                    self.problem = f"{name!r} of a {type(module).__name__} is on the meta device"
                elif hasattr(tensor, "to_local") or not has_memory(tensor):
                    self.problem = f"{name!r} of a {type(module).__name__} has no memory of its own"
                else:
                    alias = tensor.detach()
                    self._tensors[tensor] = alias, _Attributes(tensor)
                    storage = alias.untyped_storage()
                    self.storages[storage._cdata] = storage
                    self.owners[storage._cdata].add(module)
            if self.problem is not None:
                break

    def memories(self) -> dict[int, Memory]:
        """The model's storages, in which nothing was written yet."""
        return {key: Memory(storage) for key, storage in self.storages.items()}

    def tensors(self) -> Iterator[torch.Tensor]:
        """The parameters and buffers that the modules have now."""
        for module in self._modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    yield tensor

    def replaced(self) -> set[torch.nn.Module]:
        """The modules that have other parameters than before, or parameters with other memory."""
        found = set()
        for module, attributes in self._modules.items():
            for kind in ("_parameters", "_buffers"):
                saved = attributes.items(kind)
                now = getattr(module, kind)
                if (
                    now.keys() != saved.keys()
                    or any(now[name] is not saved[name] for name in now)
                    or any(tensor is not None and self._moved(tensor) for tensor in now.values())
                ):
                    found.add(module)
        return found

    def restore(self) -> None:
        """Undo what was changed about the modules and their parameters."""
        for module, attributes in self._modules.items():
            attributes.restore()
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    alias, own = self._tensors[tensor]
                    own.restore()
                    if self._moved(tensor):
                        tensor.data = alias

    def _moved(self, tensor: torch.Tensor) -> bool:
        alias, _ = self._tensors[tensor]
        looks = [(each.is_meta, each.dtype, each.shape, each.stride()) for each in (tensor, alias)]
        return looks[0] != looks[1] or tensor.data_ptr() != alias.data_ptr()


class _Attributes:
    """The attributes of an object, and what is in the lists, dicts and sets among them."""

    __slots__ = ("_content", "_object", "_values")

    def __init__(self, thing: object) -> None:
        self._object = thing
        self._values = dict(vars(thing))
        self._content: list[tuple[Any, Any]] = [
            # A plain one of each kind: there are those whose kind is made of other arguments.
            (value, kind(value))
            for value in self._values.values()
            for kind in _CONTAINERS
            if isinstance(value, kind)
        ]

    def items(self, name: str) -> dict[str, Any]:
        """What was in a dict among them."""
        return next(content for value, content in self._content if value is self._values[name])

    def restore(self) -> None:
        """Set all of them back."""
        now = vars(self._object)
        if now.keys() != self._values.keys() or any(now[name] is not value for name, value in self._values.items()):
            now.clear()
            now.update(self._values)
        for value, content in self._content:
            if isinstance(value, list):
                value[:] = content
            elif value != content if isinstance(value, set) else not _same(value, content):
                value.clear()
                value.update(content)


def _same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(value is other[key] for key, value in one.items())
