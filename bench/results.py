"""The results' JSON, which is a contract, and what is computed from single runs.

One scenario is an object: ``{"scenario", "size_bytes", "machine", "results": [{"loader", "destination", "correct",
"seconds", "gb_per_s", "cpu_s_per_gb", "peak_rss_bytes", "limit_ratio", …}]}``. A file holds one such object, or a list
of them. GB are 10^9 bytes. ``gb_per_s`` and ``cpu_s_per_gb`` are medians, ``peak_rss_bytes`` is the most. What could
not be run has no seconds, null for the rest, and ``reason``; what came out wrong, ``correct: false`` and ``reason``.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one loader, as it is kept for going on after an interruption.

    Attributes:
        number: 0 is the round that compares the tensors and is not counted.
        seconds: None where it failed.
        error: Why it failed, or does not count.
        wrong: What was wrong with the tensors.
    """

    loader: str
    destination: str
    number: int
    seconds: float | None = None
    cpu_s: float | None = None
    peak_rss_bytes: int | None = None
    above_imports_bytes: int | None = None
    error: str | None = None
    wrong: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """One line of a table: a loader and where it loads to."""

    loader: str
    destination: str
    correct: bool | None
    seconds: list[float]
    gb_per_s: float | None
    cpu_s_per_gb: float | None
    peak_rss_bytes: int | None
    above_imports_bytes: int | None
    limit_ratio: float | None
    reason: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """A scenario's results."""

    scenario: str
    size_bytes: int
    machine: dict[str, Any]
    results: list[Result]
    skipped: str | None = None

    def limit_seconds(self, destination: str) -> float | None:
        """The limit's median; the drain's counts for the parameters too, since it is the same work."""
        by_destination = {result.destination: result.seconds for result in self.results if result.loader == "limit"}
        seconds = by_destination.get(destination) or (by_destination.get("drain") if destination == "params" else None)
        return statistics.median(seconds) if seconds else None


def summarize(
    scenario: str, size_bytes: int, machine: dict[str, Any], runs: Iterable[Run], not_run: dict[tuple[str, str], str]
) -> Report:
    """Medians and ratios from single runs.

    Args:
        scenario: Its name.
        size_bytes: What was moved in each run.
        machine: What it ran on.
        runs: All of them, round 0 included.
        not_run: Why a loader was not run for a destination.
    """
    by_loader: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_loader.setdefault((run.loader, run.destination), []).append(run)
    results = [_result(*key, found, size_bytes) for key, found in by_loader.items()]
    results += [
        Result(*key, None, [], None, None, None, None, None, reason)
        for key, reason in not_run.items()
        if key not in by_loader
    ]
    report = Report(scenario, size_bytes, machine, results)
    return Report(scenario, size_bytes, machine, [_with_ratio(result, report) for result in results])


def _result(loader: str, destination: str, runs: list[Run], size_bytes: int) -> Result:
    errors = [run.wrong or run.error for run in runs if run.wrong or run.error]
    counted = [run for run in runs if run.number > 0 and run.seconds is not None and not run.error]
    seconds = [run.seconds for run in counted if run.seconds is not None]
    cpu_s = [run.cpu_s for run in counted if run.cpu_s is not None]
    peaks = [run.peak_rss_bytes for run in counted if run.peak_rss_bytes is not None]
    above = [run.above_imports_bytes for run in counted if run.above_imports_bytes is not None]
    correct = None if not runs or (errors and not any(run.wrong for run in runs)) else not any(r.wrong for r in runs)
    return Result(
        loader=loader,
        destination=destination,
        correct=correct,
        seconds=seconds,
        gb_per_s=size_bytes / statistics.median(seconds) / 1e9 if seconds else None,
        cpu_s_per_gb=statistics.median(cpu_s) / size_bytes * 1e9 if cpu_s else None,
        peak_rss_bytes=max(peaks, default=None),
        above_imports_bytes=max(above, default=None),
        limit_ratio=None,
        reason=errors[0] if errors else None,
        notes=counted[-1].notes if counted else {},
    )


def _with_ratio(result: Result, report: Report) -> Result:
    limit = report.limit_seconds(result.destination)
    if limit is None or not result.seconds:
        return result
    return Result(**asdict(result) | {"limit_ratio": limit / statistics.median(result.seconds)})


def to_json(reports: list[Report]) -> str:
    """One scenario as an object, several as a list of them."""
    described = [asdict(report) for report in reports]
    return json.dumps(described[0] if len(described) == 1 else described, indent=1) + "\n"


def write(path: Path, reports: list[Report]) -> None:
    """Write them; whoever reads meanwhile sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(to_json(reports))
    os.replace(partial, path)


def read(path: Path) -> list[Report]:
    """Read what `write` wrote, or any file that keeps the contract.

    Raises:
        OSError: The file cannot be read.
        ValueError: It does not keep the contract.
    """
    value = json.loads(path.read_text())
    try:
        return [_report(item) for item in (value if isinstance(value, list) else [value])]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results: {error!r}") from error


_OPTIONAL: dict[str, Any] = {"above_imports_bytes": None, "limit_ratio": None, "reason": None, "notes": {}}


def _report(item: dict[str, Any]) -> Report:
    names = Result.__dataclass_fields__
    return Report(
        scenario=item["scenario"],
        size_bytes=item["size_bytes"],
        machine=item["machine"],
        results=[
            Result(
                **{name: result[name] if name not in _OPTIONAL else result.get(name, _OPTIONAL[name]) for name in names}
            )
            for result in item["results"]
        ],
        skipped=item.get("skipped"),
    )


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one loader in one scenario between two files.

    Attributes:
        speed: New over old, in GB/s; None where one of them has none.
        beyond_noise: Whether the slowest of the faster side is faster than the fastest of the other.
    """

    scenario: str
    loader: str
    destination: str
    old: Result | None
    new: Result | None
    speed: float | None
    beyond_noise: bool


def compare(old: list[Report], new: list[Report]) -> list[Change]:
    """Every loader that either side has, the old side's order first."""
    before, after = _by_key(old), _by_key(new)
    return [_change(*key, before.get(key), after.get(key)) for key in before | after]


def _by_key(reports: list[Report]) -> dict[tuple[str, str, str], Result]:
    return {
        (report.scenario, result.loader, result.destination): result for report in reports for result in report.results
    }


def _change(scenario: str, loader: str, destination: str, old: Result | None, new: Result | None) -> Change:
    speed, beyond = None, False
    if old is not None and new is not None and old.seconds and new.seconds:
        # The sizes may differ, the rates may be compared all the same.
        assert old.gb_per_s is not None
        assert new.gb_per_s is not None
        speed = new.gb_per_s / old.gb_per_s
        before, after = _rates(old), _rates(new)
        beyond = max(before) < min(after) or max(after) < min(before)
    return Change(scenario, loader, destination, old, new, speed, beyond)


def _rates(result: Result) -> list[float]:
    assert result.gb_per_s is not None
    median = statistics.median(result.seconds)
    return [result.gb_per_s * median / seconds for seconds in result.seconds]
