"""A load's options: frozen, checked when they are made, and the only place that reads environment variables."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, TypedDict, cast

from streamload.errors import OptionError
from streamload.events import OnEvent, OnProgress
from streamload.host import host_limits
from streamload.plan import LEAST_READ_BYTES
from streamload.units import format_bytes, parse_bytes

__all__ = ["Concurrency", "LoadOptions", "Options", "Order", "ResolvedOption", "Verify", "proxies", "resolve"]

Order: TypeAlias = Literal["completion", "file"]
Verify: TypeAlias = Literal["auto", "off"]
Concurrency: TypeAlias = "int | Literal['auto']"

_logger = logging.getLogger(__name__)

_PREFIX = "STREAMLOAD_"
# How like an option's name a variable's must be to be taken for it, misspelt. Others are not ours: Kubernetes sets some
# for a service that is called streamload.
_ALIKE = 0.65
_PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")

_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,4})?")

# The default memory limit: a share of what the container has left, and no more than is of any use. A gigabyte keeps
# some dozens of connections to an object store busy; beyond it only a slow consumer would fill the rest.
_MEMORY_SHARE = 4
_MEMORY_DEFAULT_MOST = 1 << 30
_MEMORY_LEAST = 1 << 20
_CONCURRENCY_MOST = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """What a load should do. Every field has a default; `resolve` fills in what depends on the machine.

    Attributes:
        device: Where tensors go: ``cpu``, ``cuda``, ``cuda:1``.
        include: Globs of tensor names; only matching tensors are read. None given: all.
        exclude: Globs of tensor names that are left out.
        memory_bytes: The limit on bytes in flight, staged, or finished and not yet taken. None: a quarter of the
            memory that the container has left, shared between the node's ranks, at most 1 GiB.
        strict_memory: Whether a tensor larger than ``memory_bytes`` is an error, rather than raising the limit.
        read_bytes: How large a read should be; never more than a quarter of ``memory_bytes``. None: what the source
            prefers.
        concurrency: How many reads are in flight; ``"auto"``: what the source prefers, and for an object store what
            turns out to bring the most.
        max_bytes_per_s: The load takes no more than so many bytes a second from the source, on average over a second or
            so, whatever the link would bear: for those who share it. None: no limit.
        order: ``"completion"`` yields tensors as they are complete, ``"file"`` in the order of the files' bytes.
        deadline_s: The load ends with an error when it has not ended by itself after so many seconds. None: no limit.
        verify: ``"auto"`` checks content against the checksums that the source keeps; ``"off"`` does not.
        s3_anonymous: Whether S3 is asked without credentials, as a public bucket may be; none are looked for then.
        progress: True draws a bar on stderr where that is a terminal, and logs a line every few seconds elsewhere. A
            callable is given a `Progress` instead, several times a second, on the load's own thread.
        on_event: Is given an `Event` for each span of work, on the thread where it ended. It must be quick.
    """

    device: str = "cpu"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    memory_bytes: int | None = None
    strict_memory: bool = False
    read_bytes: int | None = None
    concurrency: Concurrency = "auto"
    max_bytes_per_s: float | None = None
    order: Order = "completion"
    deadline_s: float | None = None
    verify: Verify = "auto"
    s3_anonymous: bool = False
    progress: bool | OnProgress = False
    on_event: OnEvent | None = None

    def __post_init__(self) -> None:
        if type(self.device).__module__ == "torch":  # a torch.device; torch itself is not needed here
            object.__setattr__(self, "device", str(self.device))
        device_ok = isinstance(self.device, str) and _DEVICE.fullmatch(self.device) is not None
        _check(device_ok, "device", self.device, "cpu, cuda or cuda:N")
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            if isinstance(globs, str):
                # A lone string is a sequence of letters, each of them a valid glob: surely not what was meant.
                raise OptionError(f"{name}={globs!r} is a string: give a list of globs")
            _check(isinstance(globs, Iterable), name, globs, "a list of globs")
            globs = tuple(globs)
            _check(all(isinstance(glob, str) for glob in globs), name, globs, "a list of globs")
            object.__setattr__(self, name, globs)
        if self.memory_bytes is not None:
            _check_integer("memory_bytes", self.memory_bytes, _MEMORY_LEAST)
        if self.read_bytes is not None:
            _check_integer("read_bytes", self.read_bytes, LEAST_READ_BYTES)
        if self.concurrency != "auto":
            _check_integer("concurrency", self.concurrency, 1, _CONCURRENCY_MOST)
        if self.max_bytes_per_s is not None:
            _check_positive("max_bytes_per_s", self.max_bytes_per_s, "bytes a second above zero")
        _check(self.order in ("completion", "file"), "order", self.order, "'completion' or 'file'")
        _check(self.verify in ("auto", "off"), "verify", self.verify, "'auto' or 'off'")
        if self.deadline_s is not None:
            _check_positive("deadline_s", self.deadline_s, "seconds above zero")
        for name in ("strict_memory", "s3_anonymous"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        progress_ok = isinstance(self.progress, bool) or callable(self.progress)
        _check(progress_ok, "progress", self.progress, "True, False or a callable")
        _check(self.on_event is None or callable(self.on_event), "on_event", self.on_event, "a callable")


class Options(TypedDict, total=False):
    """`LoadOptions` as keyword arguments."""

    device: str
    include: Sequence[str]
    exclude: Sequence[str]
    memory_bytes: int | None
    strict_memory: bool
    read_bytes: int | None
    concurrency: Concurrency
    max_bytes_per_s: float | None
    order: Order
    deadline_s: float | None
    verify: Verify
    s3_anonymous: bool
    progress: bool | OnProgress
    on_event: OnEvent | None


@dataclass(frozen=True, slots=True)
class ResolvedOption:
    """One option's effective value.

    Attributes:
        name: The option.
        value: Its value, as text.
        origin: Where it came from: ``argument``, ``environment (STREAMLOAD_…)`` or ``default``, with the reason.
    """

    name: str
    value: str
    origin: str


def resolve(
    given: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> tuple[LoadOptions, tuple[ResolvedOption, ...]]:
    """Put together what the caller gave, what the environment says, and the defaults, in this order.

    Args:
        given: Keyword arguments of `LoadOptions`.
        environment: In place of the process's environment.

    Returns:
        The options, with ``memory_bytes`` filled in, and where each value came from.

    Raises:
        OptionError: An unknown name, or a value without meaning.
    """
    environment = os.environ if environment is None else environment
    known = {field.name: field.default for field in dataclasses.fields(LoadOptions)}
    for name in given:
        if name not in known:
            raise OptionError(f"there is no option {name!r}; there are {', '.join(known)}")
    _warn_of_misspelt(environment)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, parse in _FROM_ENVIRONMENT.items():
        variable = _PREFIX + name.upper()
        text = environment.get(variable)
        if text is not None and name not in given:
            try:
                values[name] = parse(text)
            except ValueError as error:
                raise OptionError(f"{variable}={text!r}: {error}") from error
            origins[name] = f"environment ({variable})"
    values.update(given)
    origins.update(dict.fromkeys(given, "argument"))
    if values.get("memory_bytes") is None:
        values["memory_bytes"], origins["memory_bytes"] = _default_memory(environment)
    try:
        options = LoadOptions(**values)
    except OptionError as error:
        # Every refusal of a value begins with the option's name.
        origin = origins.get(error.cause.partition("=")[0], "")
        variable = origin.removeprefix("environment (").removesuffix(")")
        if variable == origin:
            raise
        raise OptionError(f"{variable}={environment[variable]!r}: {error.cause}") from None
    return options, tuple(
        ResolvedOption(name, _shown(name, getattr(options, name)), origins.get(name, "default")) for name in known
    )


def proxies(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The proxy settings that this process runs under, by variable; lower-case spellings count."""
    environment = os.environ if environment is None else environment
    found = {name: environment.get(name.lower()) or environment.get(name) for name in _PROXY_VARIABLES}
    return {name: value for name, value in found.items() if value}


