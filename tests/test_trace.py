"""Events as a Chrome trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamload import Event, Trace


def _trace(*events: Event) -> Trace:
    trace = Trace()
    for event in events:
        trace(event)
    return trace


def _lanes(found: dict[str, Any]) -> dict[int, str]:
    return {row["tid"]: row["args"]["name"] for row in found["traceEvents"] if row["name"] == "thread_name"}


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found["traceEvents"] if row["ph"] != "M"]


def test_a_span() -> None:
    found = _trace(Event("read", "worker 0", 1.5, 0.25, "a.safetensors", 8, 24, 16)).to_dict()
    assert _rows(found) == [
        {
            "ph": "X",
            "pid": 1,
            "tid": 0,
            "name": "read",
            "cat": "read",
            "ts": 1_500_000,
            "dur": 250_000,
            "args": {"object": "a.safetensors", "start": 8, "end": 24, "bytes": 16},
        }
    ]


def test_an_instant() -> None:
    (row,) = _rows(_trace(Event("retry", "worker 0", 2.0, detail="reset")).to_dict())
    assert (row["ph"], row["s"], row["args"]) == ("i", "t", {"detail": "reset"})
    assert "dur" not in row


def test_lanes_in_an_order_that_people_read() -> None:
    names = ["worker 10", "copy stream", "worker 2", "engine", "consumer", "worker 0"]
    found = _trace(*(Event("read", name, number, 1.0) for number, name in enumerate(names))).to_dict()
    lanes = _lanes(found)
    assert [lanes[number] for number in sorted(lanes)] == [
        "engine",
        "consumer",
        "copy stream",
        "worker 0",
        "worker 2",
        "worker 10",
    ]
    order = {
        row["tid"]: row["args"]["sort_index"] for row in found["traceEvents"] if row["name"] == "thread_sort_index"
    }
    assert sorted(lanes, key=order.__getitem__) == sorted(lanes)
    for row, name in zip(_rows(found), names, strict=True):
        assert lanes[row["tid"]] == name


def test_only_lanes_that_occur() -> None:
    assert list(_lanes(_trace(Event("list", "engine", 0.0, 1.0)).to_dict()).values()) == ["engine"]


def test_rows_come_in_the_order_of_their_beginnings() -> None:
    found = _trace(Event("read", "a", 2.0, 1.0), Event("read", "b", 1.0, 9.0), Event("read", "a", 0.0, 1.0)).to_dict()
    assert [row["ts"] for row in _rows(found)] == [0, 1_000_000, 2_000_000]


def test_a_trace_of_nothing_is_valid() -> None:
    found = Trace().to_dict()
    assert _rows(found) == []
    assert found["traceEvents"][0]["args"] == {"name": "streamload"}


def test_the_file_is_json(tmp_path: Path) -> None:
    trace = _trace(Event("header", "engine", 0.0, 0.5, object='a"\n\x00\udcff.safetensors'))
    trace.write(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text(encoding="utf-8")) == trace.to_dict()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Trace().write(tmp_path / "nowhere" / "trace.json")
