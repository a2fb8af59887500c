"""A real vLLM loads with streamload what it loads with its own loader: every parameter, and the tokens of an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

import streamload
from streamload.units import format_bytes
from streamload.vllm import register
from tests.checkpoints import same_tensor
from tests.engines.models import Fp8, Gptq, Int8, Llama, Mixtral, Qwen2
from tests.engines.ranks import Rank

_SIZE = dist.get_world_size()
_TP = Rank(tp_size=_SIZE, pp_size=1)
_PP = Rank(tp_size=1, pp_size=_SIZE)
_MODELS = {"llama": Llama(), "qwen2": Qwen2(), "mixtral": Mixtral()}
_QUANTIZED = {"int8": Int8(), "fp8": Fp8(), "gptq": Gptq()}
# Those that load an ordinary checkpoint.
_MODES = ["whole", "sliced"]
# Alive until the last test: the first engine that goes takes the ranks' groups along.
_ENGINES: list[LLM] = []


@pytest.fixture(params=_MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """How it is loaded."""
    name: str = request.param
    return name


@pytest.fixture(params=_MODELS)
def model(request: pytest.FixtureRequest) -> Llama:
    """What is loaded."""
    return _MODELS[request.param]


@pytest.fixture(params=[_TP, _PP][:_SIZE], ids=["tp", "pp"][:_SIZE])
def ranks(request: pytest.FixtureRequest) -> Rank:
    """All processes: as ranks that share each layer, or as pipeline stages."""
    found: Rank = request.param
    return found


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the plugin says in the engine's log; asked again, what it has said since."""

    def said() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name == "vllm.streamload"]
        caplog.clear()
        return lines

    return said


def written(model: Llama, folder: Path, *, weights: bool = True, uri: str | None = None) -> Path:
    """The folder, once rank 0 has written a model there, and its weights under an S3 URI if there is one."""
    if dist.get_rank() == 0:
        model.write(folder, weights=weights)
        if uri is not None:
            stored(folder / "model.safetensors", uri)
    dist.barrier()
    return folder


def stored(path: Path, uri: str) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = botocore.session.get_session().create_client("s3")
    client.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    client.close()


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_tensor(found[name], tensor), name


def generated(folder: Path, load_format: str, **extra: Any) -> list[int]:
    """The tokens that an engine adds to some; to very few, vLLM 0.32 uses AMX before anything has asked for it."""
    engine = LLM(**_TP.arguments(folder, load_format, **extra), max_model_len=64, kv_cache_memory_bytes=16 << 20)
    _ENGINES.append(engine)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": list(range(20))}], sampling, use_tqdm=False)
    return list(answer.outputs[0].token_ids)


def test_every_parameter_is_vllms_own(model: Llama, mode: str, ranks: Rank, shared: Path) -> None:
    folder = written(model, shared / "model")
    ranks.join(folder)
    check(
        ranks.loaded(folder, "streamload", mode=mode).state_dict(),
        ranks.loaded(folder).state_dict(),
    )


@pytest.mark.parametrize("name", _QUANTIZED)
def test_every_parameter_of_a_quantized_model(name: str, mode: str, ranks: Rank, shared: Path) -> None:
    folder = written(_QUANTIZED[name], shared / "model")
    ranks.join(folder)
    expected = ranks.loaded(folder)
    assert {torch.int8, torch.float8_e4m3fn, torch.int32} & {tensor.dtype for tensor in expected.state_dict().values()}
    check(ranks.loaded(folder, "streamload", mode=mode).state_dict(), expected.state_dict())


def test_an_engine_with_a_quantized_model_generates_the_same(shared: Path) -> None:
    folder = written(Int8(), shared / "model")
    _TP.join(folder)
    expected = generated(folder, "auto")
    assert len(set(expected)) > 1
    for mode in _MODES:
        assert generated(folder, "streamload", mode=mode) == expected


def test_a_rank_reads_its_slices(model: Llama, shared: Path, log: Callable[[], list[str]]) -> None:
    """Of rows as long as those of real models: shorter ones are read along."""
    wide = replace(model, hidden=512, intermediate=512, head_size=128, vocabulary=8192)
    folder = written(wide, shared / "model")
    _TP.join(folder)
    into = _TP.empty(folder)
    with _TP.loading(folder, "auto"):
        found = streamload.load_sliced(into, folder)
    check(into.state_dict(), _TP.loaded(folder).state_dict())
    assert found.whole == {}
    read_bytes = found.report.fetched_bytes - found.report.header_bytes
    assert max(found.report.nbytes, read_bytes) < {1: 1.001, 2: 0.6}[_SIZE] * found.checkpoint_bytes
    check(_TP.loaded(folder, "streamload", mode="auto").state_dict(), into.state_dict())
    (line,) = log()
    assert line.endswith(f"needed of {format_bytes(found.checkpoint_bytes)}")


