"""Loads what a model's own loading code takes of a checkpoint, and no more: load_sliced."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from streamload.checkpoint import Catalog
from streamload.errors import OptionError, StreamloadError
from streamload.filling import say_undefined
from streamload.loader import Load, Stream, resolve_options
from streamload.options import LoadOptions, Options
from streamload.report import Report
from streamload.sinks.dtypes import check_dtypes, require_torch
from streamload.sinks.parameters import ParametersSink
from streamload.sinks.regions import Handed, region_target
from streamload.sinks.targets import Target

if TYPE_CHECKING:
    import torch

    from streamload.recording import Leftovers, Recording

__all__ = ["LoadWeights", "SlicedLoad", "fill_sliced", "load_sliced"]

LoadWeights: TypeAlias = "Callable[[Iterable[tuple[str, torch.Tensor]]], Any]"
"""A model's own loading code: it is given names and whole tensors, and copies what it needs of them into the model."""


@dataclass(frozen=True, slots=True)
class SlicedLoad:
    """What was loaded, and how.

    Attributes:
        report: What happened. Its bytes are those that were needed, and those that were read.
        checkpoint_bytes: How many bytes the checkpoint's tensors have, but for those that were left out by name.
        loaded: What the model's loading code returned; where it ran more than once, the last time.
        whole: The names whose tensors were read whole and given to the loading code, and why.
    """

    report: Report
    checkpoint_bytes: int
    loaded: Any
    whole: Mapping[str, str]

    @property
    def reasons(self) -> dict[str, list[str]]:
        """The names that were read whole, by the reason."""
        found: dict[str, list[str]] = {}
        for name, problem in self.whole.items():
            found.setdefault(problem, []).append(name)
        return found


def load_sliced(
    model: torch.nn.Module,
    uri: str | os.PathLike[str],
    load_weights: LoadWeights | None = None,
    *,
    record: bool = True,
    **options: Unpack[Options],
) -> SlicedLoad:
    """Load what a model's own loading code takes of a checkpoint, straight into the model's memory.

    ::

        loaded = streamload.load_sliced(model, "s3://models/llama")  # model.load_weights says what goes where

    The code is run once on stand-ins that have names, shapes and dtypes, and no memory. What it copies of them into the
    model's parameters and buffers is recorded, and only those bytes are read: of a model that is shared out among
    ranks, this rank's. What cannot be recorded, since the code looks at values or computes with them, is read whole; so
    is all else that goes into the same modules. The code is then run again, on these tensors and stand-ins for the
    others. If it does not copy exactly what was recorded then, all is loaded again, whole. When this returns,
    everything is in place and verified as far as the source allows; when it raises after reading has begun, the content
    of the model is undefined, and the error says so.

    Args:
        model: Where the tensors go: they may lie on any device but ``meta``.
        uri: As for `open`.
        load_weights: The code; None: the model's ``load_weights``. It is called on this thread.
        record: False: record nothing, and give it all tensors whole.
        **options: The fields of `LoadOptions`, except for ``device``, for what says which rank this is, which the
            model's code knows, and for ``order``: it is given tensors in the order of the files.

    Returns:
        What happened, what the code returned, and which names were read whole.

    Raises:
        OptionError: An option has no meaning here, or the model has no ``load_weights``.
        UnsupportedDtypeError: torch does not have a tensor's dtype.
        StreamloadError: Whatever else went wrong with the load.
        Exception: Whatever the model's code raises when it is given whole tensors.
    """
    require_torch()
    for name in ("device", "rank", "order"):
        if options.get(name) is not None:
            raise OptionError(f"load_sliced takes no {name}: the model's code decides, and is given the files' order")
    code = load_weights if load_weights is not None else getattr(model, "load_weights", None)
    if not callable(code):
        raise OptionError(f"a {type(model).__name__} has no load_weights: give what loads names and tensors into it")
    # What the environment says about these is not meant for this either.
    resolved = resolve_options({**options, "device": "cpu", "rank": None, "order": "file"})
    return fill_sliced(model, os.fspath(uri), resolved, code, record=record)


def fill_sliced(
    model: torch.nn.Module,
    uri: str,
    options: LoadOptions,
    code: LoadWeights,
    *,
    record: bool = True,
    wanted: Callable[[str], bool] = lambda _: True,
) -> SlicedLoad:
    """What `load_sliced` does.

    Args:
        model: As there.
        uri: As there.
        options: Resolved ones, in the order of the files.
        code: The loading code.
        record: As there.
        wanted: Which names the code is given.

    Raises:
        StreamloadError: As there.
    """
    found = _Sliced(model, uri, options, code, wanted).run(record=record)
    if isinstance(found, _Differs):
        found = _Sliced(model, uri, options, code, wanted).run(record=False, differs=found)
        assert isinstance(found, SlicedLoad)
    return found


@dataclass(frozen=True, slots=True)
class _Differs:
    """The code did otherwise than it was recorded: why everything has to be loaded again, and what was read."""

    problem: str
    leftovers: Leftovers


