"""Placements from a transformers tensor-parallel plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy

from streamload.checkpoint import TensorInfo
from streamload.errors import OptionError
from streamload.plan.names import local_name, wildcards
from streamload.plan.placement import Experts, PackedShard, Placement, Ranks, Replicate, Shard
from streamload.plan.placements import Placements, one_expert
from streamload.plan.slices import Uneven

__all__ = ["STYLES", "PlannedPlacements"]

# What each style does to a weight, and what to a tensor of one dimension.
_COLUMNS: tuple[Placement, Placement] = (Shard(-2), Shard(-1))
_ROWS: tuple[Placement, Placement] = (Shard(-1), Replicate())
_ALL: tuple[Placement, Placement] = (Replicate(), Replicate())

STYLES: Mapping[str, tuple[Placement, Placement]] = {
    "colwise": _COLUMNS,
    "colwise_gather_output": _COLUMNS,
    "colwise_rep": _COLUMNS,
    "local_colwise": _COLUMNS,
    "rowwise": _ROWS,
    "rowwise_split_input": _ROWS,
    "rowwise_rep": _ROWS,
    "local_rowwise": _ROWS,
    # A fused bias is cut as if it were not fused: so it is in transformers.
    "packed_colwise": (PackedShard(-2, 2), Shard(-1)),
    "packed_rowwise": (PackedShard(-1, 2), Replicate()),
    "local_packed_rowwise": (PackedShard(-1, 2), Replicate()),
    "embedding_rowwise": (Shard(0), Shard(0)),
    "embedding_colwise": (Shard(1), Replicate()),
    "grouped_gemm": (Experts(), Experts()),
    # These change how a module computes, and leave its tensors alone.
    "all_reduce": _ALL,
    "ep_dispatch_experts": _ALL,
    "ep_router": _ALL,
    "gather": _ALL,
    "local": _ALL,
    "local_params": _ALL,
    "mla_kv_a_proj": _ALL,
    "moe_identity_expert": _ALL,
    "moe_tp_experts": _ALL,
    "replicate": _ALL,
    "replicated_with_grad_allreduce": _ALL,
    "sequence_parallel": _ALL,
}
"""For each of transformers' styles, the placement of a matrix and that of a vector."""

# An expert that lies in the checkpoint by itself, and the fused tensor that the plan speaks of.
_EXPERT = re.compile(r"(?P<module>.+\.experts)\.(?P<number>[0-9]+)\.(?P<projection>[^.]+)\.(?:weight|bias)")
_FUSED = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "down_proj": "down_proj",
    "w2": "down_proj",
}
# Mixtral's checkpoints are older than the names in its plan.
_RENAMED = (("block_sparse_moe.", "mlp."),)


class PlannedPlacements(Placements):
    """Placements from a plan; see `Placements.from_tp_plan`."""

    def __init__(self, plan: Mapping[str, str]) -> None:
        for name, style in plan.items():
            if style not in STYLES:
                raise OptionError(f"{name!r}: there is no style {style!r}; there are {', '.join(sorted(STYLES))}")
        self._plan = {**plan, **{local_name(name): style for name, style in plan.items()}}
        self._experts = 0

    def bind(self, names: Sequence[str]) -> Placements:
        numbers = [int(found["number"]) for name in names if (found := _EXPERT.fullmatch(name))]
        bound = copy(self)
        bound._experts = max(numbers, default=-1) + 1
        if self._plan and names and all(self._style_of(name)[0] is None for name in names):
            raise OptionError(
                f"no tensor is called as the tp_plan says: its first name is {next(iter(self._plan))!r}, the "
                f"checkpoint's {names[0]!r}"
            )
        return bound

    def of(self, tensor: TensorInfo, ranks: Ranks, uneven: Uneven = "error") -> Placement:
        style, number = self._style_of(tensor.name)
        if style is None:
            implicit = self._plan and local_name(tensor.name) == "embed_tokens.weight"
            return Shard(0) if implicit else Replicate()
        if number is not None:
            return self._of_expert(tensor, style, number, ranks)
        matrix, vector = STYLES[style]
        return vector if len(tensor.shape) < 2 else matrix

    def _style_of(self, tensor: str) -> tuple[str | None, int | None]:
        """What the plan says of a tensor, and its expert's number where it says it of the fused experts."""
        name = local_name(tensor)
        for old, new in _RENAMED:
            name = name.replace(old, new)
        style = self._style(tensor) or self._style(name)
        expert = _EXPERT.fullmatch(name)
        if style is None and expert is not None and expert["projection"] in _FUSED:
            style = self._style(f"{expert['module']}.{_FUSED[expert['projection']]}")
            return style, int(expert["number"])
        return style, None

    def _style(self, name: str) -> str | None:
        generic = wildcards(name)
        return self._plan.get(generic) or self._plan.get(generic.rpartition(".")[0])

    def _of_expert(self, tensor: TensorInfo, style: str, number: int, ranks: Ranks) -> Placement:
        if style == "grouped_gemm":
            return one_expert(tensor.name, number, self._experts, ranks)
        matrix, vector = STYLES[style]
        if isinstance(matrix, PackedShard):
            matrix = Shard(matrix.dim)
        return vector if len(tensor.shape) < 2 else matrix
