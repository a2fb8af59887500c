"""How does a checkpoint get onto a volume, whole, verified, and once for a node? Needs no torch."""

from __future__ import annotations

from streamload.stage.options import StageArguments, StageOptions
from streamload.stage.staged import Place, Staged
from streamload.stage.stager import Stager

__all__ = ["Place", "StageArguments", "StageOptions", "Staged", "Stager"]
