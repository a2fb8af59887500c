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

from streamload.checkpoint.rank_files import RankFiles
from streamload.errors import OptionError
from streamload.events import OnEvent, OnProgress
from streamload.host import HostLimits, host_limits
from streamload.plan import LEAST_READ_BYTES, Placement, Placements, Ranks, Uneven
from streamload.units import format_bytes, parse_bytes

__all__ = [
    "Concurrency",
    "LoadOptions",
    "Options",
    "Order",
    "Placed",
    "Rank",
    "ResolvedOption",
    "Verify",
    "default_memory_bytes",
    "from_environment",
    "parse_globs",
    "proxies",
    "resolve",
    "variables",
]

Order: TypeAlias = Literal["completion", "file"]
Verify: TypeAlias = Literal["auto", "off", "require", "sha256"]
Concurrency: TypeAlias = "int | Literal['auto']"
Rank: TypeAlias = "int | Ranks | Literal['auto'] | None"
Placed: TypeAlias = "Placements | Literal['auto']"

_logger = logging.getLogger(__name__)

_PREFIX = "STREAMLOAD_"
# How like an option's name a variable's must be to be taken for it, misspelt. Others are not ours: Kubernetes sets some
# for a service that is called streamload.
_ALIKE = 0.65
# Variables that are no options of loads, but of staging, of a sidecar and of vLLM's plugin.
_OF_OTHERS = ("STAGE_", "SERVE_", "VLLM_")
_PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")

_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,4})?")

# The default memory limit: a share of what the container has left, and no more than is of any use. A gigabyte keeps
# some dozens of connections to an object store busy; beyond it only a slow consumer would fill the rest.
_MEMORY_SHARE = 4
_MEMORY_DEFAULT_MOST = 1 << 30
_MEMORY_LEAST = 1 << 20
_CONCURRENCY_MOST = 1024

# Only some sources take these; each says which (`Source.options`).
_OF_SOURCES = (
    "http_headers",
    "s3_anonymous",
    "runai_chunk_bytes",
    "runai_request_timeout_s",
    "runai_virtual_addressing",
    "revision",
    "allow_patterns",
    "ignore_patterns",
    "download_dir",
    "cache",
)

