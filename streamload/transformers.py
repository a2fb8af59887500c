"""Models of transformers, loaded from wherever streamload reads.

::

    from streamload.transformers import from_pretrained
    from transformers import AutoModelForCausalLM

    model = from_pretrained(AutoModelForCausalLM, "s3://models/llama", dtype="auto")

transformers asks for the checkpoint's tensors one by one, and under tensor parallelism for this rank's slices of them.
Which ones is known before the first is needed: what it does with each name is decided in one go
(``spawn_materialize``, once for each), and what it would cut out of a tensor can be seen by giving it one that has no
content. So the reads run ahead in that order; a slice that was not foreseen is read when it is asked for.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from streamload.asking import AskedLoad
from streamload.checkpoint import TensorInfo
from streamload.checkpoint.text import brief
from streamload.errors import (
    CheckpointError,
    MismatchError,
    MissingDependencyError,
    OptionError,
    StreamloadError,
)
from streamload.loader import resolve_options
from streamload.options import LoadOptions, Options, variables
from streamload.peers import join_peers
from streamload.plan import Box, slice_boxes
from streamload.report import Report
from streamload.sinks.dtypes import require_torch, torch_dtypes, torch_shape
from streamload.uris import scrub_uri

if TYPE_CHECKING:
    import torch

__all__ = ["from_pretrained"]

_logger = logging.getLogger("streamload.transformers")

_CONFIG, _GENERATION_CONFIG = "config.json", "generation_config.json"
# What is read from beside the weights, unless the caller gives that very thing.
_FILES = {"config": _CONFIG, "generation_config": _GENERATION_CONFIG}

# What transformers decides by itself, by its own plan, and what that leaves these options at.
_NO_RANKS: Options = {
    "rank": None,
    "world_size": None,
    "pp_size": 1,
    "expert_parallel": False,
    "placements": "auto",
    "uneven": "error",
    "pattern": None,
    "order": "completion",
}
# What this function has arguments for, and what makes no sense together with a URI.
_NOT_THEIRS = {
    "dtype": "dtype=",
    "torch_dtype": "dtype=",
    "device_map": "device=",
    "tp_plan": "tp=",
    "tp_size": "tp=",
    "distributed_config": "tp=",
    "state_dict": "the URI",
    "gguf_file": "the URI",
    "subfolder": "the URI",
    "revision": "revision=, beside the URI",
    "output_loading_info": "on_report=, and a missing tensor is an error",
    "trust_remote_code": "the model's class: code that lies beside weights is never run",
}
# Those that must not become a part of the model's config.
_NO_CONFIG = {"config", "generation_config", "quantization_config", "ignore_mismatched_sizes", "key_mapping"}


def from_pretrained(
    model_class: Any,
    uri: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    tp: Any = None,
    allow_missing: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    peers: bool = True,
    on_report: Callable[[Report], object] | None = None,
    **options: Unpack[Options],
) -> Any:
    """Load a model as ``model_class.from_pretrained`` does, from any place that streamload reads.

    The config, and the generation config where there is one, come from beside the weights. Every parameter has memory
    of its own. Under tensor parallelism each rank reads its slices only.

    Args:
        model_class: A model's class, or one of transformers' Auto classes.
        uri: As for `streamload.open`.
        dtype: As for transformers: a dtype, its name, or ``"auto"`` for what the config says.
        tp: Over how many ranks tensors are shared out: a number; ``"auto"``, all that torchrun started; or
            transformers' ``DistributedConfig``, which knows other ways as well. None: one process has everything.
        allow_missing: Whether a tensor of the model's that the checkpoint lacks is initialised by transformers, rather
            than an error.
        model_kwargs: What else ``from_pretrained`` is to get, ``attn_implementation`` perhaps.
        peers: False: do not tell other ranks of a failure, nor listen or wait for theirs.
        on_report: Given the account of what happened when the model is there.
        **options: The fields of `LoadOptions`, except for those of ranks and of the order.

    Returns:
        The model, in evaluation mode, all of it loaded and verified as far as the source allows.

    Raises:
        MissingDependencyError: transformers or torch is not installed.
        OptionError: An option has no meaning here.
        CheckpointError: The files do not make a checkpoint, or one that transformers loads from files of its own only.
        MismatchError: Tensors are missing from the checkpoint, or have other shapes than the model's.
        PeerError: Another rank failed, or is gone.
        StreamloadError: Whatever else went wrong.
        Exception: What transformers raises itself, with a note that names the URI.
    """
    _require_transformers()
    distributed = _distributed(tp)
    others = join_peers() if peers and distributed is not None else None
    load: AskedLoad | None = None
    try:
        arguments = dict(model_kwargs or {})
        for name in _NOT_THEIRS.keys() & arguments.keys():
            raise OptionError(f"model_kwargs has {name!r}: that is said by {_NOT_THEIRS[name]}")
        resolved = _resolve(options, distributed=distributed is not None)
        files = [file for name, file in _FILES.items() if arguments.get(name) is None]
        load = AskedLoad(os.fspath(uri), resolved, files=files, optional={_GENERATION_CONFIG})
        if others is not None:
            others.when_failed(load.interrupt)
        load.start()
        model = _load(load, model_class, dtype, distributed, allow_missing, arguments)
        report = load.recorder.report()
        if others is not None:
            left_s = None if resolved.deadline_s is None else max(0.0, resolved.deadline_s - report.seconds)
            others.finish(left_s, versions=load.versions)
    except BaseException as raised:
        error = raised
        if load is not None:
            load.close()
            error = load.why(raised)
        shown = scrub_uri(os.fspath(uri))
        if isinstance(error, StreamloadError):
            error.locate(uri=shown)
        else:
            error.add_note(f"streamload.transformers: while {shown} was loaded")
        if others is not None:
            others.failed(error)
        if error is raised:
            raise
        raise error from error.__cause__
    finally:
        if others is not None:
            others.close()
    if on_report is not None:
        on_report(report)
    return model


def _require_transformers() -> None:
    require_torch()
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs transformers, which cannot be imported ({error}): pip install 'streamload[transformers]'"
        ) from error


def _distributed(tp: Any) -> Any:
    """What transformers calls it; None for a single process."""
    from transformers.distributed.configuration_utils import DistributedConfig

    if tp is None or isinstance(tp, DistributedConfig):
        return tp
    if tp == "auto":
        return DistributedConfig(tp_plan="auto")
    if type(tp) is not int or tp < 1:
        raise OptionError(f"tp={tp!r} is no number of ranks, nor 'auto', nor a DistributedConfig")
    return None if tp == 1 else DistributedConfig(tp_size=tp)


def _resolve(options: Options, *, distributed: bool) -> LoadOptions:
    for name in _NO_RANKS:
        if name in options:
            raise OptionError(f"{name} is not for a model of transformers: it decides that itself; say tp=")
    # Nor is what the environment says of these meant for this.
    resolved = resolve_options({**options, **_NO_RANKS})
    if not distributed or resolved.device != "cuda":
        return resolved
    # The device that transformers will take, too.
    number = variables(["LOCAL_RANK"]).get("LOCAL_RANK")
    if number is None:
        raise OptionError("tp on device 'cuda' takes its number from LOCAL_RANK, which is not set: torchrun sets it")
    if not number.isdecimal():
        raise OptionError(f"tp on device 'cuda': LOCAL_RANK={number!r} is not a number")
    return replace(resolved, device=f"cuda:{int(number)}")


def _load(
    load: AskedLoad,
    model_class: Any,
    dtype: str | torch.dtype,
    distributed: Any,
    allow_missing: bool,
    arguments: dict[str, Any],
) -> Any:
    from transformers.integrations import deepspeed

    if cast("Any", deepspeed).is_deepspeed_zero3_enabled():
        raise OptionError("under DeepSpeed's ZeRO-3 transformers distributes weights itself: use its from_pretrained")
    texts = load.texts.result()
    with tempfile.TemporaryDirectory(prefix="streamload-") as folder:
        for key, text in texts.items():
            if text is not None:
                (Path(folder) / key).write_bytes(text)
        if _CONFIG in texts:
            config, arguments = _config(load, model_class, Path(folder), arguments)
            arguments |= {"config": config}
        if _is_usable(texts.get(_GENERATION_CONFIG), load.uri):
            arguments["generation_config"] = _generation_config(folder, _GENERATION_CONFIG)
        model_class, arguments["config"] = _concrete(model_class, arguments["config"])
        _refuse_quantization(arguments["config"])
        catalog = load.found.result()
        asked = _Asked(load, {tensor.name: tensor for file in catalog.files for tensor in file.tensors})
        strict_shapes = not arguments.setdefault("ignore_mismatched_sizes", False)
        if distributed is not None:
            arguments["distributed_config"] = distributed
        elif load.options.device != "cpu":
            arguments["device_map"] = {"": load.options.device}
        _foresee_in_transformers()
        model, info = model_class.from_pretrained(
            None,
            **arguments | {"ignore_mismatched_sizes": True},
            dtype=dtype,
            state_dict={name: _LazyTensor(tensor, asked) for name, tensor in asked.tensors.items()},
            output_loading_info=True,
        )
        if _CONFIG in texts and arguments.get("generation_config") is None and model.can_generate():
            model.generation_config = _generation_config(folder, _CONFIG, _from_model_config=True)
    load.finish()
    _check(info, allow_missing=allow_missing, strict_shapes=strict_shapes)
    model.config.name_or_path = model.name_or_path = load.uri
    return model


def _config(load: AskedLoad, model_class: Any, folder: Path, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model's config, by its file in the folder, and the arguments that do not go into it."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers import __version__ as version

    text = load.texts.result()[_CONFIG]
    if text is None:
        load.found.result()  # where there is nothing at all, that is what counts
        raise CheckpointError(
            "there is none beside the weights, which says what the model is; model_kwargs={'config': ...} gives one",
            object=_CONFIG,
        )
    try:
        said = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"it is not valid JSON: {error}", object=_CONFIG) from error
    if not isinstance(said, dict):
        raise CheckpointError("it is no JSON object", object=_CONFIG)
    config_class = getattr(model_class, "config_class", None)
    if config_class is None:
        kind = said.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise CheckpointError(
                f"transformers {version} has no model of type {brief(kind)}; code that lies beside weights is not run: "
                "give the model's class",
                object=_CONFIG,
            )
        config_class = AutoConfig
    kept = {name: arguments[name] for name in _NO_CONFIG & arguments.keys()}
    others = {name: value for name, value in arguments.items() if name not in kept}
    config, rest = config_class.from_pretrained(folder, return_unused_kwargs=True, **others)
    return config, {**rest, **kept}


def _concrete(model_class: Any, config: Any) -> tuple[Any, Any]:
    """The class that one of transformers' Auto classes stands for, and the config that it takes.

    Auto classes by themselves want to look at a folder of files.
    """
    from transformers.models.auto import auto_factory

    if not (isinstance(model_class, type) and issubclass(model_class, auto_factory._BaseAutoModelClass)):
        return model_class, config
    mapping: Any = model_class._model_mapping
    if type(config) not in mapping:
        raise CheckpointError(
            f"{model_class.__name__} knows no model for a {type(config).__name__}: give the model's class",
            object=_CONFIG,
        )
    concrete = cast("Any", auto_factory)._get_model_class(config, mapping)
    text_class = config.sub_configs.get("text_config")
    if text_class is None or getattr(concrete, "config_class", None) is not text_class:
        return concrete, config
    # The language model of one that also has eyes.
    text_config = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        text_config.quantization_config = config.quantization_config
    return concrete, text_config


def _is_usable(text: bytes | None, uri: str) -> bool:
    """Whether there is a generation config; one that is not JSON counts as none, as for transformers."""
    if text is None:
        return False
    try:
        said = json.loads(text.decode())
    except ValueError as error:
        _logger.warning("%s, %s counts as not there: it is not valid JSON: %s", uri, _GENERATION_CONFIG, error)
        return False
    if not isinstance(said, dict):
        raise CheckpointError("it is no JSON object", object=_GENERATION_CONFIG)
    return True


def _generation_config(folder: str, name: str, **more: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder, config_file_name=name, **more)


def _refuse_quantization(config: Any) -> None:
    """Refuse what transformers does not load from tensors alone: a quantizer that opens the files by itself."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    said = getattr(config, "quantization_config", None)
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    quantizer = AUTO_QUANTIZER_MAPPING.get(str(getattr(method, "value", method)))
    prepare = getattr(quantizer, "_process_model_before_weight_loading", None)
    if prepare is not None and "checkpoint_files" in inspect.signature(prepare).parameters:
        raise CheckpointError(
            f"weights that {getattr(method, 'value', method)} has quantized are loaded by transformers from its own "
            "files only: `streamload stage` brings them onto a disk for it",
            object=_CONFIG,
        )


