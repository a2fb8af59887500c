"""Which placement each tensor of a checkpoint has, and what a rank therefore needs of it."""

from __future__ import annotations

import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from streamload.checkpoint import Catalog, TensorInfo
from streamload.errors import OptionError
from streamload.plan.names import layer_name
from streamload.plan.placement import Absent, Placement, Ranks, Replicate
from streamload.plan.slices import Uneven, slice_tensor

__all__ = ["Placements", "RuledPlacements", "Slicer", "one_expert"]

Slicer: TypeAlias = Callable[[TensorInfo], TensorInfo | None]
"""From a whole tensor to what one rank has of it."""

# Outside the layers: what the first stage of a pipeline needs, and what the last one does.
_FIRST = re.compile(r"embed_tokens\..+")
_LAST = re.compile(r"(norm|final_layernorm|lm_head)\..+")


class Placements(ABC):
    """Says for each tensor how it is shared out among the ranks.

    Made by `from_rules`, `from_tp_plan` or `from_config`, or by whoever derives from it and knows better.
    """

    @abstractmethod
    def of(self, tensor: TensorInfo, ranks: Ranks, uneven: Uneven = "error") -> Placement:
        """One tensor's placement, pipeline stages left aside.

        Args:
            tensor: The whole tensor.
            ranks: Which rank asks: how many share a tensor decides how heads are shared out.
            uneven: As for `slice_tensor`.

        Raises:
            OptionError: It is not known, or it is impossible; the error names the tensor.
        """

    def bind(self, names: Sequence[str]) -> Placements:
        """The same placements, for a checkpoint with tensors of these names."""
        return self

    @property
    def layers(self) -> int | None:
        """How many layers the model has; None: as many as the checkpoint has."""
        return None

    def slice(
        self, catalog: Catalog, ranks: Ranks, *, uneven: Uneven = "error", whole: Catalog | None = None
    ) -> Catalog:
        """What a rank needs of a checkpoint.

        With several pipeline stages, each has a range of layers whose lengths differ by one at most; the embedding is
        on the first, the last norm and the head on the last, and so is the embedding where there is no other head.

        Args:
            catalog: What is wanted of the checkpoint.
            ranks: Which rank asks.
            uneven: What to do where a size is not a multiple of the number of ranks; see `slice_tensor`.
            whole: All of the checkpoint, where not all is wanted: how many layers and experts there are, and whether
                there is a head, is read off it.

        Returns:
            The tensors, or slices of them, that the rank has, with the slices' shapes. Files without any are left out.

        Raises:
            OptionError: A tensor's placement is not known, or it cannot be shared out; the error names the tensor.
        """
        names = [tensor.name for file in (whole or catalog).files for tensor in file.tensors]
        slice_of = self.slicer(names, ranks, uneven=uneven)
        files = []
        for file in catalog.files:
            sliced = [found for tensor in file.tensors if (found := slice_of(tensor)) is not None]
            if sliced:
                files.append(replace(file, tensors=tuple(sorted(sliced, key=lambda part: (part.start, part.end)))))
        return Catalog(tuple(files))

    def slicer(self, names: Sequence[str], ranks: Ranks, *, uneven: Uneven = "error") -> Slicer:
        """What cuts a rank's slice out of each tensor of a checkpoint.

        Args:
            names: Of all its tensors, as for `slice`.
            ranks: Which rank asks.
            uneven: As for `slice`.

        Returns:
            A function from a whole tensor to the rank's slice of it, or None where it has nothing of it; it raises what
            `slice` raises.

        Raises:
            OptionError: There are more pipeline stages than layers.
        """
        stages = _Stages(list(names), ranks, self.layers)
        bound = self.bind(names)

        # Tensors of a model repeat their shapes, and a slice takes ten times as long to work out as to move.
        known: dict[tuple[str, tuple[int, ...], Placement], TensorInfo | None] = {}

        def slice_of(tensor: TensorInfo) -> TensorInfo | None:
            # Before the stage is looked at: what is not known is an error on every rank, not on one of them.
            placement = bound.of(tensor, ranks, uneven)
            if not stages.has(tensor.name):
                return None
            kind = tensor.dtype, tensor.shape, placement
            if kind not in known:
                found = slice_tensor(tensor, placement, ranks, uneven=uneven)
                known[kind] = None if found is None else _moved(found, tensor.name, -tensor.start)
            part = known[kind]
            return None if part is None else _moved(part, tensor.name, tensor.start)

        return slice_of

    @staticmethod
    def from_rules(rules: Mapping[str, Placement] | Iterable[tuple[str, Placement]]) -> Placements:
        """Placements from globs of names, as those of ``include``; of several that match, the first one counts.

        A tensor that no glob matches is an error: end with ``("*", Replicate())`` for the rest.

        Raises:
            OptionError: A rule is none.
        """
        return RuledPlacements(rules)

    @staticmethod
    def from_tp_plan(plan: Mapping[str, str]) -> Placements:
        """Placements from a transformers ``tp_plan`` or ``ep_plan``, or both together.

        Names are matched as transformers does it, with or without ``model.`` in front; experts that lie in the
        checkpoint one by one are what the plan says of the fused ones. Of what the plan does not name, the embedding
        is shared out by the vocabulary and all else is on every rank, as in transformers.

        Raises:
            OptionError: There is no such style.
        """
        from streamload.plan.tp_plan import PlannedPlacements

        return PlannedPlacements(plan)

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Placements:
        """Placements of a decoder family that is known, from its ``config.json``.

        Raises:
            OptionError: The family is not known, or the config lacks what it takes.
        """
        from streamload.plan.decoders import DecoderPlacements

        return DecoderPlacements(config)


