"""Where the weights of a model are: the URIs, and how each is read."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from streamload.checkpoint import Catalog
from streamload.errors import NotFoundError, OptionError
from streamload.options import LoadOptions, resolve
from streamload.pipeline.engine import run_in_thread
from streamload.pipeline.fetch import Fetcher
from streamload.planning import source_for
from streamload.report import Recorder
from streamload.uris import scheme_of, scrub_uri
from streamload.vllm.config import ExtraConfig

__all__ = ["Place", "below", "keep", "place_of", "secondary_place"]

_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Place:
    """A folder of weights, or some files in it.

    Attributes:
        uri: The folder.
        arguments: How it is read: arguments of `streamload.stream`.
        globs: Of file names; None: the files that make the checkpoint.
        first: Whether only the first of these globs counts that matches a file.
        prefix: What is put in front of the tensors' names.
    """

    uri: str
    arguments: dict[str, Any]
    globs: tuple[str, ...] | None = None
    first: bool = False
    prefix: str = ""

    def options_with(self, **more: Any) -> LoadOptions:
        """How it is read, and more.

        Raises:
            OptionError: An option has no meaning.
        """
        return resolve(self.arguments | more)[0]

    def uris(self) -> list[str]:
        """What is to be read, one after the other.

        Raises:
            NotFoundError: No file matches the globs.
            OptionError: What matches is no safetensors file.
        """
        if self.globs is None:
            return [self.uri]
        names: list[str] = []
        for each in self.globs:
            names += [name for name in self._matching(each) if name not in names]
            if names and self.first:
                break
        if not names:
            raise NotFoundError(f"no file matches {' or '.join(self.globs)}", uri=scrub_uri(self.uri))
        others = [name for name in names if not name.endswith(_WEIGHTS)]
        if others:
            raise OptionError(f"{others[0]} is wanted, and streamload reads safetensors only", uri=scrub_uri(self.uri))
        return [below(self.uri, name) for name in names]

    def _matching(self, pattern: str) -> list[str]:
        if not glob.has_magic(pattern):
            return [pattern]
        if scheme_of(self.uri) == "file":
            root = self.uri.removeprefix("file://")
            return sorted(glob.glob(pattern, root_dir=root))
        if "/" in pattern:
            raise OptionError(f"{pattern}: only a folder on this machine is searched deeper", uri=scrub_uri(self.uri))
        return [name for name in _listed(self.uri, self.options_with()) if fnmatchcase(name, pattern)]


def place_of(config: ExtraConfig, load_config: Any, model_config: Any, *, given_uri: bool, ranks: int) -> Place:
    """Where a model's weights are.

    Args:
        config: What the user has said.
        load_config: vLLM's.
        model_config: vLLM's, of that model.
        given_uri: Whether the URI in `config` is this model's.
        ranks: How many ranks of the engine load on this node.

    Raises:
        OptionError: vLLM is to take models from ModelScope.
    """
    named = config.uri if given_uri else None
    arguments = config.arguments(ranks)
    if not given_uri:
        arguments = _elsewhere(arguments)
    if named is not None:
        uri, revision = named, None
    else:
        # Where vLLM has taken an object URI as the model, that is here, and the model is a folder with its config.
        uri, revision = getattr(model_config, "model_weights", "") or model_config.model, model_config.revision
    return replace(_place(uri, revision, arguments, load_config), globs=config.files if given_uri else None)


def secondary_place(source: Any, primary: Place, load_config: Any, model_config: Any) -> Place:
    """Where a model's further weights are, of which vLLM's model says.

    Args:
        source: A ``DefaultModelLoader.Source``, or what has its attributes.
        primary: Where the model's own weights are.
        load_config: vLLM's.
        model_config: vLLM's, of that model.
    """
    if source.model_or_path == model_config.model:
        place = replace(primary, globs=None)
    else:
        place = _place(source.model_or_path, source.revision, _elsewhere(primary.arguments), load_config)
    if source.subfolder:
        place = replace(place, uri=below(place.uri, source.subfolder))
    globs = source.allow_patterns_overrides
    return replace(place, globs=None if globs is None else tuple(globs), first=True, prefix=source.prefix)


def keep(catalog: Catalog, unwanted: Callable[[str], bool]) -> Catalog:
    """The tensors of which that does not hold; all of them where it holds of all."""
    files = []
    for file in catalog.files:
        tensors = tuple(tensor for tensor in file.tensors if not unwanted(tensor.name))
        if tensors:
            files.append(replace(file, tensors=tensors))
    return Catalog(tuple(files)) if files else catalog


def below(uri: str, name: str) -> str:
    """The URI of what lies below a folder."""
    folder, separator, query = uri.partition("?") if scheme_of(uri) in ("http", "https") else (uri, "", "")
    return f"{folder.rstrip('/')}/{name}{separator}{query}"


def _elsewhere(arguments: dict[str, Any]) -> dict[str, Any]:
    """How to read from another place than the one that the user has described."""
    of_the_place = ("source", "cache", "revision", "download_dir", "ignore_patterns")
    return {name: value for name, value in arguments.items() if name not in of_the_place}


def _place(uri: str, revision: str | None, arguments: dict[str, Any], load_config: Any) -> Place:
    if "://" not in uri and not uri.startswith(("/", ".")) and not os.path.exists(uri):
        if _uses_modelscope():
            raise OptionError("models of ModelScope are not read: give the weights' uri", uri=uri)
        uri = f"hf://{uri}"
    if scheme_of(uri) == "hf":
        said = {
            "revision": revision,
            "download_dir": load_config.download_dir,
            "ignore_patterns": load_config.ignore_patterns,
        }
        arguments = arguments | {name: value for name, value in said.items() if value}
    return Place(uri, arguments)


def _uses_modelscope() -> bool:
    try:
        from vllm import envs
    except ImportError:
        return False
    return bool(getattr(envs, "VLLM_USE_MODELSCOPE", False))


def _listed(uri: str, options: LoadOptions) -> Sequence[str]:
    """The names of the files in a folder."""
    assert options.memory_bytes is not None
    recorder = Recorder(scrub_uri(uri), "none", options.memory_bytes)

    async def body() -> list[str]:
        async with source_for(uri, options) as source:
            return [object.key for object in await Fetcher(source, recorder).ask(source.list)]

    return run_in_thread(body)
