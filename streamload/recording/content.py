"""What a model's memory held before its loading code was run, to put it back before it is run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from streamload.recording.memory import Memory, Write
from streamload.recording.watcher import storage_key

__all__ = ["Content"]


class Content:
    """What some of a model's memory held before one run.

    Whoever adds to it, say, would add twice when the code is run again.

    Args:
        memories: The model's, in which nothing was noted yet.
    """

    def __init__(self, memories: Mapping[int, Memory]) -> None:
        self._noted = memories
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(self, tensor: torch.Tensor) -> None:
        """Keep what a tensor holds, where it is the model's and was not noted before."""
        if self._is_new(tensor):
            self._kept.append((tensor.detach(), tensor.detach().clone()))

    def drop(self, tensor: torch.Tensor) -> None:
        """Note that a tensor is given another content, as it will be the next time."""
        self._is_new(tensor)

    def restore(self, unless: Callable[[torch.Tensor], bool] = lambda _: False) -> None:
        """Put back all that was kept, and let go of it.

        Args:
            unless: Which tensors are left as they are.
        """
        with torch.no_grad():
            for tensor, content in reversed(self._kept):
                if not unless(tensor):
                    tensor.copy_(content)
        self.clear()

    def clear(self) -> None:
        """Let go of all that was kept."""
        self._kept.clear()

    def _is_new(self, tensor: torch.Tensor) -> bool:
        memory = self._noted.get(storage_key(tensor))
        if memory is None or not tensor.numel():
            return False
        write = Write(tensor)
        if any(noted.same(write) for _, _, noted in memory.overlapping(write)):
            return False
        memory.add(write, ())
        return True