def _warn_of_misspelt(environment: Mapping[str, str]) -> None:
    names = [name.upper() for name in _FROM_ENVIRONMENT]
    for variable in environment:
        name = variable.removeprefix(_PREFIX)
        if name != variable and name not in names and (alike := get_close_matches(name.upper(), names, 1, _ALIKE)):
            _logger.warning("%s is no option, and is ignored: is %s meant?", variable, _PREFIX + alike[0])


def _default_memory(environment: Mapping[str, str]) -> tuple[int, str]:
    """This rank's share of what the container has left."""
    text = environment.get("LOCAL_WORLD_SIZE") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(f"LOCAL_WORLD_SIZE={text!r} is not a number of ranks")
    limits = host_limits()
    share = limits.available_bytes // _MEMORY_SHARE // int(text)
    nbytes = max(_MEMORY_LEAST, min(_MEMORY_DEFAULT_MOST, share))
    available = format_bytes(limits.available_bytes)
    return nbytes, f"default (of {available} that the {limits.bound_by} leaves, {text} ranks on this node)"


def _parse_flag(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("neither true nor false")


def _parse_concurrency(text: str) -> Concurrency:
    return "auto" if text.strip() == "auto" else int(text)


def _parse_globs(text: str) -> tuple[str, ...]:
    return tuple(glob.strip() for glob in text.split(",") if glob.strip())


_FROM_ENVIRONMENT: dict[str, Callable[[str], Any]] = {
    "device": str.strip,
    "include": _parse_globs,
    "exclude": _parse_globs,
    "memory_bytes": parse_bytes,
    "strict_memory": _parse_flag,
    "read_bytes": parse_bytes,
    "concurrency": _parse_concurrency,
    "max_bytes_per_s": parse_bytes,
    "order": str.strip,
    "deadline_s": float,
    "verify": str.strip,
    "s3_anonymous": _parse_flag,
    "progress": _parse_flag,
}


def _shown(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value} ({format_bytes(value)})"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, tuple):
        return ", ".join(value) if value else "none"
    if name == "max_bytes_per_s":
        return "no limit" if value is None else str(value)
    return "the source's choice" if name == "read_bytes" and value is None else str(value)


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise OptionError(f"{name}={value!r} is not {expected}")


def _check_positive(name: str, value: object, expected: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    _check(number and 0 < cast("float", value) < float("inf"), name, value, expected)


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    holds = type(value) is int and value >= least and (most is None or value <= most)
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    _check(holds, name, value, f"a whole number {bounds}")