def test_tensors_are_the_models_own(shared: Path) -> None:
    """Kept while all others come, each its own object and memory, in the order of the file."""
    folder = written(Llama(), shared / "model")
    _TP.join(folder)
    with _TP.loading(folder, "streamload", memory_bytes="1MiB") as (loader, config):
        kept = dict(loader.get_all_weights(config, torch.nn.Module()))
    check(kept, load_file(folder / "model.safetensors"))
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept.values()}) == len(kept)
    assert list(kept) == [tensor.name for tensor in streamload.inspect(folder).plan.catalog.files[0].tensors]


def test_pre_sharded_files_of_either(model: Llama, ranks: Rank, shared: Path, log: Callable[[], list[str]]) -> None:
    ordinary = written(model, shared / "ordinary")
    ranks.join(ordinary)
    expected = ranks.loaded(ordinary)
    for name, pattern in {"ours": None, "vllms": "{pp_rank}of-{tp_rank}-{part}.safetensors"}.items():
        folder = written(model, shared / name, weights=False)
        if name == "ours":
            streamload.save_sharded(expected, folder, **ranks.numbers, max_file_bytes=20_000)
        else:
            pattern = pattern if ranks.pp_size > 1 else "{tp_rank}-{part}.safetensors"
            ShardedStateLoader.save_model(expected, str(folder), pattern, 20_000)
        found = ranks.loaded(folder, "streamload", mode="sharded", pattern=pattern).state_dict()
        # vLLM parts a head from its embedding where it finds one in the files; then the last stage has only that.
        check(found, {name: tensor for name, tensor in expected.state_dict().items() if name in found})
        (line,) = log()
        assert f"{folder}, mode sharded" in line


@pytest.mark.parametrize("name", _MODELS)
def test_engines_generate_the_same(name: str, shared: Path, bucket: str, log: Callable[[], list[str]]) -> None:
    model = _MODELS[name]
    uri = f"s3://{bucket}/{name}"
    folder = written(model, shared / "ordinary", uri=uri)
    config = written(model, shared / "config", weights=False)
    _TP.join(folder)
    expected = generated(folder, "auto")
    assert len(set(expected)) > 1
    nbytes = streamload.inspect(folder).plan.tensor_bytes
    for mode in _MODES:
        # Parts of an object have nothing in S3 that they could be compared with.
        verify = "require" if mode == "whole" or _SIZE == 1 else "auto"
        assert generated(folder, "streamload", mode=mode) == expected
        assert generated(config, "streamload", mode=mode, uri=uri, concurrency=4, verify=verify) == expected
        disk, s3 = log()
        assert f"{folder}, mode {mode}" in disk
        assert f"{uri}, mode {mode}" in s3
        assert nbytes > 0
    streamload.save_sharded(_TP.loaded(folder), config, **_TP.numbers)
    assert generated(config, "streamload", mode="sharded") == expected
    assert log()[-1].startswith(f"Loaded {config}, mode sharded")


def test_an_object_uri_as_the_model(
    shared: Path, bucket: str, log: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of Run:ai's format: vLLM takes such a URI with no other."""
    uri = f"s3://{bucket}/object-uri"
    folder = written(Llama(), shared / "model", uri=uri)
    if dist.get_rank() == 0:
        stored(folder / "config.json", uri)
    dist.barrier()
    _TP.join(folder)
    with pytest.raises(ValueError, match="load a model from object storage"):
        _TP.empty(uri, "streamload")
    monkeypatch.setenv("STREAMLOAD_VLLM_REPLACES", "runai_streamer")
    register()
    check(
        _TP.loaded(uri, memory_limit=64 << 20, distributed=True).state_dict(),
        _TP.loaded(folder).state_dict(),
    )
    assert log()[-1].startswith(f"Loaded {uri}, mode whole")


def test_what_else_a_model_asks_for(shared: Path) -> None:
    """Secondary weights with a prefix, out of another folder and the same; files of its own choice; tensors unused."""
    folder = written(Llama(), shared / "model")
    other = written(Llama(kv_heads=4), shared / "other")
    if dist.get_rank() == 0:
        for name in ("head.safetensors", "zhead.safetensors"):
            save_file({f"{name}.weight": torch.ones(3)}, folder / name)
    dist.barrier()
    _TP.join(folder)
    model = torch.nn.Module()
    model.allow_patterns_overrides = ["no-such-*.safetensors", "mod*.safetensors", "*.safetensors"]  # type: ignore[assignment]
    model.secondary_weights = [  # type: ignore[assignment]
        DefaultModelLoader.Source(str(other), None, prefix="other."),
        DefaultModelLoader.Source(str(folder), None, prefix="pooler.", allow_patterns_overrides=["head.safetensors"]),
    ]
    found: list[dict[str, torch.Tensor]] = []
    for load_format in ("auto", "streamload"):
        with _TP.loading(folder, load_format) as (loader, config):
            found.append(dict(loader.get_all_weights(config, model)))
    check(found[1], found[0])
    assert "pooler.head.safetensors.weight" in found[1]
    model.is_unused_checkpoint_weight = lambda name: "mlp" in name  # type: ignore[assignment]
    with _TP.loading(folder, "streamload") as (loader, config):
        left = dict(loader.get_all_weights(config, model))
    assert left.keys() == {name for name in found[0] if "mlp" not in name or name.startswith("other.")}


def test_other_ranks_experts_are_not_read(shared: Path, log: Callable[[], list[str]]) -> None:
    folder = written(Mixtral(), shared / "model")
    engine = {"enable_expert_parallel": True, "enable_ep_weight_filter": True}
    _TP.join(folder)
    found: list[dict[str, torch.Tensor]] = []
    for load_format in ("auto", "streamload"):
        with _TP.loading(folder, load_format, engine=engine) as (loader, config):
            if load_format == "auto":
                loader._init_ep_weight_filter(config)
            found.append(dict(loader.get_all_weights(config, torch.nn.Module())))
    check(found[1], found[0])
    experts = [name for name in found[1] if ".experts." in name]
    assert len(experts) * _SIZE == 2 * 4 * 3


def test_a_reload_from_elsewhere_is_from_there(shared: Path) -> None:
    """Though a URI was given for the model that was loaded first."""
    folder, other = written(Llama(), shared / "model"), written(Llama(), shared / "other", weights=False)
    if dist.get_rank() == 0:
        save_file(Llama().weights(seed=6), other / "model.safetensors")
    dist.barrier()
    _TP.join(folder)
    model = _TP.empty(folder)
    with _TP.loading(folder, "streamload", uri=str(folder)) as (loader, config):
        loader.load_weights(model, config)
        config.model = str(other)
        found = dict(loader.get_all_weights(config, model))
    check(found, Llama().weights(seed=6))


def _without(*names: str) -> Callable[[Path], None]:
    def leave_out(path: Path) -> None:
        tensors = load_file(path)
        save_file({name: tensor for name, tensor in tensors.items() if name not in names}, path)

    return leave_out


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


_LAYER = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]


