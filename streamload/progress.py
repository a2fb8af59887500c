"""Showing how far a load is, to whoever asked for it: a bar on a terminal, a log line elsewhere, or a callable."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Protocol, Self

from streamload.events import OnProgress, Progress
from streamload.report import Recorder
from streamload.units import format_bytes, format_count, format_seconds

__all__ = ["Watch", "watch"]

_logger = logging.getLogger("streamload.progress")

# A bar that moves ten times a second looks alive; a log line every five seconds tells a person enough.
_BAR_INTERVAL_S = 0.1
_LOG_INTERVAL_S = 5.0

# Of a terminal's width, the checkpoint's name takes a third at most; below so many columns, the bar and the speed are
# all there is room for.
_NAMES_SHARE = 3
_WIDE_COLUMNS = 100


def watch(progress: bool | OnProgress, recorder: Recorder) -> Watch:
    """An async context manager that shows progress for as long as its block runs.

    Args:
        progress: As the option of that name.
        recorder: Says how far the load is.
    """
    if not progress:
        return Watch(recorder, None, 0.0)
    if callable(progress):
        return Watch(recorder, lambda: _Callback(progress), _BAR_INTERVAL_S)
    if sys.stderr is not None and sys.stderr.isatty():
        return Watch(recorder, lambda: _Bar(recorder.uri), _BAR_INTERVAL_S)
    return Watch(recorder, lambda: _LogLine(recorder.uri), _LOG_INTERVAL_S)


class _Display(Protocol):
    def show(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class Watch:
    """Shows a recorder's progress at intervals, on a task of its own.

    A load does not die of its spectators: a display that raises is logged once and not used again.
    """

    def __init__(self, recorder: Recorder, make_display: Callable[[], _Display] | None, interval_s: float) -> None:
        self._recorder = recorder
        self._make_display = make_display
        self._interval_s = interval_s
        self._display: _Display | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    async def __aenter__(self) -> Self:
        if self._make_display is not None:
            with self._tolerating():
                self._display = self._make_display()
            self._task = asyncio.create_task(self._tick(), name="progress")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is None:
            return
        self._stop.set()
        await asyncio.wait([self._task])
        if kind is None:
            self._show()
        with self._tolerating():
            if self._display is not None:
                self._display.close()

    async def _tick(self) -> None:
        while not self._stop.is_set() and self._display is not None:
            self._show()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._stop.wait()

    def _show(self) -> None:
        with self._tolerating():
            if self._display is not None:
                self._display.show(self._recorder.progress())

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._display = None
            _logger.exception("showing progress failed; it is not shown any more")


def _shown(uri: str, most: int | None = None) -> str:
    """A URI without anything that a terminal would act on, and with its middle left out where it is too long."""
    text = uri if uri.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in uri)
    if most is None or len(text) <= most:
        return text
    kept = max(2, most - 1)
    return f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"


def _tensors(progress: Progress) -> str:
    return format_count(progress.total_tensors, "tensor")


class _Callback:
    def __init__(self, call: Callable[[Progress], None]) -> None:
        self.show = call

    def close(self) -> None:
        pass


class _Bar:
    """A bar on stderr, drawn by rich."""

    def __init__(self, uri: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        console = Console(stderr=True)
        columns = [
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
        ]
        if console.width >= _WIDE_COLUMNS:
            columns += [
                TextColumn("{task.fields[tensors]}", markup=False, table_column=Column(no_wrap=True)),
                TimeElapsedColumn(),
            ]
        self._bar = RichProgress(
            *columns,
            console=console,
            auto_refresh=False,
            # rich leads what is printed meanwhile around the bar, to stderr: right only where both are the terminal.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(_shown(uri, console.width // _NAMES_SHARE), total=None, tensors="")
        self._bar.start()

    def show(self, progress: Progress) -> None:
        self._bar.update(
            self._task,
            completed=progress.read_bytes,
            total=progress.total_bytes or None,
            tensors=f"{progress.taken_tensors}/{_tensors(progress)}" if progress.total_tensors else "",
            refresh=True,
        )

    def close(self) -> None:
        self._bar.stop()


class _LogLine:
    def __init__(self, uri: str) -> None:
        self._uri = _shown(uri)

    def show(self, progress: Progress) -> None:
        if not progress.total_bytes:
            _logger.info("%s: reading headers, %s so far", self._uri, format_seconds(progress.seconds))
            return
        tensors = ""
        if progress.total_tensors:
            tensors = f", {progress.taken_tensors} of {_tensors(progress)} taken"
        _logger.info(
            "%s: %s of %s (%d%%)%s, %s so far, %.2f GB/s",
            self._uri,
            format_bytes(progress.read_bytes),
            format_bytes(progress.total_bytes),
            100 * progress.read_bytes // progress.total_bytes,
            tensors,
            format_seconds(progress.seconds),
            progress.read_bytes / progress.seconds / 1e9,
            # For who writes lines that machines read.
            extra={"fields": {"read_bytes": progress.read_bytes, "total_bytes": progress.total_bytes}},
        )

    def close(self) -> None:
        pass
