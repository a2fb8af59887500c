"""The class that vLLM asks for a model's weights."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import streamload
from streamload.checkpoint import Catalog
from streamload.checkpoint.rank_files import PIPELINE_PATTERN, RANK_PATTERN
from streamload.checkpoint.text import brief
from streamload.errors import MismatchError, OptionError, StreamloadError
from streamload.loader import open_stream
from streamload.report import Report
from streamload.slicing import fill_sliced
from streamload.units import format_bytes, format_count, format_seconds
from streamload.uris import scrub_uri
from streamload.vllm.config import ExtraConfig
from streamload.vllm.engine import Bar, expert_filter, is_draft, is_first_rank, node_ranks, ranks, untied_embedding
from streamload.vllm.places import Place, keep, place_of, secondary_place
from streamload.vllm.plugin import REPLACEABLE
from streamload.vllm.tracking import check_loaded

if TYPE_CHECKING:
    import torch

__all__ = ["loader_class", "summary"]

_Weights: TypeAlias = "Iterable[tuple[str, torch.Tensor]]"

# Under which name each model was loaded: a URI that was given for it is not that of another model put in its place.
_loaded: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def summary(report: Report, mode: str) -> str:
    """What a load has come to, in one line."""
    verified = [f"{format_bytes(nbytes)} verified by {what}" for what, nbytes in report.verified.items()]
    unverified = [f"{format_bytes(nbytes)} not verified ({why})" for why, nbytes in report.unverified.items()]
    parts = [
        f"{format_count(report.tensors, 'tensor')}, {format_bytes(report.nbytes)} in {format_seconds(report.seconds)} "
        f"({report.gb_per_s:.2f} GB/s, {format_bytes(report.fetched_bytes)} read)",
        *verified,
        *unverified,
        f"{report.retries} retried",
        f"held back by {report.held_back_by or 'nothing'}",
    ]
    return f"{report.uri}, mode {mode}: {'; '.join(parts)}"


@cache
def loader_class() -> type:
    """Make the class: its base is vLLM's, which only there can be imported."""
    from vllm.logger import init_logger
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    # vLLM shows what its own loggers say, and no others.
    logger = init_logger("vllm.streamload")

    @contextmanager
    def telling() -> Iterator[None]:
        """Have the log say in one line what went wrong, above all that vLLM says of its processes' ends."""
        try:
            yield
        except StreamloadError as error:
            if not hasattr(error, "__told__"):
                error.__told__ = True  # type: ignore[attr-defined]
                logger.error("Loading weights failed: %s", error)
            raise

    class StreamloadModelLoader(BaseModelLoader):  # type: ignore[misc]
        """Loads weights with streamload; see docs/vllm.md."""

        def __init__(self, load_config: Any) -> None:
            super().__init__(load_config)
            given, instead = load_config.model_loader_extra_config, REPLACEABLE.get(load_config.load_format)
            with telling():
                if instead is None:
                    self._config = ExtraConfig.parse(given)
                else:
                    self._config = ExtraConfig.parse_foreign(given, mode=instead)

        def download_model(self, model_config: Any) -> None:
            """Look whether the weights can be had. Nothing is downloaded ahead: loading streams them."""
            place = self._place(model_config)
            with telling():
                for uri in place.uris():
                    streamload.inspect(uri, **place.arguments)

        def load_weights(self, model: Any, model_config: Any) -> None:
            """Fill a model that is there.

            Raises:
                StreamloadError: The weights cannot be had, or do not fit; the log names the cause in one line.
            """
            _loaded.setdefault(model, model_config.model)
            # What becomes of each mode stands here, and nowhere else.
            load = {
                "auto": self._load_sliced,
                "sliced": self._load_sliced,
                "whole": self._load_whole,
                "sharded": self._load_sharded,
            }[self._config.mode]
            with telling():
                load(model, model_config)

        def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Generator[tuple[str, torch.Tensor]]:
            """All tensors of a model's checkpoint that this rank wants, whole, in the order in which they lie in it.

            Each is an object and memory of its own, which the model may keep.
            """
            primary, foreign = self._primary(model_config, model), expert_filter(model_config)
            yield from self._tensors(primary, self._unwanted(model_config, model))
            for source in getattr(model, "secondary_weights", ()):
                place = secondary_place(source, primary, self.load_config, model_config)
                yield from self._tensors(place, [] if foreign is None else [foreign])

        def _place(self, model_config: Any, model: torch.nn.Module | None = None) -> Place:
            replaced = model is not None and _loaded.get(model, model_config.model) != model_config.model
            return place_of(
                self._config,
                self.load_config,
                model_config,
                given_uri=not is_draft(model_config) and not replaced,
                ranks=node_ranks(),
            )

        def _primary(self, model_config: Any, model: torch.nn.Module) -> Place:
            place = self._place(model_config, model)
            overrides = getattr(model, "allow_patterns_overrides", None)
            if overrides is not None and place.globs is None:
                place = Place(place.uri, place.arguments, tuple(overrides), first=True)
            return place

        def _unwanted(self, model_config: Any, model: torch.nn.Module) -> list[Callable[[str], bool]]:
            filters = expert_filter(model_config), getattr(model, "is_unused_checkpoint_weight", None)
            return [each for each in filters if each is not None]

        def _load_whole(self, model: Any, model_config: Any) -> None:
            uri = scrub_uri(self._place(model_config, model).uri)
            with closing(self.get_all_weights(model_config, model)) as weights, self._noting(uri) as noted:
                loaded = model.load_weights(noted(weights))
            self._check(model, model_config, loaded, uri)

        def _load_sliced(self, model: Any, model_config: Any) -> None:
            place = self._primary(model_config, model)
            with telling():
                uris = place.uris()
            if len(uris) > 1 or bool(getattr(model, "secondary_weights", None)):
                problem = "the weights lie in several places"
                if self._config.mode == "sliced":
                    raise OptionError(f"mode='sliced' is not for this model: {problem}", uri=scrub_uri(place.uri))
                logger.info("%s: %s: each rank reads them whole", scrub_uri(place.uri), problem)
                self._load_whole(model, model_config)
                return
            uri, unwanted = scrub_uri(uris[0]), self._unwanted(model_config, model)
            with self._progress() as progress, self._noting(uri) as noted:
                found = fill_sliced(
                    model,
                    uris[0],
                    place.options_with(device="cpu", order="file", progress=progress),
                    lambda weights: model.load_weights(noted(weights)),
                    wanted=lambda name: not any(each(name) for each in unwanted),
                )
            needed, of = found.report.nbytes, found.checkpoint_bytes
            logger.info("Loaded %s; %s needed of %s", summary(found.report, "sliced"), *map(format_bytes, (needed, of)))
            for problem, names in found.reasons.items():
                logger.info("Read whole: %s: %s", brief(names), problem)
            self._check(model, model_config, found.loaded, uri)

        @contextmanager
        def _noting(self, uri: str) -> Iterator[Callable[[_Weights], _Weights]]:
            """Where the model does not take a tensor, have the log name it."""
            last = ""

            def noted(weights: _Weights) -> _Weights:
                nonlocal last
                for name, tensor in weights:
                    last = name
                    yield name, tensor

            try:
                yield noted
            except StreamloadError:
                raise
            except Exception as error:
                logger.error("%s: the model did not take tensor %r: %s %s", uri, last, type(error).__name__, error)
                raise

        def _check(self, model: Any, model_config: Any, loaded: Any, uri: str) -> None:
            """See whether the model has got all of its weights."""
            quantized = model_config.quantization is not None
            track = self._config.enable_weights_track
            if loaded is not None and (not quantized if track is None else track):
                check_loaded(model, loaded, uri=uri, quantized=quantized, draft=is_draft(model_config))

        def _load_sharded(self, model: torch.nn.Module, model_config: Any) -> None:
            place, rank = self._place(model_config, model), ranks()
            # Said, although it is the default: where no file is called so, that is an error.
            pattern = self._config.pattern or (RANK_PATTERN if rank.pp_size == 1 else PIPELINE_PATTERN)
            arguments = place.arguments | {"rank": rank, "pattern": pattern}
            untied = untied_embedding(model, model_config)
            try:
                report = self._into(model, place.uri, arguments)
            except MismatchError as error:
                # Nothing was read yet.
                if untied is None or error.missing != untied[:1] or error.unexpected:
                    raise
                embedding, head = map(model.get_parameter, untied)
                report = self._into(model, place.uri, arguments | {"exclude": [glob.escape(untied[0])]})
                embedding.data.copy_(head.data)
            logger.info("Loaded %s", summary(report, "sharded"))

        def _into(self, model: torch.nn.Module, uri: str, arguments: dict[str, Any]) -> Report:
            with self._progress() as progress, warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                # vLLM itself ends all ranks where one fails.
                report = streamload.load_into(
                    model, uri, cast=self._config.cast, peers=False, progress=progress, **arguments
                )
            for warning in warned:
                logger.warning("%s: %s", report.uri, warning.message)
            return report

        def _tensors(self, place: Place, unwanted: list[Callable[[str], bool]]) -> Iterator[tuple[str, torch.Tensor]]:
            def accept(catalog: Catalog, _: Catalog) -> Catalog:
                return keep(catalog, lambda name: any(each(name) for each in unwanted)) if unwanted else catalog

            with telling():
                for uri in place.uris():
                    with self._progress() as progress:
                        # A layer's tensors lie together in the files: so models get them, and need not keep others'.
                        options = place.options_with(device="cpu", order="file", progress=progress)
                        with open_stream(uri, options, accept=accept) as stream:
                            for name, tensor in stream:
                                yield place.prefix + name, tensor
                    logger.info("Loaded %s", summary(stream.report, "whole"))

        @contextmanager
        def _progress(self) -> Iterator[bool | Bar]:
            if not (self.load_config.use_tqdm_on_load and is_first_rank()):
                yield False
                return
            with closing(Bar("Loading weights with streamload")) as bar:
                yield bar

    return StreamloadModelLoader
