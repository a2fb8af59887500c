"""A load's events as a Chrome trace, which opens in Perfetto and in ``chrome://tracing``.

Source: the "Trace Event Format" document of the Chromium project.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from streamload.events import Event

__all__ = ["Trace"]

_PROCESS = 1
_FIRST_LANES = ("engine", "consumer", "copy stream")


class Trace:
    """Collects events; give it as ``on_event`` and write it when the load has ended.

    ::

        trace = streamload.Trace()
        streamload.load(uri, on_event=trace)
        trace.write("load.trace.json")

    Each lane (the engine, each worker, the copy stream, the consumer) becomes a row.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []

    def __call__(self, event: Event) -> None:
        # Called on several threads; a list's append is atomic.
        self._events.append(event)

    def to_dict(self) -> dict[str, Any]:
        """The trace as the format's JSON object; times in microseconds since the load began."""
        events = sorted(self._events, key=lambda event: event.started_s)
        lanes = {lane: number for number, lane in enumerate(_lanes(events))}
        rows: list[dict[str, Any]] = [_metadata("process_name", 0, {"name": "streamload"})]
        for lane, number in lanes.items():
            rows.append(_metadata("thread_name", number, {"name": lane}))
            rows.append(_metadata("thread_sort_index", number, {"sort_index": number}))
        rows += [_row(event, lanes[event.lane]) for event in events]
        return {"traceEvents": rows, "displayTimeUnit": "ms"}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file.

        Raises:
            OSError: It cannot be written.
        """
        Path(path).write_text(json.dumps(self.to_dict()), encoding="utf-8")


def _lanes(events: list[Event]) -> list[str]:
    """The lanes that occur: the fixed ones first, then the workers by their number."""
    found = {event.lane for event in events}
    workers = sorted(found.difference(_FIRST_LANES), key=lambda lane: (len(lane), lane))
    return [lane for lane in _FIRST_LANES if lane in found] + workers


def _metadata(name: str, lane: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": _PROCESS, "tid": lane, "name": name, "args": args}


def _row(event: Event, lane: int) -> dict[str, Any]:
    details = {
        "object": event.object,
        "start": event.start,
        "end": event.end,
        "bytes": event.nbytes or None,
        "detail": event.detail or None,
    }
    row: dict[str, Any] = {
        "pid": _PROCESS,
        "tid": lane,
        "name": event.kind,
        "cat": event.kind,
        "ts": event.started_s * 1e6,
        "args": {name: value for name, value in details.items() if value is not None},
    }
    if event.seconds:
        return row | {"ph": "X", "dur": event.seconds * 1e6}
    return row | {"ph": "i", "s": "t"}
