"""Which bytes are needed, in which order? Pure: nothing here reads."""

from __future__ import annotations

from streamload.plan.planner import LEAST_READ_BYTES, plan_reads
from streamload.plan.reads import Batch, Piece, Plan, Read

__all__ = ["LEAST_READ_BYTES", "Batch", "Piece", "Plan", "Read", "plan_reads"]
