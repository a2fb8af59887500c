"""The run of a model's loading code that counts, where some names have to be loaded whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from streamload.checkpoint import TensorInfo
from streamload.recording.leftovers import Leftovers
from streamload.recording.recorder import Recorder
from streamload.recording.state import ModelState
from streamload.recording.watcher import CONSTANTS, storage_key

if TYPE_CHECKING:
    from streamload.slicing import LoadWeights

__all__ = ["Replay"]

_COPY = torch.ops.aten.copy_.default


class Replay(Recorder):  # type: ignore[no-untyped-call]
    """A run on every name in order: on the tensors of those that are read whole, and on stand-ins for the others.

    What is copied of the stand-ins was recorded before and is being read into its place meanwhile. The code may decide
    by names and values that it was not given then, and do something else now: so what it does with the stand-ins is
    recorded again and compared, and it must not touch what is being filled.

    Args:
        state: What the model was like before.
        recorded: The run that was recorded, with its result.
        whole: The names that are read whole.
        take: Waits for such a tensor.
    """

    def __init__(
        self, state: ModelState, recorded: Recorder, whole: Mapping[str, str], take: Callable[[str], torch.Tensor]
    ) -> None:
        super().__init__(state)
        self._recorded = recorded
        self._names = whole
        self._take = take
        # Whether it looks away, while what was recorded is put in place.
        self._paused = False
        self._failure: BaseException | None = None

    def run(self, tensors: Sequence[TensorInfo], load_weights: LoadWeights) -> str | None:
        """Run it.

        Returns:
            Why this is not what was recorded, if it is not.

        Raises:
            StreamloadError: A tensor could not be had.
        """
        problem = super().run(tensors, load_weights)
        if self._failure is not None:  # which the code may have caught
            raise self._failure
        problem = problem or self._difference()
        if problem is None:
            self.settle()
        return problem

    def leftovers(self) -> Leftovers:
        """To be entered while everything is loaded again."""
        return Leftovers(self._state, self._recorded)

    def _given_for(self, tensor: TensorInfo) -> torch.Tensor:
        if tensor.name not in self._names:
            return super()._given_for(tensor)
        self._paused = True
        try:
            return self._take(tensor.name)
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if any(storage_key(tensor) in self._stand_ins for tensor in (target, source)):
            return super()._copy(target, source)
        made: torch.Tensor = self._without(_COPY, (target, source), {}, [target, source])
        return made

    def _without(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[torch.Tensor]) -> Any:
        if any((memory := self.memory(tensor)) is not None and memory.touched(tensor) for tensor in tensors):
            raise self._give_up(func)
        if func in CONSTANTS and self._recorded.fills_memory(args[0]):
            # It has been written, and what is copied over it may have been read since.
            self._note_constant(args)
            return args[0]
        if any(map(self._recorded.fills, tensors)):
            raise self._give_up(func)
        if any(map(self._recorded.fills_memory, self.written(func, args, kwargs))):
            raise self._give_up(func)
        replaced = args[0] if func is _COPY or func in CONSTANTS else None
        for tensor in tensors:
            if tensor is not replaced:
                self._before.keep(tensor)
        if replaced is not None:
            self._before.drop(replaced)
        return self._registered(func(*args, **kwargs))

    def _difference(self) -> str | None:
        """What was done otherwise than it was recorded, if anything was."""
        if self._whole or any(memory.problem for memory in self.memories.values()):
            return "what was recorded is computed with when other tensors have values"
        if self.kept():
            return "the model keeps a tensor that was recorded when other tensors have values"
        for key, memory in self.memories.items():
            recorded = self._recorded.memories[key]
            expected = recorded.described() if recorded.problem is None else []
            if memory.described() != expected:
                return "other copies are made than were recorded when other tensors have values"
        if [constant for _, constant in self.constants] != [
            constant for target, constant in self._recorded.constants if self._recorded.fills_memory(target)
        ]:
            return "other constants are written than were recorded when other tensors have values"
        return None
