"""One run of a model's loading code on stand-ins."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from streamload.checkpoint import TensorInfo
from streamload.plan.copies import Axis, Layout, compose, nested
from streamload.recording.content import Content
from streamload.recording.memory import Memory, Write
from streamload.recording.state import ModelState
from streamload.recording.watcher import CONSTANTS, SHAPES, Watcher, storage_key, tensors_in
from streamload.sinks.dtypes import torch_dtypes, torch_shape
from streamload.sinks.regions import RegionCopy

if TYPE_CHECKING:
    from streamload.slicing import LoadWeights

__all__ = ["Recorder"]

_aten = torch.ops.aten

_COPIES = {_aten.clone.default, _aten._to_copy.default}
_NOWHERE = Layout(0, (), ())


class _NotRecordable(Exception):
    """The loading code cannot go on without a tensor's values."""


@dataclass(frozen=True, slots=True)
class _StandIn:
    """A storage without memory that stands for one that holds a tensor's values.

    Attributes:
        weak: The storage; with this, its address belongs to no other one.
        names: Whose values.
        origin: Of a copy: what it was copied from.
        base: How the copy lies in this storage.
        layout: How what it was copied from lies in its own.
        source_dtype: What that was taken for.
        dtype: The copy's.
        known: Whether its values are those of a tensor, or of parts of it.
    """

    weak: StorageWeakRef
    names: frozenset[str]
    known: bool = True
    origin: _StandIn | None = None
    base: Layout = _NOWHERE
    layout: Layout = _NOWHERE
    source_dtype: torch.dtype = torch.uint8
    dtype: torch.dtype = torch.uint8

    @property
    def alive(self) -> bool:
        """Whether anybody still has it."""
        return not self.weak.expired()  # type: ignore[no-untyped-call]


