"""Fills tensors that are there already: load_into."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from streamload.checkpoint.catalog import name_filter
from streamload.errors import OptionError, StreamloadError
from streamload.loader import Load, Stream, resolve_options
from streamload.options import Options
from streamload.peers import join_peers
from streamload.report import Report
from streamload.sinks.parameters import ParametersSink
from streamload.sinks.targets import Targets
from streamload.uris import scrub_uri

if TYPE_CHECKING:
    import torch

__all__ = ["load_into", "say_undefined"]


def load_into(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    uri: str | os.PathLike[str],
    *,
    cast: bool = False,
    ignore_unexpected: bool = False,
    peers: bool = True,
    **options: Unpack[Options],
) -> Report:
    """Load a checkpoint into tensors that are there already, in place.

    ::

        streamload.load_into(model, "s3://models/llama-tp8", rank=rank, world_size=8)

    With a rank, a pre-sharded checkpoint's files of that rank are read; without one, or where there are no such files,
    the checkpoint is an ordinary one. Names, shapes and dtypes are checked before the first tensor is read. When this
    returns, everything is in place and verified as far as the source allows; when it raises after reading has begun,
    the tensors' content is undefined, and the error says so.

    Where torch.distributed is initialised and a rank is given, all ranks of the default process group are taken to load
    together: one that fails ends the others' loads within seconds, and none returns before all have succeeded.

    Args:
        model: A module, whose parameters and persistent buffers are filled, or tensors by their names. They may lie on
            any device, contiguous or not, and keep their identity.
        uri: As for `open`.
        cast: Whether a checkpoint's tensor of another dtype is converted, rather than an error.
        ignore_unexpected: Whether names that the model does not have are left out, rather than an error.
        peers: False: do not tell other ranks of a failure, nor listen or wait for theirs.
        **options: The fields of `LoadOptions`, except for ``device``. With ``include`` or ``exclude``, only matching
            names take part.

    Returns:
        What happened.

    Raises:
        MismatchError: Names are missing or unexpected, a tensor is larger than the one that it is to fill, or has
            another dtype.
        PeerError: Another rank failed, or is gone.
        StreamloadError: Whatever else went wrong.

    Warns:
        UserWarning: A checkpoint's tensor is smaller than the one that it fills, which keeps its content beyond it.
    """
    others = join_peers() if peers and _has_rank(options) else None
    into: _Into | None = None
    try:
        into = _Into(model, uri, options, cast=cast, ignore_unexpected=ignore_unexpected)
        if others is not None:
            others.when_failed(into.load.interrupt)
        report = into.run()
        if others is not None:
            deadline_s = into.load.options.deadline_s
            left_s = None if deadline_s is None else max(0.0, deadline_s - report.seconds)
            others.finish(left_s, versions=into.load.versions)
    except BaseException as error:
        if isinstance(error, StreamloadError):
            error.locate(uri=scrub_uri(os.fspath(uri)))
        # First of all, and the cause alone: this rank's tensors are no matter of the others'.
        if others is not None:
            others.failed(error)
        if into is not None:
            say_undefined(into.sink, error, "load_into")
        raise
    finally:
        if others is not None:
            others.close()
    return report


def _has_rank(options: Options) -> bool:
    """Whether this is one rank's load, though its options may be wrong: then it is the one that fails."""
    try:
        return resolve_options(options).rank is not None
    except StreamloadError:
        return options.get("rank") is not None


class _Into:
    """A load into tensors that are there already."""

    def __init__(
        self, model: object, uri: str | os.PathLike[str], options: Options, *, cast: bool, ignore_unexpected: bool
    ) -> None:
        if "device" in options:
            raise OptionError("load_into takes no device: tensors go to where the model's lie")
        # What the environment says about devices is not meant for this either.
        resolved = resolve_options({**options, "device": "cpu"})
        self._targets = Targets(
            model,
            cast=cast,
            ignore_unexpected=ignore_unexpected,
            wanted=name_filter(resolved.include, resolved.exclude),
        )
        self.sink: ParametersSink | None = None
        self.load = Load(
            os.fspath(uri),
            resolved,
            device=", ".join(self._targets.devices),
            make_sink=self._make_sink,
            accept=self._targets.accept,
        )

    def run(self) -> Report:
        """Load everything; when this returns or raises, nothing is under way any more.

        Raises:
            StreamloadError: The load's.
        """
        with Stream(self.load) as stream:
            self.load.start()
            self.load.opened.result()
            if self._targets.narrowed:
                shown = "; ".join(self._targets.narrowed)
                warnings.warn(f"smaller than what they fill, which keeps the rest: {shown}", stacklevel=3)
            for _ in stream:
                pass
        return stream.report

    def _make_sink(
        self, *, memory_bytes: int, read_bytes: int, concurrency: int, congruence_bytes: int = 1
    ) -> ParametersSink:
        self.sink = ParametersSink(self._targets.find, memory_bytes, congruence_bytes=congruence_bytes)
        return self.sink


def say_undefined(sink: ParametersSink | None, error: BaseException, what: str) -> None:
    """A load has failed: where something may have been written, have the error say so."""
    if sink is None or not sink.touched:
        return
    remark = "the content of the tensors that were to be filled is now undefined"
    if sink.quarantined_bytes:
        remark += ", and a read that hangs may still write into them"
    if isinstance(error, StreamloadError):
        error.remark(remark)
    else:
        error.add_note(f"{what}: {remark}")
