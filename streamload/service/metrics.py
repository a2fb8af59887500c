"""How far a sidecar is, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from streamload.service.sidecar import STATES

__all__ = ["CONTENT_TYPE", "exposition"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of an `exposition`."""

_PREFIX = "streamload_sidecar_"

# Names as Prometheus has them: base units, and a counter's ends in total.
_GAUGES = {
    "model_bytes": ("total_bytes", "Bytes of all files that are staged."),
    "landed_bytes": ("landed_bytes", "Bytes that are in their place on the volume."),
    "throughput_bytes_per_second": ("bytes_per_s", "Bytes read from the source a second, while there was reading."),
    "files": ("files", "Files that are staged."),
    "memory_budget_bytes": ("memory_bytes", "The limit on bytes on their way."),
    "memory_peak_bytes": ("peak_memory_bytes", "The most of it that was used."),
    "concurrency": ("concurrency", "Reads in flight at most."),
    "waiting_requests": ("waiting", "Requests on the socket that wait for something to land."),
}
_COUNTERS = {
    "fetched_bytes": ("fetched_bytes", "Bytes read from the source."),
    "source_requests": ("requests", "Requests sent to the source."),
    "retries": ("retries", "Attempts that failed and were made again."),
    "hedged_bytes": ("hedged_bytes", "Bytes of late reads that were asked for a second time."),
    "range_requests": ("answered", "Requests on the socket that were told where a range is."),
    "attempts": ("attempts", "How often staging was begun."),
}


class _Status(Collector):
    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value=status[field])
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=status[field])
        errors = CounterMetricFamily(_PREFIX + "errors", "Failures by their kind, those of retries.", labels=["kind"])
        for kind, count in status["errors"].items():
            errors.add_metric([kind], count)
        yield errors
        state = GaugeMetricFamily(_PREFIX + "state", "One for the state that it is in.", labels=["state"])
        for each in STATES:
            state.add_metric([each], float(each == status["state"]))
        yield state
        text = "Bytes of files that are whole, by what they were compared with."
        verified = GaugeMetricFamily(_PREFIX + "verified_bytes", text, labels=["by"])
        for by, nbytes in status["verified"].items():
            verified.add_metric([by], nbytes)
        verified.add_metric(["nothing"], sum(status["unverified"].values()))
        yield verified
        # Not there before it is known: a zero would be the best of all times.
        if status["ready_s"] is not None:
            text = "From the process's start until all was staged."
            yield GaugeMetricFamily(_PREFIX + "time_to_ready_seconds", text, value=status["ready_s"])


def exposition(status: dict[str, Any]) -> bytes:
    """What `Sidecar.status` says, in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Status(status))
    return generate_latest(registry)
