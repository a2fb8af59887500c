"""For those who write sources and sinks: conformance suites, and fakes that misbehave when they are told to."""

from __future__ import annotations

from streamload.testing.devices import LateDevice
from streamload.testing.faults import FaultSource
from streamload.testing.loops import run_on_each_loop
from streamload.testing.sinks import SinkConformance
from streamload.testing.sources import SourceConformance

__all__ = ["FaultSource", "LateDevice", "SinkConformance", "SourceConformance", "run_on_each_loop"]
