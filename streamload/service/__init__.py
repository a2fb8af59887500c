"""How does an engine read a checkpoint while it is still being staged? From a sidecar. Needs no torch."""

from __future__ import annotations

from streamload.service.options import ServeArguments, ServeOptions
from streamload.service.sidecar import Sidecar

__all__ = ["ServeArguments", "ServeOptions", "Sidecar"]
