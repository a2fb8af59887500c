"""Which bytes are needed, in which order? Pure: nothing here reads."""

from __future__ import annotations

from streamload.plan.conversion import Conversion, Span
from streamload.plan.placement import Absent, Experts, PackedShard, Placement, Ranks, Replicate, Shard
from streamload.plan.placements import Placements
from streamload.plan.planner import LEAST_READ_BYTES, plan_reads
from streamload.plan.reads import Batch, Piece, Pieces, Plan, Read
from streamload.plan.slices import Box, Uneven, slice_boxes, slice_tensor

__all__ = [
    "LEAST_READ_BYTES",
    "Absent",
    "Batch",
    "Box",
    "Conversion",
    "Experts",
    "PackedShard",
    "Piece",
    "Pieces",
    "Placement",
    "Placements",
    "Plan",
    "Ranks",
    "Read",
    "Replicate",
    "Shard",
    "Span",
    "Uneven",
    "plan_reads",
    "slice_boxes",
    "slice_tensor",
]
