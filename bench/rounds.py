"""Runs the loaders of a scenario in interleaved rounds, each run in a process of its own.

A B C, A B C, …: whatever else happens on the machine hurts all alike. In round 0 every loader's tensors are compared
with what was written, which also warms up what can be warmed up; it is not counted. Each run is written down when it
ends, so that the same command goes on where it was interrupted, as long as neither machine nor code have changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import datasets, machine, origin, results
from bench.datasets import Dataset
from bench.loaders import NAMES, loader_named
from bench.loaders.base import Destination, Job, Loader
from bench.measure import Request
from bench.results import Report, Run
from bench.scenarios import MEMORY_BYTES, SCENARIOS, Scenario

ROOT = Path(__file__).resolve().parent.parent
# A loader that hangs must not hold up the others for long, and the slowest of them moves 8 GB at 50 MB/s.
_RUN_S = 300.0
_DROP_TRIES = 20
# The nearest peers: of those that read local files, and of those that read S3.
_NEAREST = {
    False: ("limit", "streamload", "runai", "fastsafetensors"),
    True: ("limit", "streamload", "runai", "obstore"),
}
# What a loader must find as it is by default, or as the benchmark sets it.
_FOREIGN = ("STREAMLOAD_", "RUNAI_STREAMER_", "FASTSAFETENSORS_", "INSTANTTENSOR_")


class NotRunnableError(RuntimeError):
    """The scenario cannot run here; the text says why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user wants of a run.

    Attributes:
        data: The folder for checkpoints.
        loaders: Their names; None for all.
        size_bytes: Of the checkpoint; None for the scenario's own.
        rounds: That are counted.
        quick: The nearest peers only, smaller checkpoints, fewer destinations.
        endpoint: An S3 endpoint of the user's own; None for the one that bench/ starts.
        bucket: ``bucket`` or ``bucket/prefix`` there.
        runs: The file that single runs are written to, and found in by the next try; None to keep none.
        say: Told what is going on.
    """

    data: Path
    loaders: tuple[str, ...] | None = None
    size_bytes: int | None = None
    rounds: int = 5
    quick: bool = False
    endpoint: str | None = None
    bucket: str | None = None
    runs: Path | None = None
    say: Callable[[str], None] = lambda text: None

    def names_for(self, scenario: Scenario) -> tuple[str, ...]:
        """The loaders, in the order of the tables."""
        wanted = self.loaders or (_NEAREST[scenario.remote] if self.quick else NAMES)
        return tuple(name for name in NAMES if name in wanted)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the checkpoint is read from, for the processes that read it."""

    uri: str
    files: tuple[str, ...]
    endpoint: str | None
    environ: dict[str, str]
    command_prefix: list[str]
    congestion_control: str | None = None


def run_scenario(name: str, settings: Settings, until: float | None = None) -> Report:
    """Run a scenario.

    Args:
        name: The scenario's.
        settings: What the user wants.
        until: `time.monotonic` after which no further round is begun, once one has been counted.

    Returns:
        Its results; where it cannot run here, a report that says why and has none.
    """
    scenario = SCENARIOS[name]
    described = machine.describe()
    size_bytes = settings.size_bytes or (scenario.quick_bytes if settings.quick else scenario.size_bytes)
    try:
        if scenario.device != "cpu" and described["gpu"] is None:
            raise NotRunnableError(machine.gpu()[1])
        settings.say(f"{name}: a checkpoint of {size_bytes / 1e9:.2f} GB")
        dataset = datasets.make(scenario.dataset, size_bytes, settings.data)
        with _place(scenario, dataset, settings) as place:
            return _Rounds(scenario, dataset, place, settings, described, until).run()
    except NotRunnableError as error:
        return Report(name, size_bytes, described, [], skipped=str(error))


