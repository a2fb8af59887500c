"""What ``--model-loader-extra-config`` can say, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from streamload.errors import OptionError
from streamload.options import default_memory_bytes, from_environment, resolve
from streamload.units import parse_bytes

__all__ = ["MODES", "ExtraConfig", "Mode"]

Mode: TypeAlias = Literal["auto", "sliced", "whole", "sharded"]

MODES: tuple[Mode, ...] = ("auto", "sliced", "whole", "sharded")

# Those of a load's options that an engine's user may want to say; everything else follows from what vLLM says.
_LOAD_OPTIONS = (
    "source",
    "memory_bytes",
    "read_bytes",
    "concurrency",
    "max_bytes_per_s",
    "deadline_s",
    "verify",
    "s3_anonymous",
    "cache",
)
# What the environment says of these is meant for other loads.
_ALL_OF_IT = {
    "include": (),
    "exclude": (),
    "rank": None,
    "world_size": None,
    "pp_size": 1,
    "expert_parallel": False,
    "pattern": None,
}
# Amounts may be written as people do.
_AMOUNTS = ("memory_bytes", "read_bytes", "max_bytes_per_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtraConfig:
    """The keys of vLLM's ``model_loader_extra_config`` under this load format.

    Attributes:
        uri: Where the weights are; None: where vLLM's ``model`` says.
        mode: ``"sliced"``: an ordinary checkpoint, of which each rank reads what its part of the model takes.
            ``"whole"``: one of which each rank reads all tensors. ``"auto"``: sliced, and whole where that cannot be.
            ``"sharded"``: files that are one rank's each, as ``sharded_state`` has them.
        files: Globs of file names; only these files are read, whatever an index says. None: those that make the
            checkpoint.
        pattern: In the mode ``"sharded"``: what the files are called. None: as vLLM calls them.
        cast: In the mode ``"sharded"``: whether a tensor of another dtype than the model's is converted, rather than an
            error.
        enable_weights_track: Whether a parameter of the model that the checkpoint does not fill is an error. None:
            where the model is not quantized, and the mode is not ``"sharded"``.
        options: What was said of how to read, by the names that it has in `streamload.LoadOptions`.
    """

    uri: str | None = None
    mode: Mode = "whole"
    files: tuple[str, ...] | None = None
    pattern: str | None = None
    cast: bool = False
    enable_weights_track: bool | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, given: object, *, mode: Mode = "whole") -> ExtraConfig:
        """Check what vLLM was given.

        Args:
            given: Its ``model_loader_extra_config``.
            mode: The one that counts where none is given.

        Raises:
            OptionError: An unknown key, a value without meaning, or two that contradict each other.
        """
        if not isinstance(given, Mapping):
            raise OptionError(
                f"model_loader_extra_config is a {type(given).__name__}, not an object of names and values"
            )
        own = [field.name for field in dataclasses.fields(cls) if field.name != "options"]
        allowed = [*own, *_LOAD_OPTIONS]
        for name in given:
            if name not in allowed:
                raise OptionError(f"model_loader_extra_config has no key {name!r}; there are {', '.join(allowed)}")
        values: dict[str, Any] = {"mode": mode, **{name: given[name] for name in own if name in given}}
        options = {name: _amount(name, given[name]) for name in _LOAD_OPTIONS if name in given}
        try:
            if values.get("files") is not None:
                values["files"] = _file_globs(values["files"])
            parsed = cls(**values, options=options)
            resolve(options)
        except OptionError as error:
            raise OptionError(f"model_loader_extra_config: {error.cause}") from None
        return parsed

    @classmethod
    def parse_foreign(cls, given: object, *, mode: Mode) -> ExtraConfig:
        """The same where this stands in the place of a load format of Run:ai's, whose keys are understood, too.

        Its memory limit is a number of bytes, -1 for none, or 0; its ``distributed`` is left out.

        Raises:
            OptionError: As `parse`.
        """
        if isinstance(given, Mapping):
            limit = given.get("memory_limit")
            given = {name: value for name, value in given.items() if name not in ("distributed", "memory_limit")}
            if isinstance(limit, int) and limit > 0:
                given.setdefault("memory_bytes", limit)
        return cls.parse(given, mode=mode)

    def __post_init__(self) -> None:
        _check(self.mode in MODES, "mode", self.mode, " or ".join(map(repr, MODES)))
        for name in ("uri", "pattern"):
            value = getattr(self, name)
            _check(value is None or (isinstance(value, str) and bool(value)), name, value, "a string, and not empty")
        _check(isinstance(self.cast, bool), "cast", self.cast, "true or false")
        track = self.enable_weights_track
        _check(track is None or isinstance(track, bool), "enable_weights_track", track, "true or false")
        if self.mode == "sharded":
            for name in ("files", "enable_weights_track"):
                if getattr(self, name) is not None:
                    raise OptionError(f"{name} is given in the mode 'sharded', where it has no meaning")
        else:
            for name in ("pattern", "cast"):
                if getattr(self, name):
                    raise OptionError(f"{name} is given in the mode {self.mode!r}, and is for 'sharded'")

    def arguments(self, ranks: int) -> dict[str, Any]:
        """How to read, as arguments of a load of all tensors into host memory.

        Args:
            ranks: How many of the engine's ranks load on this node: they share the memory that is taken by default.
        """
        given: dict[str, Any] = {**_ALL_OF_IT, **self.options}
        if "memory_bytes" not in given and not from_environment({"memory_bytes": parse_bytes}):
            given["memory_bytes"] = default_memory_bytes(ranks)
        return given


def _file_globs(files: Any) -> tuple[str, ...]:
    globs = (files,) if isinstance(files, str) else files
    strings = isinstance(globs, list | tuple) and all(isinstance(glob, str) and glob for glob in globs)
    _check(strings and bool(globs), "files", files, "a glob or a list of globs")
    return tuple(globs)


def _amount(name: str, value: Any) -> Any:
    if name in _AMOUNTS and isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise OptionError(f"model_loader_extra_config: {name}={value!r}: {error}") from error
    return value


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise OptionError(f"{name}={value!r} is not {expected}")
