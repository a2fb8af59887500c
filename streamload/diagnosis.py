"""What a person needs to know when a load is slow or refused: gathered, and judged where that is possible."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any, Unpack, cast

from streamload._version import __version__
from streamload.errors import MissingDependencyError, OptionError, StreamloadError
from streamload.host import HostLimits, host_limits
from streamload.inspection import inspect
from streamload.options import LoadOptions, Options, ResolvedOption, proxies, resolve
from streamload.pipeline.engine import new_event_loop, run_in_thread
from streamload.planning import effective_reads, source_for
from streamload.sources import Source
from streamload.units import format_bytes, format_count, format_range, format_seconds
from streamload.uris import scrub, scrub_uri

__all__ = ["Diagnosis", "Finding", "doctor"]

# What loads need, and what changes how they work.
_PACKAGES = ("torch", "safetensors", "aiobotocore", "botocore", "uvloop", "awscrt", "runai-model-streamer")

# A person waits for the answer. What has not come by then is the finding.
_DESCRIBE_TIMEOUT_S = 30.0
_INSPECT_TIMEOUT_S = 60.0

# Beside one for each read in flight: the shard files that a folder's source keeps open (256 at most), and what a
# program with torch and an event loop or two has open anyway.
_OTHER_OPEN_FILES = 320

# S3 refuses a request that was signed more than 15 minutes off its own clock. A clock that is this wrong is not kept.
_CLOCK_OFFSET_S = 5 * 60.0

# No load takes more staging memory by default, and none of it is used for longer than a moment here.
_STAGING_TRIED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: What it belongs to: ``options``, ``versions``, ``host``, ``device``, ``source``, ``checkpoint``, ``use``.
        name: What was looked at.
        value: What was found, on one line and without credentials.
        note: Where it comes from, or what to do about it; empty where there is nothing to say.
        ok: Whether it can stay as it is.
    """

    topic: str
    name: str
    value: str
    note: str = ""
    ok: bool = True

    def __str__(self) -> str:
        return f"{self.value} - {self.note}" if self.note else self.value


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was looked at.

    Attributes:
        findings: In the order of their topics.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether everything can stay as it is."""
        return all(finding.ok for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The findings and the verdict, ready for JSON."""
        return {"ok": self.ok, "findings": [dataclasses.asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        lines: list[str] = []
        for topic, group in groupby(self.findings, key=lambda finding: finding.topic):
            findings = list(group)
            width = max(len(finding.name) for finding in findings)
            lines.append(topic)
            lines += [f"{' ' if each.ok else '!'} {each.name:<{width}}  {each}" for each in findings]
            lines.append("")
        wrong = sum(not finding.ok for finding in self.findings)
        lines.append(f"! needs attention: {wrong} of {len(self.findings)}" if wrong else "everything is in order")
        return "\n".join(lines)


def doctor(uri: str | os.PathLike[str] | None = None, **options: Unpack[Options]) -> Diagnosis:
    """Look at everything that decides how a load goes, and at a checkpoint if one is named.

    Nothing is loaded: of the checkpoint only the headers are read. It imports torch, where that is installed.

    Args:
        uri: As for `streamload.open`; None to look at this machine only.
        **options: The fields of `LoadOptions`, as the load would get them.

    Returns:
        What was found. Whatever fails is a finding too, with ``ok=False``.

    Raises:
        OptionError: An option has no meaning, or no source serves the URI.
    """
    resolved, origins = resolve(cast("dict[str, Any]", options))
    name = None if uri is None else os.fspath(uri)
    fixed = None if resolved.concurrency == "auto" else resolved.concurrency
    source = None if name is None else source_for(name, resolved)
    concurrency = fixed or (0 if source is None else source.most_concurrency or source.concurrency)
    findings = [
        *_options(origins),
        *_versions(),
        *_host(resolved, concurrency),
        *_device(resolved),
    ]
    if source is not None and name is not None:
        findings += [*_source(source), _checkpoint(name, options)]
    findings += _use(resolved, source)
    return Diagnosis(tuple(findings))


def _options(origins: tuple[ResolvedOption, ...]) -> Iterator[Finding]:
    for option in origins:
        yield Finding("options", option.name, option.value, option.origin)


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "streamload", __version__)
    yield Finding("versions", "python", platform.python_version(), platform.python_implementation())
    yield Finding("versions", "system", f"{platform.system()} {platform.release()}", platform.machine())
    for package in _PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        yield Finding("versions", package, found)


def _host(options: LoadOptions, concurrency: int) -> Iterator[Finding]:
    limits = host_limits()
    assert options.memory_bytes is not None
    enough = options.memory_bytes <= limits.available_bytes
    yield Finding(
        "host",
        "memory",
        f"{format_bytes(limits.available_bytes)} available",
        f"what the {limits.bound_by} leaves" + ("" if enough else ", less than memory_bytes"),
        ok=enough,
    )
    yield _open_files(limits, concurrency)
    locked = "no limit" if limits.locked_bytes is None else format_bytes(limits.locked_bytes)
    yield Finding("host", "locked memory", locked)
    for variable, value in proxies().items():
        yield Finding("host", variable, _without_user(value), "from the environment")


def _open_files(limits: HostLimits, concurrency: int) -> Finding:
    needed = concurrency + _OTHER_OPEN_FILES
    enough = limits.open_files >= needed
    note = "" if enough else f"up to {needed} may be needed: raise it with ulimit -n"
    return Finding("host", "open files", str(limits.open_files), note, ok=enough)


def _without_user(proxy: str) -> str:
    """A proxy's address without user name and password, whether or not it has a scheme."""
    scheme, separator, rest = proxy.rpartition("://")
    return scheme + separator + rest.rpartition("@")[2]


def _device(options: LoadOptions) -> Iterator[Finding]:
    try:
        torch = import_module("torch")
    # Whatever an installation that is broken comes up with: a library that is not there, one that does not fit.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            # As in the image of an init container.
            note = "inspect, stage and serve need none; to load tensors: pip install 'streamload[torch]'"
            yield Finding("device", "torch", "not installed", note, ok=options.device == "cpu")
            return
        missing = MissingDependencyError(f"{type(error).__name__}: {error}")
        yield Finding("device", "torch", "cannot be imported", _line(missing), ok=False)
        return
    if torch.version.cuda is None and torch.version.hip is None:
        yield Finding("device", "cuda", "none", f"torch {torch.__version__} was built without CUDA")
    elif not torch.cuda.is_available():
        yield Finding("device", "cuda", "none", "no GPU is visible to this process, or its driver does not fit")
    else:
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            yield Finding("device", f"cuda:{number}", found.name, format_bytes(found.total_memory))
    yield from _destination(options)


def _destination(options: LoadOptions) -> Iterator[Finding]:
    """Whether tensors can go where they should; in host memory they can."""
    if options.device == "cpu":
        return
    try:
        locked = _page_lock(options)
    except (StreamloadError, OSError) as error:
        yield Finding("device", options.device, "cannot be used", _line(error), ok=False)
    else:
        note = "" if locked else "copies to the device will be slow: see the limit on locked memory"
        yield Finding("device", "page-locked staging", "possible" if locked else "refused", note, ok=locked)


def _page_lock(options: LoadOptions) -> bool:
    """Try what a load would do: the limit alone does not tell, since not every driver keeps to it."""
    from streamload.sinks.device import open_device
    from streamload.sinks.staging import Staging

    assert options.memory_bytes is not None
    with closing(open_device(options.device)) as device:
        staging = Staging(min(options.memory_bytes, _STAGING_TRIED_BYTES))
        locked = device.register(staging.memory)
        if locked:
            device.unregister(staging.memory)
    return locked


def _source(source: Source) -> Iterator[Finding]:
    async def ask() -> Mapping[str, str]:
        async with asyncio.timeout(_DESCRIBE_TIMEOUT_S), source:
            return await source.describe()

    try:
        facts = run_in_thread(ask)
    except StreamloadError as error:
        yield Finding("source", source.scheme, "cannot be asked", _line(error), ok=False)
    except TimeoutError:
        note = f"nothing within {_DESCRIBE_TIMEOUT_S:g} s"
        yield Finding("source", source.scheme, "does not answer", note, ok=False)
    else:
        for name, value in facts.items():
            off = name == "clock offset" and _seconds(value) > _CLOCK_OFFSET_S
            note = "requests are refused from 15 min on: set this machine's clock" if off else ""
            yield Finding("source", name, scrub(value), note, ok=not off)


def _seconds(offset: str) -> float:
    """How far off a clock is by its description: ``+12 s``."""
    match = re.match(r"[+-]?(\d+(?:\.\d+)?) s\b", offset)
    return float(match[1]) if match else 0.0


def _checkpoint(uri: str, options: Options) -> Finding:
    limited: Options = {"deadline_s": _INSPECT_TIMEOUT_S, **options}
    began_s = time.perf_counter()
    try:
        found = inspect(uri, **limited)
    except OptionError:
        raise
    except StreamloadError as error:
        return Finding("checkpoint", scrub_uri(uri), "cannot be read", _line(error), ok=False)
    seconds = time.perf_counter() - began_s
    catalog = found.plan.catalog
    return Finding(
        "checkpoint",
        found.uri,
        f"{format_count(len(catalog.files), 'file')}, {format_count(catalog.tensors, 'tensor')}, "
        f"{format_bytes(found.plan.tensor_bytes)}",
        f"headers read in {format_seconds(seconds)} with {format_count(found.requests, 'request')}",
    )


def _use(options: LoadOptions, source: Source | None) -> Iterator[Finding]:
    loop = new_event_loop()
    loop.close()
    yield Finding("use", "event loop", type(loop).__module__.partition(".")[0])
    yield Finding("use", "device", options.device)
    assert options.memory_bytes is not None
    yield Finding("use", "memory", format_bytes(options.memory_bytes))
    if source is not None:
        read_bytes, concurrency, most = effective_reads(source, options)
        yield Finding("use", "source", source.scheme, type(source).__qualname__)
        yield Finding("use", "reads", f"{format_range(concurrency, most)} of {format_bytes(read_bytes)} in flight")


def _line(error: BaseException) -> str:
    return scrub(" ".join(str(error).split()))