def _check(info: Mapping[str, Any], *, allow_missing: bool, strict_shapes: bool) -> None:
    """Refuse a model of which a part was not loaded."""
    missing = sorted(info["missing_keys"])
    if missing and not allow_missing:
        raise MismatchError(
            f"the checkpoint lacks {len(missing)} of the model's tensors: {brief(missing)} (allow_missing=True has "
            "transformers initialise them)",
            missing=missing,
        )
    if strict_shapes and info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"], key=lambda key: str(key[0]))
        more = len(info["mismatched_keys"]) - 1
        raise MismatchError(
            f"the model's tensor {brief(name)} has the shape {list(expected)}, the checkpoint's is {list(found)}"
            + (f"; the same goes for {more} more" if more else "")
        )


class _LazyTensor:
    """A tensor of the checkpoint's, as transformers asks for it: as if it were safetensors' slice of a file."""

    def __init__(self, info: TensorInfo, asked: _Asked) -> None:
        self._info = info
        self._asked = asked

    def get_shape(self) -> list[int]:
        return list(torch_shape(self._info))

    def get_dtype(self) -> str:
        return self._info.dtype

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtypes()[self._info.dtype]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._asked.get(self._info, index)

    def foresee(self, sharding: Any, number: int | None) -> None:
        """It will be asked for, all of it or what this cuts out of it; nothing, perhaps."""
        recording = _Recording(self)
        if sharding is None:
            recording[...]
        else:
            try:
                sharding.shard_tensor(recording, tensor_idx=number)
            except Exception:
                # Whatever it wants of a tensor that this one does not have: what is not foreseen is read when it is
                # asked for, and an error is raised then.
                return
        self._asked.foresee(self._info.name, recording.boxes)