def _moved(part: TensorInfo, name: str, nbytes: int) -> TensorInfo:
    """The same slice of another tensor, which lies elsewhere."""
    stripes = tuple(replace(stripe, file_start=stripe.file_start + nbytes) for stripe in part.stripes)
    return TensorInfo(name, part.dtype, part.shape, part.start + nbytes, part.end + nbytes, stripes)


def one_expert(name: str, number: int, experts: int, ranks: Ranks) -> Placement:
    """Where a tensor is that holds one of several experts, which are shared out whole among the ranks.

    Raises:
        OptionError: They cannot be shared out equally.
    """
    if experts % ranks.ep_size:
        raise OptionError(f"tensor {name!r}: {experts} experts cannot be shared out equally to {ranks.ep_size} ranks")
    return Replicate() if number // (experts // ranks.ep_size) == ranks.ep_rank else Absent()


class RuledPlacements(Placements):
    """Placements from globs of names; see `Placements.from_rules`."""

    def __init__(self, rules: Mapping[str, Placement] | Iterable[tuple[str, Placement]]) -> None:
        pairs = tuple(rules.items() if isinstance(rules, Mapping) else rules)
        for glob, placement in pairs:
            if not isinstance(glob, str) or not isinstance(placement, Placement):
                raise OptionError(f"not a glob and a placement: {glob!r}, {placement!r}")
        self._rules: list[tuple[re.Pattern[str], Placement]] = [
            (re.compile(fnmatch.translate(glob)), placement) for glob, placement in pairs
        ]

    def of(self, tensor: TensorInfo, ranks: Ranks, uneven: Uneven = "error") -> Placement:
        for pattern, placement in self._rules:
            if pattern.match(tensor.name):
                return placement
        raise OptionError(f"tensor {tensor.name!r}: no rule says how it is shared out")


class _Stages:
    """Which tensors are on a rank's pipeline stage."""

    def __init__(self, names: list[str], ranks: Ranks, layers: int | None) -> None:
        self._ranks = ranks
        numbers = [found.layer for name in names if (found := layer_name(name)).layer is not None]
        if layers is None:
            layers = 1 + max((number for number in numbers if number is not None), default=-1)
        self._first = ranks.pp_rank * layers // ranks.pp_size
        self._end = (ranks.pp_rank + 1) * layers // ranks.pp_size
        if ranks.pp_size > max(layers, 1):
            raise OptionError(f"{layers} layers cannot be shared out to {ranks.pp_size} pipeline stages")
        self._tied = not any(layer_name(name).rest.startswith("lm_head.") for name in names)

    def has(self, name: str) -> bool:
        """Whether a tensor is on the stage.

        Raises:
            OptionError: It is outside the layers, and it is not known where it belongs.
        """
        if self._ranks.pp_size == 1:
            return True
        layer, rest = layer_name(name)
        if layer is not None:
            return self._first <= layer < self._end
        is_first, is_last = self._ranks.pp_rank == 0, self._ranks.pp_rank == self._ranks.pp_size - 1
        if _FIRST.fullmatch(rest):
            return is_first or (is_last and self._tied)
        if _LAST.fullmatch(rest):
            return is_last
        raise OptionError(f"tensor {name!r}: it is in no layer, and it is not known which pipeline stage needs it")
