"""What was read because it was recorded, and is wrong: whether it is replaced when everything is loaded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamload.recording.memory import Write
from streamload.recording.recorder import Recorder
from streamload.recording.state import ModelState
from streamload.recording.watcher import Watcher, storage_key

__all__ = ["Leftovers"]


class Leftovers(Watcher):  # type: ignore[no-untyped-call]
    """Sees what the code writes when it is given everything whole.

    What a parameter had held before something was read into it is gone. That does no harm where the code writes there,
    as it does as a rule.

    Args:
        state: What the model was like before.
        recorded: The run whose copies were read.
    """

    def __init__(self, state: ModelState, recorded: Recorder) -> None:
        super().__init__(state.memories())
        self._state = state
        self._recorded = recorded

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in self.written(func, args, kwargs or {}):
            memory = self.memory(tensor)
            if memory is not None and tensor.numel():
                memory.add(Write(tensor), ())
        return func(*args, **(kwargs or {}))

    def first(self) -> str | None:
        """What is still there, in memory that is still the model's, though the code did not write there again."""
        current = {storage_key(tensor) for tensor in self._state.tensors()}
        for key, memory in self._recorded.memories.items():
            if memory.problem is None and key in current:
                for write in memory.writes:
                    if not self.memories[key].overlapping(write):
                        return repr(write.name)
        for target, _ in self._recorded.constants:
            key = storage_key(target)
            if self._recorded.fills_memory(target) and key in current and not self.memories[key].touched(target):
                return "a constant"
        return None