class Recorder(Watcher):  # type: ignore[no-untyped-call]
    """One run of the loading code on stand-ins.

    Attributes:
        blamed: The name that was at hand when the run could not go on.
        hopeless: Whether another run without that name would not do.
        loaded: What the code returned.
        constants: The constants that were written into the model's memory, and where.
    """

    def __init__(self, state: ModelState) -> None:
        super().__init__(state.memories())
        self.blamed: str | None = None
        self.hopeless = False
        self.loaded: Any = None
        self.constants: list[tuple[torch.Tensor, object]] = []
        self._state = state
        self._modules_left: set[torch.nn.Module] = set()
        self._filled: set[int] = set()
        self._before = Content(state.memories())
        self._stand_ins: dict[int, _StandIn] = {}
        self._problem: str | None = None
        # The name that was given last, and whatever name was at hand last.
        self._given: str | None = None
        self._current: str | None = None
        self._whole: dict[str, str] = {}

    def run(self, tensors: Sequence[TensorInfo], load_weights: LoadWeights) -> str | None:
        """Run it.

        Returns:
            Why it did not come to its end, if it did not.
        """
        try:
            with self:
                self.loaded = load_weights(self._give(tensors))
        except Exception as error:
            if self._problem is None:
                self._problem, self.blamed = f"{type(error).__name__}: {error}".strip().splitlines()[0], self._current
        return self._problem  # which the code may have caught

    def _give(self, tensors: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in tensors:
            self._current = self._given = tensor.name
            given = self._given_for(tensor)
            yield tensor.name, given
            # Whoever has it from here on keeps it.
            del given

    def _given_for(self, tensor: TensorInfo) -> torch.Tensor:
        """What the code is given for a tensor."""
        stand_in = torch.empty(torch_shape(tensor), dtype=torch_dtypes()[tensor.dtype], device="meta")
        self._register(stand_in, frozenset((tensor.name,)))
        return stand_in

    def kept(self) -> set[str]:
        """The names whose stand-ins somebody still has."""
        if any(found.alive for found in self._stand_ins.values()):
            gc.collect()
        return {name for found in self._stand_ins.values() if found.alive for name in found.names}

    def result(self) -> tuple[dict[str, list[RegionCopy]], dict[str, str]]:
        """The copies of what could be recorded, and why the other names could not."""
        for module in self._state.replaced():
            self._leave(module, f"the parameters of a {type(module).__name__} were replaced")
        self._close()
        copies: dict[str, list[RegionCopy]] = defaultdict(list)
        for key, memory in self.memories.items():
            for write in memory.writes:
                if memory.problem is None:
                    assert write.copy is not None
                    copies[write.name].append(write.copy)
                    self._filled.add(key)
        return dict(copies), self._whole

    def fills(self, tensor: torch.Tensor) -> bool:
        """Whether recorded copies fill something of a tensor; known with the result."""
        return self.fills_memory(tensor) and self.memories[storage_key(tensor)].touched(tensor)

    def fills_memory(self, tensor: torch.Tensor) -> bool:
        """Whether they fill something of the memory that it lies in."""
        return storage_key(tensor) in self._filled

    def undo(self) -> None:
        """Undo what was changed about the model, and what was written into memory that recorded copies do not fill."""
        self._before.restore(unless=self.fills_memory)
        self._state.restore()

    def settle(self) -> None:
        """Let go of what could be undone."""
        self._before.clear()

    def _close(self) -> None:
        """What shares a module with what is not recordable is not recordable either."""
        into: dict[str, list[Memory]] = defaultdict(list)
        for memory in self.memories.values():
            for name in memory.names:
                into[name].append(memory)
        left = list(self._whole)
        owners = {id(memory): self._state.owners[key] for key, memory in self.memories.items()}
        failed = [memory for memory in self.memories.values() if memory.problem is not None]
        while left or failed:
            while left:
                name = left.pop()
                for memory in into.pop(name, ()):
                    if memory.problem is None:
                        memory.fail(self._whole[name])
                        failed.append(memory)
            while failed:
                memory = failed.pop()
                assert memory.problem is not None
                for name in memory.names:
                    if name not in self._whole:
                        self._whole[name] = memory.problem
                        left.append(name)
                for module in owners[id(memory)]:
                    if module not in self._modules_left:
                        failed += self._leave(module, memory.problem)

    def _leave(self, module: torch.nn.Module, problem: str) -> list[Memory]:
        self._modules_left.add(module)
        found = []
        for key, memory in self.memories.items():
            if memory.problem is None and module in self._state.owners[key]:
                memory.fail(problem)
                found.append(memory)
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in((*args, *kwargs.values())))
        stand_ins = [found for tensor in tensors if (found := self._stand_ins.get(storage_key(tensor))) is not None]
        if stand_ins and len(stand_ins[-1].names) == 1:
            (self._current,) = stand_ins[-1].names
        if func is _aten.copy_.default:
            return self._copy(*args[:2])
        if func in SHAPES:
            return self._registered(func(*args, **kwargs))
        if self.is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if self.is_view(func):
            return func(*args, **kwargs)
        if not stand_ins:
            return self._without(func, args, kwargs, tensors)
        if func in _COPIES:
            return self._copied(func, args[0], stand_ins[0], kwargs)
        return self._unknown(func, args, kwargs, stand_ins)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        found = self._stand_ins.get(storage_key(source))
        origin, memory = self.memory(source), self.memory(target)
        if found is None:
            if (origin is not None and origin.touched(source)) or (memory is not None and memory.touched(target)):
                raise self._give_up("copy_")
            if storage_key(target) in self._stand_ins:
                self._taint(target, self._stand_ins[storage_key(target)].names, "it is written into")
            elif memory is not None and origin is not None:
                raise self._stop("the model's memory is copied within itself")
            else:
                self._before.keep(target)
                target.copy_(source)
            return target
        source = source.expand(target.shape)  # an error where torch would not copy it
        if not target.numel():
            return target
        copy = self._trace(target, source, found) if memory is not None else None
        if copy is None:
            problem = "it is not copied element by element into a parameter"
            self._fail(found.names, problem)
            self._taint(target, found.names, problem)
        else:
            assert memory is not None
            (name,) = found.names
            memory.add(Write(target, name, copy), self._with_given(found.names))
        return target

    def _trace(self, target: torch.Tensor, source: torch.Tensor, found: _StandIn) -> RegionCopy | None:
        """What a copy takes out of a tensor; None where that is not known, or it is no plain copy."""
        plain = not any(tensor.is_conj() or tensor.is_neg() for tensor in (target, source))
        if not found.known or not plain or not nested(target.shape, target.stride()):
            return None
        item = target.element_size()
        axes = [
            Axis(size, stride, into * item)
            for size, stride, into in zip(source.shape, source.stride(), target.stride(), strict=True)
            if size > 1
        ]
        start, dtype, converted = int(source.storage_offset()), source.dtype, list[torch.dtype]()
        while found.origin is not None:
            # Other bits of the same size, in a copy that converts nothing, are other bits of the original.
            if dtype != found.dtype and (dtype.itemsize != found.dtype.itemsize or found.dtype != found.source_dtype):
                return None
            composed = compose(start, axes, found.base, found.layout)
            if composed is None:
                return None
            start, axes = composed
            if found.dtype != found.source_dtype:
                converted.insert(0, dtype)
                dtype = found.source_dtype
            found = found.origin
        if not nested([axis.size for axis in axes], [axis.source for axis in axes]):
            return None
        item = dtype.itemsize
        places = tuple(axis._replace(source=axis.source * item) for axis in axes)
        return RegionCopy(start * item, dtype, tuple(converted), places, target.detach())

    def _copied(self, func: Any, source: torch.Tensor, found: _StandIn, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """A copy of a stand-in: another one."""
        kept = {name: value for name, value in kwargs.items() if name in ("dtype", "memory_format")}
        made: torch.Tensor = func(source, **kept)
        if not found.known or source.is_conj() or source.is_neg():
            self._register(made, found.names, known=False)
            return made
        self._register(
            made,
            found.names,
            origin=found,
            base=Layout(int(made.storage_offset()), tuple(made.shape), made.stride()),
            layout=Layout(int(source.storage_offset()), tuple(source.shape), source.stride()),
            source_dtype=source.dtype,
            dtype=made.dtype,
        )
        return made

    def _unknown(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], stand_ins: list[_StandIn]) -> Any:
        """An operation on stand-ins whose result nobody knows."""
        written = self.written(func, args, kwargs)
        names = frozenset[str]().union(*(found.names for found in stand_ins))
        problem = f"{func} is done with it"
        if not written:
            try:
                made = func(*_shapes(args), **{name: _shapes(value) for name, value in kwargs.items()})
            except Exception as error:
                raise self._stop(f"{problem}: {type(error).__name__}") from error
            results = list(tensors_in([made]))
            if not results:
                raise self._stop(problem)
            new = [tensor for tensor in results if storage_key(tensor) not in self._stand_ins]
            if new:
                self._fail(names, problem)
            for tensor in new:
                self._register(tensor, names, known=False)
            return made
        self._fail(names, problem)
        for tensor in written:
            self._taint(tensor, names, problem)
        return written[0] if len(func._schema.returns) == 1 else tuple(written)

    def _without(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[torch.Tensor]) -> Any:
        """An operation without stand-ins."""
        if any((memory := self.memory(tensor)) is not None and memory.touched(tensor) for tensor in tensors):
            raise self._give_up(func)
        written = self.written(func, args, kwargs)
        if any(self.memory(tensor) for tensor in written):
            if func not in CONSTANTS:
                raise self._stop(f"{func} changes the model's memory")
            self._note_constant(args)
            self._before.keep(args[0])
        return self._registered(func(*args, **kwargs))

    def _registered(self, made: Any) -> Any:
        """What an operation makes without memory has no values either, though none of a stand-in's."""
        for tensor in tensors_in([made]):
            if tensor.is_meta and storage_key(tensor) not in self._stand_ins:
                self._register(tensor, frozenset(self._with_given(())), known=False)
        return made

    def _note_constant(self, args: Sequence[Any]) -> None:
        target, value = args[0], args[1] if len(args) > 1 else 0
        region = Write(target)
        # By repr, a NaN is the same as another one.
        value = repr(value.item() if isinstance(value, torch.Tensor) else value)
        self.constants.append((target.detach(), (storage_key(target), region.start, region.axes, target.dtype, value)))

    def _taint(self, target: torch.Tensor, names: Iterable[str], problem: str) -> None:
        """What is written depends on values that are not known."""
        memory = self.memory(target)
        if memory is not None:
            memory.fail(problem)
            memory.add(Write(target), self._with_given(names))
            return
        found = self._stand_ins.get(storage_key(target))
        everyone = frozenset(names) | (found.names if found else frozenset())
        self._fail(everyone, problem)
        self._register(target, everyone, known=False)

    def _register(self, tensor: torch.Tensor, names: frozenset[str], **how: Any) -> None:
        storage = tensor.untyped_storage()
        weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._stand_ins[storage._cdata] = _StandIn(weak, names, **how)

    def _fail(self, names: Iterable[str], problem: str) -> None:
        for name in self._with_given(names):
            self._whole.setdefault(name, problem)

    def _with_given(self, names: Iterable[str]) -> set[str]:
        """These names, and the one that the code was given last: it may be what makes it use the others."""
        return {*names, self._given} if self._given is not None else set(names)

    def _stop(self, problem: str) -> _NotRecordable:
        if self._problem is None:
            self._problem, self.blamed = problem, self._current
        return _NotRecordable(problem)

    def _give_up(self, func: Any) -> _NotRecordable:
        """What is done with values that are yet to come may be done because of any name."""
        self.hopeless = True
        return self._stop(f"{func} is done with a parameter while the model is loaded")


def _shapes(value: Any) -> Any:
    """The same, with tensors without memory in place of tensors."""
    if isinstance(value, torch.Tensor):
        return (
            value
            if value.is_meta
            else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        )
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, list | tuple):
        return type(value)(map(_shapes, value))
    return value
