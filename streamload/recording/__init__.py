"""Runs a model's own loading code on stand-ins without memory, and records what it copies where.

A stand-in is a tensor on the meta device. Whatever views of it the loading code makes, torch keeps account of: where
their elements lie in the stand-in's storage is asked for when they are copied into the model, so no list of operations
is needed. A mode of torch's dispatcher sees every operation meanwhile. What yields values that nobody has yet
(arithmetic, a comparison, ``item()``) is not done, and neither is what depends on them: the names that they came from
are *not recordable*, and with them all names that go into the same modules. They have to be loaded whole.

Nothing that is written meanwhile depends on a stand-in's values. Constants are written (a loader clears what pads a
vocabulary); other changes of a model's memory in place end the run, which is then made again without that name.

A run without some names, or without values, is a guess at what the code does with all of them. So where there are names
to be loaded whole, the code is run once more, on all names: a *replay* (`replay.py`), which has to do exactly what was
recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from streamload.checkpoint import TensorInfo
from streamload.recording.leftovers import Leftovers
from streamload.recording.recorder import Recorder
from streamload.recording.replay import Replay
from streamload.recording.state import ModelState
from streamload.sinks.regions import RegionCopy

if TYPE_CHECKING:
    from streamload.slicing import LoadWeights

__all__ = ["Leftovers", "Recording", "Replay", "record_copies", "record_nothing"]

# Each run leaves out the names of one more kind; a model with more kinds that cannot be recorded is loaded whole.
_MOST_RUNS = 8


@dataclass(frozen=True, slots=True)
class Recording:
    """What a model's loading code does with a checkpoint.

    Attributes:
        copies: What each name's tensor is copied to; names that it makes no use of have none.
        whole: The names that it could not be recorded for, and why.
        loaded: What the loading code returned.
        replay: What the names in `whole` are to be loaded by, if there are any; given what takes one of them. None
            where nothing was recorded.
    """

    copies: Mapping[str, Sequence[RegionCopy]]
    whole: Mapping[str, str]
    loaded: Any
    replay: Callable[[Callable[[str], torch.Tensor]], Replay] | None


def record_copies(tensors: Sequence[TensorInfo], load_weights: LoadWeights, model: torch.nn.Module) -> Recording:
    """Run a model's loading code on stand-ins.

    What the code changes about the model's modules and parameters, other than their content, is left as it is where
    this was the only run, and undone before another one. Of what lies deeper than their attributes, and the lists,
    dicts and sets among these, nothing is undone.

    Args:
        tensors: All of the checkpoint's, in the order in which the code is given them.
        load_weights: The code.
        model: What it loads into.
    """
    before = ModelState(model)
    problem = before.problem
    if problem is not None:
        return record_nothing(tensors, problem)
    skipped: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for _ in range(_MOST_RUNS):
        run = Recorder(before)
        given = [tensor for tensor in tensors if tensor.name not in skipped]
        problem = run.run(given, load_weights)
        if problem is None:
            kept = run.kept()
            if not kept:
                copies, whole = run.result()
                whole |= skipped
                if whole:
                    run.undo()
                else:
                    run.settle()
                return Recording(copies, whole, run.loaded, partial(Replay, before, run, whole))
            problem = "the model keeps the tensor"
        else:
            kept = {run.blamed} if run.blamed is not None else set()
        run.undo()
        if not kept or run.hopeless:
            break
        # Layers and experts repeat what the first one of them shows.
        kinds |= {_kind(name): problem for name in kept}
        skipped = {tensor.name: kinds[kind] for tensor in tensors if (kind := _kind(tensor.name)) in kinds}
    return record_nothing(tensors, f"the model's loading code cannot be recorded: {problem}")


def record_nothing(tensors: Sequence[TensorInfo], problem: str) -> Recording:
    """What says that all tensors have to be loaded whole.

    Args:
        tensors: All of the checkpoint's.
        problem: Why.
    """
    return Recording({}, {tensor.name: problem for tensor in tensors}, None, None)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "0", name)
