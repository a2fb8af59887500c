"""Results as a picture: one panel for each scenario, a bar for each loader and destination, a line at the limit."""

from __future__ import annotations

import statistics
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.results import Report, Result
from bench.table import machine_line

# Told apart by those who see no red or green, too.
_COLOURS = {"drain": "#4477aa", "params": "#ccbb44", "stage": "#aa3377"}


def plot(reports: list[Report], path: Path) -> None:
    """Write a PNG.

    Raises:
        ValueError: There is nothing to show.
        ImportError: matplotlib is not installed.
    """
    shown = [report for report in reports if any(result.seconds for result in report.results)]
    if not shown:
        raise ValueError("no loader has a counted run")
    # Without pyplot, which would keep the figure, and look for a display.
    figure_of: Any = import_module("matplotlib.figure").Figure
    heights = [1.2 + 0.32 * len(_bars(report)) for report in shown]
    figure = figure_of(figsize=(9, sum(heights)), layout="constrained")
    figure.suptitle(machine_line(shown[0]), fontsize=8)
    for axes, report in zip(
        figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0], shown, strict=True
    ):
        _panel(axes, report)
    figure.savefig(path, dpi=120, format="png")


def _bars(report: Report) -> list[Result]:
    return [result for result in report.results if result.seconds and result.loader != "limit"]


def _panel(axes: Any, report: Report) -> None:
    bars = sorted(_bars(report), key=lambda result: (result.destination, -(result.gb_per_s or 0)), reverse=True)
    for place, result in enumerate(bars):
        rate = result.gb_per_s or 0.0
        median = statistics.median(result.seconds)
        least, most = (rate * median / seconds for seconds in (max(result.seconds), min(result.seconds)))
        axes.barh(
            place,
            rate,
            # Of a single run all three are the same but for their rounding, which must not make a length negative.
            xerr=[[max(0.0, rate - least)], [max(0.0, most - rate)]],
            color=_COLOURS.get(result.destination, "grey"),
            hatch="" if result.correct else "xx",
            error_kw={"lw": 0.8},
        )
    axes.set_yticks(
        range(len(bars)),
        [f"{result.loader} ({result.destination}){'' if result.correct else ' WRONG'}" for result in bars],
        fontsize=8,
    )
    limit = report.limit_seconds("drain")
    if limit is not None:
        axes.axvline(report.size_bytes / limit / 1e9, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_title(f"{report.scenario}, {report.size_bytes / 1e9:.1f} GB; dashed: the limit", fontsize=9, loc="left")
    axes.set_xlabel("GB/s, median, with the slowest and the fastest run", fontsize=7)
    axes.tick_params(labelsize=8)