class _Rounds:
    """The rounds of one scenario, their environment being there."""

    def __init__(
        self,
        scenario: Scenario,
        dataset: Dataset,
        place: Place,
        settings: Settings,
        described: dict[str, Any],
        until: float | None,
    ) -> None:
        self.scenario, self.dataset, self.place, self.settings, self.until = scenario, dataset, place, settings, until
        self.destinations = (settings.quick and scenario.quick) or scenario.destinations
        tuned = machine.tuning(self.job(self.destinations[0]))
        self.fingerprint = machine.fingerprint(
            described | {"tuning": tuned, "dataset": dataset.name, "endpoint": settings.endpoint}
        )
        self.machine = described | {
            "tuning": {name: tuned[name] for name in settings.names_for(scenario) if name in tuned},
            "memory_limit_bytes": MEMORY_BYTES,
            "tensors": dataset.tensors,
            "tensor_bytes": dataset.tensor_bytes,
        }
        if scenario.remote:
            self.machine["origin_congestion_control"] = place.congestion_control
            self.machine["endpoint"] = "the user's own" if settings.endpoint else "bench.origin"
        if dataset.size_bytes < scenario.least_bytes * 0.95:
            self.machine["too_small"] = f"meant for {scenario.least_bytes / 1e9:.1f} GB and more"

    def run(self) -> Report:
        able, not_run = self._able()
        journal = Journal(self.settings.runs, self.scenario.name, self.fingerprint)
        for number in range(self.settings.rounds + 1):
            if number > 1 and self.until is not None and time.monotonic() > self.until:
                self.settings.say(f"{self.scenario.name}: the time is up after {number - 1} rounds")
                break
            for destination, loader in able:
                run = journal.find(loader.name, destination, number)
                if run is None and not journal.gave_up(loader.name, destination) and not self._spared(loader, number):
                    run = self._one(loader, destination, number)
                    journal.add(run)
                    self._say(run)
        report = results.summarize(self.scenario.name, self.dataset.size_bytes, self.machine, journal.runs(), not_run)
        return replace(report, results=sorted(report.results, key=self._place_in_table))

    def _place_in_table(self, result: results.Result) -> tuple[bool, int, int]:
        """What was run first; the destinations and loaders in their order."""
        return result.correct is None, self.destinations.index(result.destination), NAMES.index(result.loader)

    def job(self, destination: Destination) -> Job:
        place = self.place
        return Job(
            scenario=self.scenario.name,
            destination=destination,
            uri=place.uri,
            files=place.files,
            sizes=self.dataset.sizes,
            memory_bytes=MEMORY_BYTES,
            device=self.scenario.device,
            endpoint=place.endpoint,
        )

    def _able(self) -> tuple[list[tuple[Destination, Loader]], dict[tuple[str, str], str]]:
        """Who can do what, and why not."""
        able: list[tuple[Destination, Loader]] = []
        not_run: dict[tuple[str, str], str] = {}
        for destination in self.destinations:
            for name in self.settings.names_for(self.scenario):
                loader = loader_named(name)
                job = self.job(destination)
                reason = loader.reason_not(job) or self._unprepared(loader)
                if reason is None and self._by_command(destination, loader) and loader.command(job) is None:
                    reason = "has no command line"
                if reason is None:
                    able.append((destination, loader))
                elif not (name == "limit" and destination == "params"):
                    not_run[name, destination] = reason
        return able, not_run

    def _by_command(self, destination: Destination, loader: Loader) -> bool:
        """Whether it is the loader's command line that is measured; the limit has none, and needs none."""
        return self.scenario.whole_process and destination == "drain" and loader.makes_tensors

    def _unprepared(self, loader: Loader) -> str | None:
        """Let the loader make what it needs; why it could not."""
        if type(loader).prepare is Loader.prepare:
            return None
        local = local_place(self.dataset)
        job = replace(self.job("drain"), uri=local.uri, files=local.files, device="cpu")
        try:
            self._ask(Request(loader.name, job, str(self.dataset.folder), action="prepare"), {})
        except RunFailedError as error:
            return f"could not be prepared: {error}"
        return None

    def _spared(self, loader: Loader, number: int) -> bool:
        return number == 0 and self.scenario.paced and not loader.makes_tensors

    def _one(self, loader: Loader, destination: Destination, number: int) -> Run:
        run = Run(loader.name, destination, number)
        job = self.job(destination)
        if self.scenario.place == "cold":
            self._drop_from_page_cache()
        try:
            if self._by_command(destination, loader):
                return self._command(loader, job, run)
            with contextlib.ExitStack() as stack:
                if destination == "stage":
                    target = stack.enter_context(tempfile.TemporaryDirectory(dir=self.settings.data))
                    job = replace(job, target=target)
                return self._measured(loader, job, run)
        except RunFailedError as error:
            return replace(run, error=str(error))

    def _drop_from_page_cache(self) -> None:
        # More than once: somebody else on this machine may be reading these files, a search for example.
        for _ in range(_DROP_TRIES):
            reason = datasets.drop_from_page_cache(self.dataset.folder)
            if reason is None:
                return
        raise NotRunnableError(str(reason))

    def _measured(self, loader: Loader, job: Job, run: Run) -> Run:
        began = time.perf_counter() if self.scenario.whole_process else None
        action = "check" if run.number == 0 else "run"
        request = Request(loader.name, job, str(self.dataset.folder), action, began)
        found = self._ask(request, loader.environ(job))
        outcome = found["outcome"]
        verified = outcome["verified_bytes"]
        return replace(
            run,
            seconds=found["seconds"],
            cpu_s=found["cpu_s"],
            peak_rss_bytes=found["peak_rss_bytes"],
            above_imports_bytes=found["above_imports_bytes"],
            wrong=found["wrong"],
            error=unverified(verified, outcome["read_bytes"]),
            notes=outcome["notes"] | ({} if verified is None else {"verified_bytes": verified}),
        )

    def _command(self, loader: Loader, job: Job, run: Run) -> Run:
        """The loader's own command line, from its start to its end; all of its processor time and memory."""
        command = loader.command(job)
        assert command is not None
        began = time.perf_counter()
        with self._started(command, loader.environ(job), stdin=b"") as process:
            output, usage = process.finish(_RUN_S)
        seconds = time.perf_counter() - began
        return replace(
            run,
            seconds=seconds,
            cpu_s=usage.ru_utime + usage.ru_stime,
            peak_rss_bytes=usage.ru_maxrss * 1024,
            notes={"command": " ".join(["streamload", *command[3:4]]), "output_bytes": len(output)},
        )

    def _ask(self, request: Request, environ: dict[str, str]) -> dict[str, Any]:
        """Have a process of its own do it."""
        command = [sys.executable, "-m", "bench.measure"]
        with self._started(command, environ, stdin=request.to_json().encode()) as process:
            output, _ = process.finish(_RUN_S)
        try:
            answer: dict[str, Any] = json.loads(output.decode().splitlines()[-1])
        except (ValueError, IndexError) as error:
            raise RunFailedError(f"gave no answer: {output[-200:]!r}") from error
        return answer

    @contextlib.contextmanager
    def _started(self, command: list[str], environ: dict[str, str], *, stdin: bytes) -> Iterator[_Process]:
        with _Process([*self.place.command_prefix, *command], self._environ(environ), stdin) as process:
            yield process

    def _environ(self, tuned: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        if self.scenario.remote and self.settings.endpoint is None:
            kept = {
                name: value
                for name, value in kept.items()
                if not name.startswith("AWS_") and not name.lower().endswith("_proxy")
            }
        return kept | self.place.environ | tuned

    def _say(self, run: Run) -> None:
        what = f"{self.scenario.name} {run.destination} {run.loader}"
        if run.wrong or run.error:
            self.settings.say(f"{what}: {run.wrong or run.error}")
        elif run.number == 0:
            self.settings.say(f"{what}: compared")
        elif run.seconds is not None:
            rate = self.dataset.size_bytes / run.seconds / 1e9
            self.settings.say(f"{what}: round {run.number}, {run.seconds:.2f} s, {rate:.2f} GB/s")


def unverified(verified_bytes: int | None, read_bytes: int | None) -> str | None:
    """Why a run does not count whose loader was to verify all that it read; None where it did, or verifies nothing."""
    if read_bytes is None or verified_bytes == read_bytes:
        return None
    return f"verified {verified_bytes} of {read_bytes} bytes: not counted"


class RunFailedError(RuntimeError):
    """A run ended with an error; the text is its last words."""


class _Process:
    """A process in a group of its own, which ends with the context whatever happens."""

    def __init__(self, command: list[str], environ: dict[str, str], stdin: bytes) -> None:
        self._command, self._environ, self._stdin = command, environ, stdin

    def __enter__(self) -> _Process:
        # Files and no pipes: nothing has to be read while it runs, and nothing of this process runs beside it.
        self._files = contextlib.ExitStack()
        stdin = self._files.enter_context(tempfile.TemporaryFile())
        self._out = self._files.enter_context(tempfile.TemporaryFile())
        self._err = self._files.enter_context(tempfile.TemporaryFile())
        stdin.write(self._stdin)
        stdin.seek(0)
        try:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environ,
                stdin=stdin,
                stdout=self._out,
                stderr=self._err,
                start_new_session=True,
            )
        except BaseException:
            self._files.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._files.close()

    def finish(self, timeout_s: float) -> tuple[bytes, Any]:
        """Wait for its end.

        Returns:
            What it printed, and the resources it used.

        Raises:
            RunFailedError: It failed, or did not end in time.
        """
        self._wait(timeout_s)
        _, status, usage = os.wait4(self._process.pid, 0)
        # Popen must not wait for it once more.
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._out.seek(0)
        self._err.seek(0)
        errors = self._err.read().decode(errors="replace").strip().splitlines()
        if self._process.returncode != 0:
            raise RunFailedError((errors[-1] if errors else f"ended with {self._process.returncode}")[:300])
        return self._out.read(), usage

    def _wait(self, timeout_s: float) -> None:
        """Not with Popen.wait(), which loses what the process has used."""
        ended = os.pidfd_open(self._process.pid)
        try:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                raise RunFailedError(f"had not ended after {timeout_s:.0f} s")
        finally:
            os.close(ended)