class _Sliced:
    """One load into a model."""

    def __init__(
        self,
        model: torch.nn.Module,
        uri: str,
        options: LoadOptions,
        code: LoadWeights,
        wanted: Callable[[str], bool],
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._code = code
        self._targets: dict[str, Target] = {}
        self._sink: ParametersSink | None = None
        self._listed: Future[Catalog] = Future()
        self._chosen: Future[Catalog] = Future()
        self._chosen.set_running_or_notify_cancel()  # a load that ends while it waits for it must not cancel it
        devices = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
        self._load = Load(
            uri, options, device=", ".join(devices) or "cpu", make_sink=self._make_sink, accept=self._accept
        )

    def run(self, *, record: bool, differs: _Differs | None = None) -> SlicedLoad | _Differs:
        """Load everything.

        Args:
            record: Whether to record what the code does.
            differs: Why not, unless nobody wants it to be recorded.

        Returns:
            What happened; or why it has to be done again without recording.

        Raises:
            StreamloadError: The load's.
        """
        from streamload.recording import record_copies, record_nothing

        try:
            with Stream(self._load) as stream:
                self._load.start()
                either: tuple[Future[Any], ...] = (self._listed, self._load.opened)
                wait(either, return_when=FIRST_COMPLETED)
                if not self._listed.done():
                    self._load.opened.result()
                catalog = self._listed.result()
                check_dtypes(catalog)
                tensors = [tensor for file in catalog.files for tensor in file.tensors if self._wanted(tensor.name)]
                if record:
                    recording = record_copies(tensors, self._code, self._model)
                else:
                    recording = record_nothing(tensors, differs.problem if differs else "as asked for")
                self._chosen.set_result(self._choose(catalog, recording))
                self._load.opened.result()
                loaded = recording.loaded
                if recording.replay is None:
                    with differs.leftovers if differs else nullcontext():
                        loaded = self._code(_handed(stream))
                elif recording.whole:
                    replay = recording.replay(_Taking(stream, recording.whole))
                    problem = replay.run(tensors, self._code)
                    if problem is not None:
                        replay.undo()
                        return _Differs(problem, replay.leftovers())
                    loaded = replay.loaded
                for _ in stream:
                    pass
            left = differs.leftovers.first() if differs else None
            if left is not None:
                raise StreamloadError(
                    f"the model's code was seen to write {left}, and did not when it was given everything whole: what "
                    "that was written into is undefined now; load the model with record=False"
                )
        except BaseException as error:
            if isinstance(error, StreamloadError):
                error.locate(uri=self._load.uri)
            say_undefined(self._sink, error, "load_sliced")
            raise
        nbytes = sum(tensor.nbytes for tensor in tensors)
        return SlicedLoad(stream.report, nbytes, loaded, recording.whole)

    async def _accept(self, catalog: Catalog, whole: Catalog) -> Catalog:
        """On the engine's thread: hand over what there is, and wait until it is known what is needed of it."""
        self._listed.set_result(catalog)
        return await asyncio.wrap_future(self._chosen)

    def _choose(self, catalog: Catalog, recording: Recording) -> Catalog:
        files = []
        for file in catalog.files:
            parts = []
            for tensor in file.tensors:
                copies = recording.copies.get(tensor.name)
                if tensor.name in recording.whole:
                    parts.append(tensor)
                    self._targets[tensor.name] = Handed()
                elif copies:
                    part, self._targets[tensor.name] = region_target(tensor, copies)
                    parts.append(part)
            if parts:
                files.append(replace(file, tensors=tuple(sorted(parts, key=lambda part: (part.start, part.end)))))
        return Catalog(tuple(files))

    def _make_sink(
        self, *, memory_bytes: int, read_bytes: int, concurrency: int, congruence_bytes: int = 1
    ) -> ParametersSink:
        self._sink = ParametersSink(
            lambda tensor: self._targets[tensor.name], memory_bytes, congruence_bytes=congruence_bytes
        )
        return self._sink


def _handed(stream: Stream) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors; an iterator that the code may leave early, without closing the stream."""
    for name, tensor in stream:
        yield name, tensor
        # Whoever has it from here on keeps it.
        del tensor


class _Taking:
    """Takes whole tensors by their names; what else arrives meanwhile is put in place."""

    def __init__(self, stream: Stream, whole: Mapping[str, str]) -> None:
        self._stream = stream
        self._whole = whole
        # They come in the files' order, in which they are taken, but for those without a byte: these lie anywhere.
        self._early: dict[str, torch.Tensor] = {}

    def __call__(self, wanted: str) -> torch.Tensor:
        if wanted in self._early:
            return self._early.pop(wanted)
        for name, tensor in self._stream:
            if name == wanted:
                return tensor
            if name in self._whole:
                self._early[name] = tensor
        raise AssertionError(f"{wanted!r} did not come")
