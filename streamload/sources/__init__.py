"""Where do bytes come from? From folders, S3, or what another package brings, all behind `Source`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any, TypeAlias

from streamload.errors import MissingDependencyError, OptionError
from streamload.sources.base import Source, SourceObject
from streamload.uris import scheme_of

__all__ = ["Source", "SourceFactory", "SourceObject", "open_source"]

#: Makes a source out of a URI and a keyword argument ``concurrency``: the class itself, usually.
SourceFactory: TypeAlias = Callable[..., Any]

# Module and class; the modules are imported when a URI asks for them.
_BUILT_IN = {
    "file": ("streamload.sources.local", "LocalSource"),
    "hf": ("streamload.sources.hub", "HubSource"),
    "http": ("streamload.sources.http", "HttpSource"),
    "https": ("streamload.sources.http", "HttpSource"),
    "s3": ("streamload.sources.s3", "S3Source"),
    "sidecar": ("streamload.sources.sidecar", "SidecarSource"),
    **dict.fromkeys(
        ("az", "gs", "runai", "runai+az", "runai+file", "runai+gs", "runai+s3"),
        ("streamload.sources.runai", "open_runai"),
    ),
}

# Set for a process, whatever it loads: no mistake where a source has no use for them.
_WHOEVER_TAKES_THEM = {
    "grace_s",
    "http_headers",
    "s3_anonymous",
    "s3_settings",
    "runai_chunk_bytes",
    "runai_request_timeout_s",
    "runai_virtual_addressing",
}

# Another package serves a scheme by naming a factory under it, in this group of entry points.
_GROUP = "streamload.sources"


def open_source(uri: str, *, source: str | None = None, concurrency: int | None = None, **options: Any) -> Source:
    """Make the source that a URI asks for. Nothing is opened or requested yet.

    Args:
        uri: A path, or a URI with one of the known schemes.
        source: What serves it: ``runai``, or one of the known schemes; by default, the URI's own scheme.
        concurrency: How many reads should be possible at once; by default, the source's own number.
        **options: What only some sources take, by the name that it has in `LoadOptions`.

    Returns:
        A source that has not been entered.

    Raises:
        OptionError: Nothing serves the URI's scheme, or the URI or an option makes no sense to what does.
        MissingDependencyError: What serves it cannot be imported.
    """
    if uri.endswith(".safetensors.index.json"):
        raise OptionError("this names the index file: name the folder that it is in", uri=uri)
    scheme = source or scheme_of(uri)
    built_in = _BUILT_IN.get(scheme)
    if built_in is not None:
        module, name = built_in
        factory: SourceFactory = getattr(import_module(module), name)
    else:
        factory = _load(scheme, uri)
    taken = signature(factory).parameters.keys() & options.keys()
    for name in options.keys() - taken - _WHOEVER_TAKES_THEM:
        raise OptionError(f"{name} has no meaning for {scheme}://", uri=uri)
    made = factory(uri, concurrency=concurrency, **{name: options[name] for name in taken})
    if not isinstance(made, Source):
        raise OptionError(f"what serves {scheme}:// made a {type(made).__name__}, not a Source", uri=uri)
    return made


def _load(scheme: str, uri: str) -> SourceFactory:
    # Only here: it brings the parser of e-mails along, which is a fifth of all of `import streamload`.
    from importlib.metadata import EntryPoint, entry_points

    others: dict[str, EntryPoint] = {point.name: point for point in entry_points(group=_GROUP)}
    point = others.get(scheme)
    if point is None:
        known = ", ".join(sorted({*_BUILT_IN, *others}))
        raise OptionError(f"nothing serves the scheme {scheme!r}; known are: {known}", uri=uri)
    try:
        factory: SourceFactory = point.load()
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(f"{point.value}, which serves {scheme}://, is broken: {error}", uri=uri) from error
    return factory