class Journal:
    """The single runs of a scenario, in a file that survives an interruption.

    Runs of another machine, other code, other data or another tuning are not found again, nor are those that failed.
    """

    def __init__(self, path: Path | None, scenario: str, fingerprint: str) -> None:
        self._path, self._scenario, self._fingerprint = path, scenario, fingerprint
        self._runs: dict[tuple[str, str, int], Run] = {}
        if path is not None and path.is_file():
            for line in path.read_text().splitlines():
                self._remember(line)

    def _remember(self, line: str) -> None:
        try:
            value = json.loads(line)
        except ValueError:
            return  # the interruption came while it was written
        if (value["scenario"], value["fingerprint"]) == (self._scenario, self._fingerprint):
            run = Run(**value["run"])
            if run.seconds is not None:
                self._runs[run.loader, run.destination, run.number] = run

    def add(self, run: Run) -> None:
        """Write one down."""
        self._runs[run.loader, run.destination, run.number] = run
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = {"scenario": self._scenario, "fingerprint": self._fingerprint, "run": asdict(run)}
            with self._path.open("a") as file:
                # The line before may have been cut off.
                file.write("\n" + json.dumps(line))

    def find(self, loader: str, destination: str, number: int) -> Run | None:
        """The run of that round, where it was made."""
        return self._runs.get((loader, destination, number))

    def gave_up(self, loader: str, destination: str) -> bool:
        """Whether it failed before, or came out wrong: one such run says all."""
        return any(
            run.seconds is None or run.wrong is not None
            for run in self._runs.values()
            if (run.loader, run.destination) == (loader, destination)
        )

    def runs(self) -> list[Run]:
        """All of them."""
        return list(self._runs.values())