class _Recording:
    """A tensor without content, that notes down which parts of it were asked for."""

    def __init__(self, tensor: _LazyTensor) -> None:
        self._tensor = tensor
        self.boxes: list[Box] = []

    def get_shape(self) -> list[int]:
        return self._tensor.get_shape()

    def get_dtype(self) -> str:
        return self._tensor.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        import torch

        box = _box(index, self.get_shape())
        if box is None:
            raise NotImplementedError(f"an index like {index!r}")
        self.boxes.append(box)
        return torch.empty([end - start for start, end in box], dtype=self._tensor.dtype, device="meta")


class _Asked:
    """What transformers asks for: noted down at first, then read and handed out.

    Args:
        load: Not told yet what is asked for.
        tensors: All there are, by their names.
    """

    def __init__(self, load: AskedLoad, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._load = load
        self._lock = threading.Lock()
        self._told = False
        self._foreseen: dict[str, list[Box]] = {}
        # Of those that were taken: the parts that were not handed out yet.
        self._parts: dict[str, dict[Box, torch.Tensor]] = {}

    def foresee(self, name: str, boxes: list[Box]) -> None:
        with self._lock:
            if boxes and not self._told:
                self._foreseen.setdefault(name, []).extend(box for box in boxes if box not in self._foreseen[name])

    def get(self, info: TensorInfo, index: Any) -> torch.Tensor:
        """A tensor, or a part of it, which nothing else refers to."""
        box = _box(index, torch_shape(info))
        # The first who asks is told: transformers has decided by now what becomes of each name.
        with self._lock:
            if not self._told:
                self._told = True
                self._load.foresee([self._planned(name) for name in self._foreseen])
            boxes = self._foreseen.get(info.name, ())
            if box in boxes and info.name not in self._parts:
                self._parts[info.name] = self._take(info, self._foreseen[info.name])
            part = None if box is None else self._parts.get(info.name, {}).pop(box, None)
        if part is not None:
            return part
        if box is not None and (brought := _slice(info, [box])) is not None:
            return self._load.bring(brought)
        return self._load.bring(info)[index].clone()

    def _planned(self, name: str) -> TensorInfo:
        info, boxes = self.tensors[name], self._foreseen[name]
        return _slice(info, boxes) or info

    def _take(self, info: TensorInfo, boxes: list[Box]) -> dict[Box, torch.Tensor]:
        tensor = self._load.take(info.name)
        if _slice(info, boxes) is None:  # all of it has come
            return {box: tensor[tuple(slice(*limits) for limits in box)].clone() for box in boxes}
        if len(boxes) == 1:
            return {boxes[0]: tensor}
        import torch

        sizes = [[end - start for start, end in box] for box in boxes]
        parts = torch.split(tensor, [math.prod(size) for size in sizes])
        return {box: part.view(size) for box, part, size in zip(boxes, parts, sizes, strict=True)}


def _slice(info: TensorInfo, boxes: list[Box]) -> TensorInfo | None:
    """What is to be read for these parts, one behind the other; None where it has to be all of it, and be cut then."""
    shape = torch_shape(info)
    if boxes == [tuple((0, size) for size in shape)]:
        return info
    if shape != info.shape or any(_overlap(*pair) for pair in combinations(boxes, 2)):
        return None
    try:
        return slice_boxes(info, boxes)
    except OptionError:  # a part of a byte
        return None


def _overlap(one: Box, other: Box) -> bool:
    return all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in zip(one, other, strict=True))


