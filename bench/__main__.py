"""The benchmarks' command line: ``python -m bench run|list|show|compare|plot``."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from rich.console import Console

from bench import results, table
from bench.loaders import NAMES
from bench.rounds import ROOT, Settings, run_scenario
from bench.scenarios import SCENARIOS

# Checkpoints are kept for the next run; `make clean` removes them.
_DATA = ROOT / "build" / "bench" / "data"


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 where it did what was asked, 1 where a loader came out wrong or a file is no good."""
    given = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        return {"run": _run, "list": _list, "show": _show, "compare": _compare, "plot": _plot}[given.command](
            given, console
        )
    except (OSError, ValueError, ImportError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Loaders side by side.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run scenarios and print their tables")
    run.add_argument("scenarios", nargs="+", metavar="SCENARIO", choices=[*SCENARIOS, "all"], help="a name, or: all")
    run.add_argument("--size", type=_size, metavar="GB", help="of the checkpoint (default: the scenario's own)")
    run.add_argument("--rounds", type=_positive, default=5, metavar="N", help="that are counted (default: 5)")
    run.add_argument("--loaders", type=_loaders, metavar="A,B", help="default: all")
    run.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results there; go on where it was interrupted"
    )
    run.add_argument("--quick", action="store_true", help="the nearest peers, smaller checkpoints, fewer destinations")
    run.add_argument("--minutes", type=float, metavar="M", help="begin no further rounds when so much is used up")
    run.add_argument("--endpoint", metavar="URL", help="an S3 endpoint of your own, with AWS_… variables for it")
    run.add_argument("--bucket", metavar="NAME[/PREFIX]", help="the bucket there; checkpoints are uploaded into it")
    run.add_argument("--dir", type=Path, default=_DATA, metavar="DIR", help="where checkpoints are made and kept")
    commands.add_parser("list", help="list scenarios and loaders")
    show = commands.add_parser("show", help="print a file of results")
    show.add_argument("file", type=Path, metavar="FILE.json")
    show.add_argument("--markdown", action="store_true", help="as docs/benchmarks.md has them: fastest first")
    compare = commands.add_parser("compare", help="show what has changed between two files of results")
    compare.add_argument("old", type=Path, metavar="OLD.json")
    compare.add_argument("new", type=Path, metavar="NEW.json")
    plot = commands.add_parser("plot", help="draw a file of results")
    plot.add_argument("file", type=Path, metavar="FILE.json")
    plot.add_argument("--output", type=Path, metavar="FILE.png", help="default: beside the results")
    return parser


def _run(given: argparse.Namespace, console: Console) -> int:
    if given.bucket and not given.endpoint:
        raise ValueError("--bucket needs --endpoint")
    names = list(dict.fromkeys(given.scenarios))
    if "all" in names:
        names = [name for name, scenario in SCENARIOS.items() if scenario.quick or not given.quick]
    runs = given.json.with_name(f"{given.json.name}.runs") if given.json else None
    settings = Settings(
        data=given.dir,
        loaders=given.loaders,
        size_bytes=given.size,
        rounds=given.rounds,
        quick=given.quick,
        endpoint=given.endpoint,
        bucket=given.bucket,
        runs=runs,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    ends = time.monotonic() + given.minutes * 60 if given.minutes else None
    reports = []
    for place, name in enumerate(names):
        # What is left, in equal parts: no scenario may use up another's.
        now = time.monotonic()
        until = None if ends is None else now + max(0.0, ends - now) / (len(names) - place)
        reports.append(run_scenario(name, settings, until))
        table.show_one(reports[-1], console)
        if given.json:
            results.write(given.json, reports)
    console.print(table.machine_line(reports[0]))
    if runs is not None:
        # All is done: the same command begins anew.
        runs.unlink(missing_ok=True)
    return 1 if any(result.correct is False for report in reports for result in report.results) else 0


def _list(given: argparse.Namespace, console: Console) -> int:
    for scenario in SCENARIOS.values():
        console.print(f"{scenario.name:14} {scenario.title}; into {', '.join(scenario.destinations)}")
    console.print(f"\nloaders: {', '.join(NAMES)}")
    return 0


def _show(given: argparse.Namespace, console: Console) -> int:
    reports = results.read(given.file)
    if given.markdown:
        print("\n\n".join(table.markdown(report) for report in reports))
    else:
        table.show(reports, console)
    return 0


def _compare(given: argparse.Namespace, console: Console) -> int:
    table.show_changes(results.compare(results.read(given.old), results.read(given.new)), console)
    return 0


def _plot(given: argparse.Namespace, console: Console) -> int:
    from bench.plot import plot

    output = given.output or given.file.with_suffix(".png")
    plot(results.read(given.file), output)
    console.print(str(output))
    return 0


def _size(text: str) -> int:
    value = float(text)
    if not math.isfinite(value) or value <= 0:
        raise argparse.ArgumentTypeError("a positive number of gigabytes")
    return int(value * 1e9)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def _loaders(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"no such loader: {name}; there are {', '.join(NAMES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
