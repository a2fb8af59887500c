"""What streamload and a real vLLM make of each other's pre-sharded checkpoints, and both of one ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

import streamload
from streamload.shared_memory import covering
from tests.checkpoints import same_tensor
from tests.engines.models import Llama
from tests.engines.ranks import Rank
from tests.test_shared_memory import overlapping

_SIZE = dist.get_world_size()
_TP = Rank(tp_size=_SIZE, pp_size=1)
_PP = Rank(tp_size=1, pp_size=_SIZE)
# Two ranks share the second one's only head of keys and values.
_LLAMAS = {"untied": Llama(), "tied": Llama(kv_heads=1, tied=True)}
# Larger than most of the tensors, and smaller than some.
_FILE_BYTES = 20_000
# What vLLM makes one tensor of.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(params=[_TP, _PP][:_SIZE], ids=["tp", "pp"][:_SIZE])
def ranks(request: pytest.FixtureRequest) -> Rank:
    """All processes: as ranks that share each layer, or as pipeline stages."""
    ranks: Rank = request.param
    return ranks


@pytest.fixture(params=_LLAMAS)
def llama(request: pytest.FixtureRequest) -> Llama:
    """A model."""
    return _LLAMAS[request.param]


@pytest.fixture
def ordinary(llama: Llama, shared: Path, ranks: Rank) -> Path:
    """Its ordinary checkpoint."""
    return written(llama, shared / "ordinary", ranks)


@pytest.fixture
def presharded(llama: Llama, shared: Path, ranks: Rank) -> Path:
    """A folder for each rank's own files, with the config that vLLM wants there."""
    return written(llama, shared / "presharded", ranks, weights=False)


@pytest.fixture(params=["default", "tp_rank", "rank"])
def pattern(request: pytest.FixtureRequest, ranks: Rank) -> str | None:
    """What those files are called."""
    if request.param == "default":
        return None
    stage = "stage{pp_rank}" if ranks.pp_size > 1 else "{{braces}}"
    return f"{stage}.{{{request.param}}}-{{part}}.safetensors"


def written(llama: Llama, folder: Path, ranks: Rank, *, weights: bool = True) -> Path:
    """The folder, once rank 0 has written a model there; vLLM's ranks are grouped to match."""
    if dist.get_rank() == 0:
        llama.write(folder, weights=weights)
    dist.barrier()
    ranks.join(folder)
    return folder


def check(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_tensor(found[name], tensor), name


def test_vllm_loads_what_streamload_saves(ordinary: Path, presharded: Path, ranks: Rank, pattern: str | None) -> None:
    model = ranks.loaded(ordinary)
    saved = streamload.save_sharded(model, presharded, **ranks.numbers, pattern=pattern, max_file_bytes=_FILE_BYTES)
    assert len(saved.files) > 2
    check(ranks.loaded(presharded, "sharded_state", pattern=pattern).state_dict(), model.state_dict())


def test_streamload_loads_what_vllm_saves(ordinary: Path, presharded: Path, ranks: Rank, pattern: str | None) -> None:
    model = ranks.loaded(ordinary)
    ShardedStateLoader.save_model(model, str(presharded), pattern, _FILE_BYTES)
    into = ranks.empty(presharded)
    report = streamload.load_into(into, presharded, **ranks.numbers, pattern=pattern)
    assert report.files > 2
    check(into.state_dict(), model.state_dict())
    own = streamload.load(presharded, **ranks.numbers, pattern=pattern)
    check(own, ShardedStateLoader._filter_subtensors(model.state_dict()))


def test_both_leave_padding_as_it_is(llama: Llama, ordinary: Path, shared: Path, ranks: Rank) -> None:
    """Into a model that has room for more tokens."""
    folder = written(replace(llama, vocabulary=llama.vocabulary + 128), shared / "padded", ranks, weights=False)
    streamload.save_sharded(ranks.loaded(ordinary), folder, **ranks.numbers)
    into = ranks.empty(folder)
    with pytest.warns(UserWarning, match="smaller than what they fill"):
        streamload.load_into(into, folder, **ranks.numbers)
    check(into.state_dict(), ranks.loaded(folder, "sharded_state").state_dict())


@given(overlapping())
def test_both_leave_out_the_same_tensors(tensors: dict[str, torch.Tensor]) -> None:
    assert covering(tensors).keys() == ShardedStateLoader._filter_subtensors(tensors).keys()


def test_slices_of_an_ordinary_checkpoint_are_vllms(ordinary: Path, ranks: Rank) -> None:
    weights = {name: tensor for name, tensor in ranks.loaded(ordinary).state_dict().items() if name.endswith(".weight")}
    slices = streamload.load(ordinary, **ranks.numbers)
    for fused, parts in _FUSED.items():
        for name in [name for name in weights if f".{fused}." in name]:
            slices[name] = torch.cat([slices.pop(name.replace(fused, part)) for part in parts])
    if "lm_head.weight" in weights.keys() - slices.keys():
        slices["lm_head.weight"] = slices["model.embed_tokens.weight"]
    check(slices, weights)


def test_an_engine_generates_the_same(shared: Path) -> None:
    llama = _LLAMAS["untied"]
    ordinary = written(llama, shared / "ordinary", _TP)
    presharded = written(llama, shared / "presharded", _TP, weights=False)
    streamload.save_sharded(_TP.loaded(ordinary), presharded, **_TP.numbers, max_file_bytes=_FILE_BYTES)
    # Both before either is gone: that would take the ranks' groups along.
    engines = [
        LLM(**_TP.arguments(folder, load_format), max_model_len=64, kv_cache_memory_bytes=16 << 20)
        for folder, load_format in ((ordinary, "auto"), (presharded, "sharded_state"))
    ]
    expected, found = [generated(engine) for engine in engines]
    assert len(set(expected)) > 1
    assert found == expected


def generated(engine: LLM) -> list[int]:
    """The tokens that an engine adds to some; to very few, vLLM 0.32 uses AMX before anything has asked for it."""
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": list(range(20))}], sampling, use_tqdm=False)
    return list(answer.outputs[0].token_ids)