# Their values may be secrets.
_HIDDEN = {"http_headers"}


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
        verify: ``"auto"`` checks content against a manifest beside it and the checksums that the source keeps, as far
            as there are any; ``"require"`` does so, and fails before anything is read where a byte would go unchecked;
            ``"off"`` does not. ``"sha256"`` also compares the SHA-256 that the Hub or an S3 store keeps of a file,
            which makes reads wait for each other; so does ``"require"`` where nothing else vouches for it.
        source: What serves the URI: ``"runai"``, or the scheme of any other source; None: the URI's own scheme.
        s3_anonymous: Whether S3 is asked without credentials, as a public bucket may be; none are looked for then.
        runai_chunk_bytes: How large the requests of Run:ai's engine are, in bytes. None: the engine's choice.
        runai_request_timeout_s: How long a request of that engine's to S3 may be silent before it makes it again. None:
            20 seconds.
        runai_virtual_addressing: Whether that engine names the bucket in the host's name. None: as streamload's own S3
            client does it.
        progress: True draws a bar on stderr where that is a terminal, and logs a line every few seconds elsewhere. A
            callable is given a `Progress` instead, several times a second, on the load's own thread.
        on_event: Is given an `Event` for each span of work, on the thread where it ended. It must be quick.
        http_headers: What goes with each request to an ``http://`` or ``https://`` URI's own host, a token perhaps; no
            value is ever shown. Other sources have no use for them.
        revision: Of an ``hf://`` repository: a branch, a tag or a commit. None: its default branch.
        allow_patterns: Globs of paths in an ``hf://`` repository: other files are left out. None: all count.
        ignore_patterns: The same; these files are left out.
        download_dir: The folder of the Hub's cache. None: ``HF_HUB_CACHE``, or where that is by default.
        cache: Whether files of an ``hf://`` repository that are read whole are put into that cache.
        rank: Load only what this rank needs; ``"auto"``: the rank that torchrun has given this process (``RANK``,
            ``WORLD_SIZE``, and ``LOCAL_RANK`` for a device that is just ``cuda``). `Ranks` says it in full. None: load
            everything. Of a pre-sharded checkpoint, this rank's files are read; of an ordinary one, its slices.
        world_size: How many ranks there are.
        pp_size: So many pipeline stages have a range of the layers each; the other ranks share the tensors within a
            stage. Ranks of one stage are neighbours.
        expert_parallel: Whether experts are shared out whole among the ranks of a stage.
        placements: How an ordinary checkpoint's tensors are shared out among the ranks: ``"auto"`` knows common
            decoders by the ``config.json`` beside the weights; a dict of globs and placements, or a transformers
            ``tp_plan``; or `Placements`.
        uneven: What to do where a size is not a multiple of the number of ranks: ``"error"``, or ``"ceil"`` for the
            rule of ``torch.chunk`` and transformers.
        pattern: The names of a pre-sharded checkpoint's files, over the fields ``rank``, ``tp_rank``, ``pp_rank`` and
            ``part``. None: vLLM's, and where no file is called so the checkpoint is an ordinary one.
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
    source: str | None = None
    runai_chunk_bytes: int | None = None
    runai_request_timeout_s: float | None = None
    runai_virtual_addressing: bool | None = None
    progress: bool | OnProgress = False
    on_event: OnEvent | None = None
    http_headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False, hash=False)
    revision: str | None = None
    allow_patterns: tuple[str, ...] | None = None
    ignore_patterns: tuple[str, ...] | None = None
    download_dir: str | None = None
    cache: bool = False
    rank: Rank = None
    world_size: int | None = None
    pp_size: int = 1
    expert_parallel: bool = False
    placements: Placed = "auto"
    uneven: Uneven = "error"
    pattern: str | None = None

    def __post_init__(self) -> None:
        if type(self.device).__module__ == "torch":  # a torch.device; torch itself is not needed here
            object.__setattr__(self, "device", str(self.device))
        device_ok = isinstance(self.device, str) and _DEVICE.fullmatch(self.device) is not None
        _check(device_ok, "device", self.device, "cpu, cuda or cuda:N")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _globs(name, getattr(self, name)))
        if self.memory_bytes is not None:
            _check_integer("memory_bytes", self.memory_bytes, _MEMORY_LEAST)
        if self.read_bytes is not None:
            _check_integer("read_bytes", self.read_bytes, LEAST_READ_BYTES)
        if self.concurrency != "auto":
            _check_integer("concurrency", self.concurrency, 1, _CONCURRENCY_MOST)
        if self.max_bytes_per_s is not None:
            _check_positive("max_bytes_per_s", self.max_bytes_per_s, "bytes a second above zero")
        _check(self.order in ("completion", "file"), "order", self.order, "'completion' or 'file'")
        verify_ok = self.verify in ("auto", "off", "require", "sha256")
        _check(verify_ok, "verify", self.verify, "'auto', 'off', 'require' or 'sha256'")
        if self.deadline_s is not None:
            _check_positive("deadline_s", self.deadline_s, "seconds above zero")
        self._check_ranks()
        _check(self.source is None or bool(self.source), "source", self.source, "the name of a source")
        if self.runai_chunk_bytes is not None:
            _check_integer("runai_chunk_bytes", self.runai_chunk_bytes, LEAST_READ_BYTES)
        if self.runai_request_timeout_s is not None:
            _check_positive("runai_request_timeout_s", self.runai_request_timeout_s, "seconds above zero")
        virtual = self.runai_virtual_addressing
        _check(virtual is None or isinstance(virtual, bool), "runai_virtual_addressing", virtual, "True or False")
        for name in ("strict_memory", "expert_parallel", "s3_anonymous", "cache"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        progress_ok = isinstance(self.progress, bool) or callable(self.progress)
        _check(progress_ok, "progress", self.progress, "True, False or a callable")
        _check(self.on_event is None or callable(self.on_event), "on_event", self.on_event, "a callable")
        if not isinstance(self.http_headers, Mapping):
            raise OptionError("http_headers is not a mapping of names to values")
        object.__setattr__(self, "http_headers", dict(self.http_headers))
        for name in ("allow_patterns", "ignore_patterns"):
            if (patterns := getattr(self, name)) is not None:
                # A lone pattern is what huggingface_hub takes, too.
                object.__setattr__(self, name, _globs(name, [patterns] if isinstance(patterns, str) else patterns))
        if isinstance(self.download_dir, os.PathLike):
            object.__setattr__(self, "download_dir", os.fspath(self.download_dir))
        for name in ("revision", "download_dir"):
            value = getattr(self, name)
            _check(value is None or (isinstance(value, str) and bool(value)), name, value, "a string, and not empty")

    def for_source(self) -> dict[str, Any]:
        """What is given of the options that only some sources take."""
        return {name: value for name in _OF_SOURCES if (value := getattr(self, name)) not in (None, {}, False)}

    def _check_ranks(self) -> None:
        _check(self.uneven in ("error", "ceil"), "uneven", self.uneven, "'error' or 'ceil'")
        _check_integer("pp_size", self.pp_size, 1)
        if self.pattern is not None:
            _check(isinstance(self.pattern, str), "pattern", self.pattern, "the name of a file, with fields in braces")
        if isinstance(self.placements, Mapping):
            object.__setattr__(self, "placements", _placements_of(self.placements))
        placements_ok = self.placements == "auto" or isinstance(self.placements, Placements)
        _check(placements_ok, "placements", self.placements, "'auto', a dict of names and placements, or Placements")
        if self.rank is None or isinstance(self.rank, Ranks):
            given = {
                "world_size": self.world_size is not None,
                "pp_size": self.pp_size != 1,
                "expert_parallel": self.expert_parallel is True,
                "placements": self.rank is None and self.placements != "auto",
                "pattern": self.rank is None and self.pattern is not None,
            }
            for name in (name for name, is_given in given.items() if is_given):
                # A single world size would be mistaken for one of the three.
                why = "given without a rank" if self.rank is None else "for a rank that is a number"
                raise OptionError(f"{name} is {why}")
        elif self.rank == "auto":
            raise OptionError("rank='auto' is what open, stream and load find out; give LoadOptions the number")
        elif self.world_size is None:
            raise OptionError(f"rank={self.rank!r} is given without world_size")
        _ = self.rank_files  # refuses numbers and a pattern that make no sense

    @property
    def rank_files(self) -> RankFiles | None:
        """What this rank's files of a pre-sharded checkpoint are called; None where everything is loaded.

        Raises:
            OptionError: The numbers or the pattern make no sense.
        """
        if self.rank is None:
            return None
        if isinstance(self.rank, Ranks):
            ranks = self.rank
            rank = ranks.pp_rank * ranks.tp_size + ranks.tp_rank
            return RankFiles(rank, ranks.tp_size * ranks.pp_size, ranks.pp_size, self.pattern)
        assert self.rank != "auto"
        assert self.world_size is not None
        return RankFiles(self.rank, self.world_size, self.pp_size, self.pattern)

    @property
    def ranks(self) -> Ranks | None:
        """Which rank this is in each way in which the model is divided; None where everything is loaded."""
        return None if self.rank is None else self.ranks_of_all()[self._index()]

    def ranks_of_all(self) -> tuple[Ranks, ...]:
        """Every rank of the world that this one belongs to, in order; none where everything is loaded."""
        if self.rank is None:
            return ()
        if isinstance(self.rank, Ranks):
            return _all_ranks(self.rank)
        assert self.world_size is not None
        stage = self.world_size // self.pp_size
        return tuple(
            Ranks(
                tp_rank=rank % stage,
                tp_size=stage,
                pp_rank=rank // stage,
                pp_size=self.pp_size,
                ep_rank=rank % stage if self.expert_parallel else 0,
                ep_size=stage if self.expert_parallel else 1,
            )
            for rank in range(self.world_size)
        )

    def _index(self) -> int:
        return _all_ranks(self.rank).index(self.rank) if isinstance(self.rank, Ranks) else cast("int", self.rank)


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
    source: str | None
    runai_chunk_bytes: int | None
    runai_request_timeout_s: float | None
    runai_virtual_addressing: bool | None
    progress: bool | OnProgress
    on_event: OnEvent | None
    http_headers: Mapping[str, str]
    revision: str | None
    allow_patterns: Sequence[str] | str | None
    ignore_patterns: Sequence[str] | str | None
    download_dir: str | os.PathLike[str] | None
    cache: bool
    rank: Rank
    world_size: int | None
    pp_size: int
    expert_parallel: bool
    placements: Placed | Mapping[str, str] | Mapping[str, Placement]
    uneven: Uneven
    pattern: str | None


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
    known = [field.name for field in dataclasses.fields(LoadOptions)]
    for name in given:
        if name not in known:
            raise OptionError(f"there is no option {name!r}; there are {', '.join(known)}")
    _warn_of_misspelt(environment)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    parsers = {name: parse for name, parse in _FROM_ENVIRONMENT.items() if name not in given}
    for name, value in from_environment(parsers, environment=environment).items():
        values[name] = value
        origins[name] = f"environment ({_PREFIX}{name.upper()})"
    values.update(given)
    origins.update(dict.fromkeys(given, "argument"))
    if values.get("memory_bytes") is None:
        values["memory_bytes"], origins["memory_bytes"] = _default_memory(environment)
    if values.get("rank") == "auto":
        _find_rank(values, origins, environment)
    try:
        options = LoadOptions(**values)
    except OptionError as error:
        # Every refusal of a value begins with the option's name.
        name = error.cause.partition("=")[0]
        origin = origins.get(name, "")
        variable = origin.removeprefix("environment (").removesuffix(")")
        if variable == origin:
            raise
        shown = "" if name in _HIDDEN else f"={environment[variable]!r}"
        raise OptionError(f"{variable}{shown}: {error.cause}") from None
    return options, tuple(
        ResolvedOption(name, _shown(name, getattr(options, name)), origins.get(name, "default")) for name in known
    )


def from_environment(
    parsers: Mapping[str, Callable[[str], Any]], *, prefix: str = "", environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The values of those options that the environment names.

    Args:
        parsers: What makes a value of a variable's text, by the option's name.
        prefix: What stands between ``STREAMLOAD_`` and the name.
        environment: In place of the process's environment.

    Raises:
        OptionError: A text without meaning.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for name, parse in parsers.items():
        variable = f"{_PREFIX}{prefix}{name.upper()}"
        text = environment.get(variable)
        if text is not None:
            try:
                values[name] = parse(text)
            except ValueError as error:
                shown = "" if name in _HIDDEN else f"={text!r}"
                raise OptionError(f"{variable}{shown}: {error}") from error
    return values


def variables(names: Iterable[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Those of some variables that are set and not empty; for names that are somebody else's, and not options."""
    environment = os.environ if environment is None else environment
    return {name: value for name in names if (value := environment.get(name))}


def proxies(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The proxy settings that this process runs under, by variable; lower-case spellings count."""
    environment = os.environ if environment is None else environment
    found = {name: environment.get(name.lower()) or environment.get(name) for name in _PROXY_VARIABLES}
    return {name: value for name, value in found.items() if value}


def _find_rank(values: dict[str, Any], origins: dict[str, str], environment: Mapping[str, str]) -> None:
    """Fill in what torchrun tells a process of its rank."""
    names = {"rank": "RANK"}
    if values.get("world_size") is None:
        names["world_size"] = "WORLD_SIZE"
    if values.get("device") == "cuda":
        names["device"] = "LOCAL_RANK"
    for name, variable in names.items():
        text = environment.get(variable)
        if text is None:
            raise OptionError(f"rank='auto' takes {name} from {variable}, which is not set: torchrun sets it")
        if not text.isdecimal():
            raise OptionError(f"{variable}={text!r} is not a number")
        values[name] = f"cuda:{int(text)}" if name == "device" else int(text)
        origins[name] = f"environment ({variable})"


def _placements_of(given: Mapping[Any, Any]) -> Placements:
    if all(isinstance(style, str) for style in given.values()):
        return Placements.from_tp_plan(given)
    return Placements.from_rules(given)


def _all_ranks(ranks: Ranks) -> tuple[Ranks, ...]:
    """Every combination; where as many ranks share experts as share tensors, those are the same ranks."""
    same = (ranks.ep_rank, ranks.ep_size) == (ranks.tp_rank, ranks.tp_size)
    return tuple(
        Ranks(tp, ranks.tp_size, pp, ranks.pp_size, ep, ranks.ep_size)
        for pp in range(ranks.pp_size)
        for tp in range(ranks.tp_size)
        for ep in ((tp,) if same else range(ranks.ep_size))
    )


def _warn_of_misspelt(environment: Mapping[str, str]) -> None:
    names = [name.upper() for name in _FROM_ENVIRONMENT]
    for variable in environment:
        name = variable.removeprefix(_PREFIX)
        if name.startswith(_OF_OTHERS):
            continue
        if name != variable and name not in names and (alike := get_close_matches(name.upper(), names, 1, _ALIKE)):
            _logger.warning("%s is no option, and is ignored: is %s meant?", variable, _PREFIX + alike[0])


def _default_memory(environment: Mapping[str, str]) -> tuple[int, str]:
    """This rank's share of what the container has left."""
    text = environment.get("LOCAL_WORLD_SIZE") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(f"LOCAL_WORLD_SIZE={text!r} is not a number of ranks")
    limits = host_limits()
    available = format_bytes(limits.available_bytes)
    origin = f"default (of {available} that the {limits.bound_by} leaves, {text} ranks on this node)"
    return _share_of(limits, int(text)), origin


def default_memory_bytes(ranks: int) -> int:
    """What ``memory_bytes`` is by default where so many ranks load on this node."""
    return _share_of(host_limits(), ranks)


def _share_of(limits: HostLimits, ranks: int) -> int:
    return max(_MEMORY_LEAST, min(_MEMORY_DEFAULT_MOST, limits.available_bytes // _MEMORY_SHARE // ranks))


def _parse_flag(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("neither true nor false")


def _parse_number_or_auto(text: str) -> int | Literal["auto"]:
    return "auto" if text.strip() == "auto" else int(text)


def parse_globs(text: str) -> tuple[str, ...]:
    """Globs that are separated by commas."""
    return tuple(glob.strip() for glob in text.split(",") if glob.strip())


def _parse_headers(text: str) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, colon, value = line.partition(":")
        if not colon or not name.strip() or name.strip() in headers:
            raise ValueError("it is not a line 'Name: value' for each header")
        headers[name.strip()] = value.strip()
    return headers


_FROM_ENVIRONMENT: dict[str, Callable[[str], Any]] = {
    "device": str.strip,
    "include": parse_globs,
    "exclude": parse_globs,
    "memory_bytes": parse_bytes,
    "strict_memory": _parse_flag,
    "read_bytes": parse_bytes,
    "concurrency": _parse_number_or_auto,
    "max_bytes_per_s": parse_bytes,
    "order": str.strip,
    "deadline_s": float,
    "verify": str.strip,
    "s3_anonymous": _parse_flag,
    "source": str.strip,
    "runai_chunk_bytes": parse_bytes,
    "runai_request_timeout_s": float,
    "runai_virtual_addressing": _parse_flag,
    "progress": _parse_flag,
    "http_headers": _parse_headers,
    "rank": _parse_number_or_auto,
    "world_size": int,
    "pp_size": int,
    "expert_parallel": _parse_flag,
    "uneven": str.strip,
    "pattern": str,
}


def _shown(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value} ({format_bytes(value)})"
    if name in _HIDDEN:
        return ", ".join(cast("Mapping[str, str]", value)) or "none"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, tuple):
        return ", ".join(value) if value else "none"
    if name == "max_bytes_per_s":
        return "no limit" if value is None else str(value)
    if name == "source":
        return "the URI's scheme" if value is None else str(value)
    if name.startswith("runai_"):
        return "the default" if value is None else str(value)
    return "the source's choice" if name == "read_bytes" and value is None else str(value)


def _globs(name: str, globs: Any) -> tuple[str, ...]:
    if isinstance(globs, str):
        # A lone string is a sequence of letters, each of them a valid glob: surely not what was meant.
        raise OptionError(f"{name}={globs!r} is a string: give a list of globs")
    _check(isinstance(globs, Iterable), name, globs, "a list of globs")
    found: tuple[str, ...] = tuple(globs)
    _check(all(isinstance(glob, str) for glob in found), name, found, "a list of globs")
    return found


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
