"""What staging can be told beyond how to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict

from streamload.errors import OptionError
from streamload.events import OnEvent, OnProgress
from streamload.options import Concurrency, Verify, from_environment, parse_globs
from streamload.sources.s3_settings import S3Settings
from streamload.stage.kserve import s3_settings
from streamload.units import parse_bytes

__all__ = ["Offline", "OnConflict", "StageArguments", "StageOptions"]

OnConflict: TypeAlias = Literal["refuse", "replace"]
Offline: TypeAlias = Literal["no", "fallback", "only"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOptions:
    """What to stage, and what may be in its way.

    Attributes:
        include: Globs of file names; only matching files are staged. None given: what a program which loads the
            checkpoint could want.
        exclude: Globs of file names that are left out.
        on_conflict: What to do with a file in the way that was not staged here, or was changed since: ``"refuse"``, or
            ``"replace"``.
        offline: ``"no"``: the source is asked, and where it cannot be reached staging fails. ``"fallback"``: a complete
            copy of the same URI counts then. ``"only"``: the source is not asked at all.
        cache: A folder that holds versions side by side; the folder that is staged into becomes a link to one of them.
        keep_bytes: Versions in the cache that were not used for the longest time are removed beyond so many bytes.
        keep_s: None that was used less than so many seconds ago.
        s3: What S3 is told beyond what AWS tools would find.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    on_conflict: OnConflict = "refuse"
    offline: Offline = "no"
    cache: str | None = None
    keep_bytes: int | None = None
    keep_s: float = 3600.0
    s3: S3Settings = field(default_factory=S3Settings)

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            if isinstance(globs, str):
                raise OptionError(f"{name}={globs!r} is a string: give a list of globs")
            object.__setattr__(self, name, tuple(globs))
        if self.on_conflict not in ("refuse", "replace"):
            raise OptionError(f"on_conflict={self.on_conflict!r} is neither 'refuse' nor 'replace'")
        if self.offline not in ("no", "fallback", "only"):
            raise OptionError(f"offline={self.offline!r} is not 'no', 'fallback' or 'only'")
        if self.keep_bytes is not None and self.cache is None:
            raise OptionError("keep_bytes is given without a cache")
        if self.keep_bytes is not None and self.keep_bytes < 0:
            raise OptionError(f"keep_bytes={self.keep_bytes} is negative")
        if not self.keep_s >= 0:
            raise OptionError(f"keep_s={self.keep_s!r} is not a number of seconds")

    @classmethod
    def resolve(cls, given: dict[str, Any]) -> StageOptions:
        """Put together what the caller gave, what ``STREAMLOAD_STAGE_…`` variables and KServe say, and the defaults.

        Raises:
            OptionError: A value without meaning.
        """
        return cls(**{"s3": s3_settings(), **from_environment(_FROM_ENVIRONMENT, prefix="STAGE_"), **given})


class StageArguments(TypedDict, total=False):
    """`StageOptions`, and those of `LoadOptions` that say how to read, as keyword arguments."""

    include: Sequence[str]
    exclude: Sequence[str]
    on_conflict: OnConflict
    offline: Offline
    cache: str | None
    keep_bytes: int | None
    keep_s: float
    memory_bytes: int | None
    read_bytes: int | None
    concurrency: Concurrency
    max_bytes_per_s: float | None
    deadline_s: float | None
    verify: Verify
    source: str | None
    s3_anonymous: bool
    http_headers: Mapping[str, str]
    progress: bool | OnProgress
    on_event: OnEvent | None


_FROM_ENVIRONMENT: dict[str, Callable[[str], Any]] = {
    "include": parse_globs,
    "exclude": parse_globs,
    "on_conflict": str.strip,
    "offline": str.strip,
    "cache": str,
    "keep_bytes": parse_bytes,
    "keep_s": float,
}
