"""Results as tables on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from bench.loaders.base import MIB
from bench.results import Change, Report, Result
from bench.scenarios import SCENARIOS


def show(reports: Iterable[Report], console: Console) -> None:
    """One table for each scenario, the machine above the first."""
    for number, report in enumerate(reports):
        if not number:
            console.print(machine_line(report))
        console.print()
        show_one(report, console)


def machine_line(report: Report) -> str:
    """What it ran on, in one line."""
    machine = report.machine
    parts = [
        str(machine.get("cpu", "?")),
        f"{machine.get('cores', '?')} cores",
        f"Linux {machine.get('kernel', '?')}",
        f"Python {machine.get('python', '?')}",
        f"torch {machine.get('versions', {}).get('torch', '?')}",
    ]
    return ", ".join(parts + ([machine["gpu"]] if machine.get("gpu") else []))


def show_one(report: Report, console: Console) -> None:
    """A scenario's table, or why there is none."""
    title = f"{report.scenario}: {report.size_bytes / 1e9:.2f} GB"
    if report.scenario in SCENARIOS:
        title += f": {SCENARIOS[report.scenario].title}"
    if report.skipped is not None:
        console.print(f"{title}\n  not run: {report.skipped}", highlight=False)
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("loader", no_wrap=True)
    table.add_column("into", no_wrap=True)
    for heading in ("seconds", "least", "most", "GB/s", "of limit", "CPU-s/GB", "peak MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("correct")
    for result in report.results:
        table.add_row(*row(result))
    console.print(table)
    if "too_small" in report.machine:
        console.print(f"  this scenario is {report.machine['too_small']}", highlight=False)


def row(result: Result) -> list[str]:
    """One loader's cells."""
    return [result.loader, result.destination, *_measured(result, 3), _verdict(result)]


def _measured(result: Result, digits: int) -> list[str]:
    """Seconds with so many digits after the point, and what goes with them."""
    if result.seconds:
        of = (statistics.median(result.seconds), min(result.seconds), max(result.seconds))
        seconds = [*(f"{each:.{digits}f}" for each in of), _number(result.gb_per_s)]
    else:
        seconds = ["-"] * 4
    return [*seconds, _number(result.limit_ratio), _number(result.cpu_s_per_gb), _mib(result)]


def markdown(report: Report) -> str:
    """A scenario's table in Markdown: by destination, the limit first, then the fastest; what was not run below it.

    No column says what was right: what was not, is named below as well.
    """
    scenario = SCENARIOS.get(report.scenario)
    title = report.scenario if scenario is None else f"{scenario.title[0].upper()}{scenario.title[1:]}"
    lines = [f"### {title} (`{report.scenario}`, {report.size_bytes / 1e9:.1f} GB)", ""]
    if report.skipped is not None:
        return "\n".join([*lines, f"Not run: {report.skipped}."])
    counted = [result for result in report.results if result.correct and result.seconds]
    order = list(dict.fromkeys(result.destination for result in counted))
    counted.sort(
        key=lambda each: (order.index(each.destination), each.loader != "limit", statistics.median(each.seconds))
    )
    lines += ["| | loader | seconds | least | most | GB/s | of the limit | CPU-s/GB | peak MiB |", f"|{'---|' * 9}"]
    for result in counted:
        name = f"**{result.loader}**" if result.loader == "streamload" else result.loader
        lines.append(f"| {' | '.join([result.destination, name, *_measured(result, 2)])} |")
    others: dict[str, list[str]] = {}
    for result in report.results:
        if result not in counted and result.loader not in others.setdefault(_verdict(result), []):
            others[_verdict(result)].append(result.loader)
    if others:
        lines += ["", "; ".join(f"{', '.join(names)}: {verdict}" for verdict, names in others.items()) + "."]
    return "\n".join(lines)


def _verdict(result: Result) -> str:
    word = {True: "yes", False: "WRONG", None: "not run"}[result.correct]
    if result.correct is None and result.seconds:
        word = "not all runs"
    return f"{word}: {result.reason}" if result.reason else word


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def show_changes(changes: Iterable[Change], console: Console) -> None:
    """What became of each loader between two files."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("scenario", "loader", "into"):
        table.add_column(heading, no_wrap=True)
    for heading in ("GB/s", "now", "change", "CPU-s/GB", "now", "peak MiB", "now"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for change in changes:
        old, new = change.old, change.new
        table.add_row(
            change.scenario,
            change.loader,
            change.destination,
            _number(old.gb_per_s if old else None),
            _number(new.gb_per_s if new else None),
            "-" if change.speed is None else f"{change.speed - 1:+.0%}",
            _number(old.cpu_s_per_gb if old else None),
            _number(new.cpu_s_per_gb if new else None),
            _mib(old),
            _mib(new),
            _remark(change),
        )
    console.print(table)


def _mib(result: Result | None) -> str:
    return "-" if result is None or result.peak_rss_bytes is None else f"{result.peak_rss_bytes / MIB:.0f}"


def _remark(change: Change) -> str:
    if change.old is None or change.new is None:
        return "only in the new one" if change.old is None else "only in the old one"
    if change.old.correct and not change.new.correct:
        return "WRONG now" if change.new.correct is False else "not run now"
    if change.speed is None:
        return ""
    if not change.beyond_noise:
        return "within the noise"
    return "faster" if change.speed > 1 else "slower"