@pytest.mark.parametrize(
    ("damage", "extra", "said"),
    [
        (_without("model.norm.weight"), {}, "nothing for 1 of the model's parameters: ['model.norm.weight']"),
        (_without(*_LAYER), {}, "'model.layers.1.self_attn.qkv_proj.weight'"),
        (_cut, {}, "model.safetensors, bytes 0-"),
        (Path.unlink, {}, "no file ends in .safetensors"),
        (_cut, {"uri": "s3://no-such-bucket/llama"}, "s3://no-such-bucket/llama: "),
        (_cut, {"urii": "s3://models/llama"}, "model_loader_extra_config has no key 'urii'; there are uri, mode, "),
        (_cut, {"memory_bytes": "much"}, "model_loader_extra_config: memory_bytes='much': "),
        (_cut, {"mode": "sharded"}, "no file is called 'model-rank-"),
    ],
    ids=["norm", "qkv", "truncated", "nothing", "bucket", "key", "value", "sharded"],
)
def test_an_engine_does_not_start(
    damage: Callable[[Path], None],
    extra: dict[str, Any],
    said: str,
    shared: Path,
    bucket: str,
    log: Callable[[], list[str]],
) -> None:
    folder = written(Llama(), shared / "model")
    if dist.get_rank() == 0:
        damage(folder / "model.safetensors")
    dist.barrier()
    _TP.join(folder)
    with pytest.raises(streamload.StreamloadError) as raised:
        _TP.loaded(folder, "streamload", **extra)
    lines = [line for line in log() if line.startswith("Loading weights failed: ")]
    assert lines == [f"Loading weights failed: {raised.value}"]
    assert said in lines[0]
    assert "\n" not in lines[0]


def test_what_a_model_refuses_is_named(shared: Path, log: Callable[[], list[str]]) -> None:
    folder = written(Llama(), shared / "model")
    if dist.get_rank() == 0:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 3, dtype=torch.bfloat16)
        save_file(tensors, folder / "model.safetensors")
    dist.barrier()
    _TP.join(folder)
    with pytest.raises((AssertionError, IndexError, ValueError, RuntimeError)):
        _TP.loaded(folder, "streamload")
    assert f"{folder}: the model did not take tensor 'model.layers.0.mlp.down_proj.weight': " in log()[-1]


def test_looking_ahead_reads_headers(shared: Path) -> None:
    folder = written(Llama(), shared / "model")
    _TP.join(folder)
    with _TP.loading(folder, "streamload") as (loader, config):
        loader.download_model(config)
        config.model = str(shared)
        with pytest.raises(streamload.NotFoundError, match="there are no files in this folder"):
            loader.download_model(config)


def test_registering_again_changes_nothing(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    folder = written(Llama(), shared / "model")
    _TP.join(folder)
    with _TP.loading(folder, "streamload") as (loader, _):
        ours = type(loader)
    monkeypatch.setenv("STREAMLOAD_VLLM_REPLACES", "runai_streamer_sharded")
    register()
    with _TP.loading(folder, "runai_streamer_sharded") as (loader, config):
        assert type(loader) is ours
        with pytest.raises(streamload.CheckpointError, match="no file is called"):
            loader.load_weights(_TP.empty(folder), config)
    monkeypatch.setenv("STREAMLOAD_VLLM_REPLACES", "auto")
    with pytest.raises(streamload.OptionError, match="REPLACES='auto' is none of runai_streamer"):
        register()