def local_place(dataset: Dataset) -> Place:
    """The checkpoint's own folder."""
    return Place(str(dataset.bucket), tuple(str(dataset.bucket / name) for name in dataset.files), None, {}, [])


@contextlib.contextmanager
def _place(scenario: Scenario, dataset: Dataset, settings: Settings) -> Iterator[Place]:
    """Bring the checkpoint to where the scenario reads it from.

    Raises:
        NotRunnableError: It cannot be brought there.
    """
    if scenario.place == "warm" or scenario.place == "cold":
        yield local_place(dataset)
        return
    if settings.endpoint is not None:
        yield _own_place(scenario, dataset, settings)
        return
    with contextlib.ExitStack() as stack:
        try:
            served = stack.enter_context(origin.serve(dataset.folder, variant=scenario.place))
        except origin.OriginUnavailableError as error:
            raise NotRunnableError(str(error)) from error
        yield Place(
            uri=f"s3://{served.bucket}",
            files=dataset.files,
            endpoint=served.endpoint_url,
            environ=dict(served.environ),
            command_prefix=list(served.command_prefix),
            congestion_control=served.congestion_control,
        )


def _own_place(scenario: Scenario, dataset: Dataset, settings: Settings) -> Place:
    """A bucket of the user's own; files that it lacks are put there."""
    assert settings.endpoint is not None
    if scenario.place not in ("http", "tls"):
        raise NotRunnableError("only the server of bench/ can be slowed down")
    if settings.endpoint.startswith("https:") != (scenario.place == "tls"):
        raise NotRunnableError(f"the endpoint is {settings.endpoint.partition(':')[0]}")
    bucket, _, prefix = (settings.bucket or datasets.BUCKET).strip("/").partition("/")
    folder = f"{prefix}/{dataset.name}" if prefix else dataset.name
    settings.say(f"{scenario.name}: putting what is missing into s3://{bucket}/{folder}")
    asyncio.run(datasets.upload(dataset, settings.endpoint, bucket, f"{folder}/"))
    return Place(
        uri=f"s3://{bucket}/{folder}",
        files=tuple(f"{folder}/{name}" for name in dataset.files),
        endpoint=settings.endpoint,
        environ={"AWS_ENDPOINT_URL": settings.endpoint},
        command_prefix=[],
    )