def _box(index: Any, shape: list[int] | tuple[int, ...]) -> Box | None:
    """The part of a tensor that an index names; None where it is none that begins and ends somewhere."""
    if index is Ellipsis:
        return tuple((0, size) for size in shape)
    indices = index if isinstance(index, tuple) else (index,)
    if len(indices) > len(shape) or not all(isinstance(each, slice) and each.step in (None, 1) for each in indices):
        return None
    limits = [each.indices(size)[:2] for each, size in zip(indices, shape, strict=False)]
    limits += [(0, size) for size in shape[len(indices) :]]
    return tuple((start, max(start, end)) for start, end in limits)


def _foresee_in_transformers() -> None:
    """Have transformers say, of each tensor that it will ask us for, what it will want of it.

    It hands each to a thread of a pool, to be read there; or, without a pool, keeps a function that is called when the
    tensor's turn comes. With ours it does the latter: the reads are under way on the engine's thread, and a pool that
    takes everything at once would leave nothing within limits. What is not ours goes its usual way, and it stays so: to
    put it back while another thread loads would be worse.
    """
    from transformers import core_model_loading

    module: Any = core_model_loading
    original = module.spawn_materialize
    if hasattr(original, "streamload"):
        return

    @functools.wraps(original)
    def spawn_materialize(thread_pool: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, _LazyTensor):
            return original(thread_pool, tensor, *args, **kwargs)
        tensor.foresee(kwargs.get("sharding_op"), kwargs.get("tensor_idx"))
        return original(None, tensor, *args, **kwargs)

    spawn_materialize.streamload = True  # type: ignore[attr-defined]
    module.spawn_materialize = spawn_materialize
