"""Equality with how transformers itself cuts tensors, and with the plans of its models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed import expert_parallel, tensor_parallel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.sharding_utils import DtensorShardOperation

import streamload
from streamload.checkpoint import TensorInfo
from streamload.plan import Placements, Ranks, slice_tensor
from streamload.plan.decoders import FAMILIES
from streamload.plan.tp_plan import STYLES

# Of transformers before version 5.
_OLD = {"ep_router", "gather", "local", "local_colwise", "local_packed_rowwise", "local_rowwise"}


@contextmanager
def mesh_of(rank: int, size: int) -> Iterator[Any]:
    """A mesh as the rank sees it, without the others."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        dist.destroy_process_group()


class Bare(torch.nn.Module):
    """A parameter without a layer around it, as fused experts are."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(*shape, device="meta"))


def cut_by_transformers(style: str, shape: tuple[int, ...], parameter: str, rank: int, size: int) -> torch.Tensor:
    """What transformers reads of a tensor of consecutive numbers."""
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    module: torch.nn.Module
    if len(shape) == 3:
        module = Bare(*shape)
    elif style.startswith("embedding"):
        module = torch.nn.Embedding(shape[0], shape[1], device="meta")
    elif parameter == "bias":
        module = torch.nn.Linear(4, shape[0], device="meta")
    else:
        module = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
    with mesh_of(rank, size) as mesh:
        ALL_PARALLEL_STYLES[style].shard_param(module, parameter, mesh)
        sharded = module._parameters[parameter]
        if not isinstance(sharded, torch.distributed.tensor.DTensor):
            return full
        cut = DtensorShardOperation(sharded).shard_tensor(full)
        assert cut is not None
        return cut


def cut_by_us(placements: Placements, name: str, shape: tuple[int, ...], ranks: Ranks) -> torch.Tensor:
    """The same by our slices."""
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
    tensor = TensorInfo(name, "F32", shape, 0, full.nbytes)
    part = slice_tensor(tensor, placements.of(tensor, ranks, "ceil"), ranks, uneven="ceil")
    assert part is not None
    found = torch.full((part.nbytes // 4,), -1.0)
    for file_start, tensor_start, nbytes in part.runs(0, full.nbytes):
        found[tensor_start // 4 : (tensor_start + nbytes) // 4] = full[file_start // 4 : (file_start + nbytes) // 4]
    return found.reshape(part.shape)


def test_every_style_is_known() -> None:
    assert set(ALL_PARALLEL_STYLES.keys()) | _OLD == set(STYLES)
    # Both register theirs when they are imported.
    assert expert_parallel.__name__ < tensor_parallel.__name__


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("style", sorted(set(STYLES) - _OLD))
def test_each_style_cuts_as_transformers_does(style: str, size: int) -> None:
    cases: list[tuple[str, tuple[int, ...]]] = [("weight", (24, 36)), ("weight", (26, 38))]
    if not style.startswith("embedding"):
        cases += [("bias", (24,)), ("bias", (26,)), ("weight", (12, 8, 24)), ("weight", (12, 10, 26))]
    placements = Placements.from_tp_plan({"layers.*.mlp": style})
    for parameter, shape in cases:
        for rank in range(size):
            ranks = Ranks(rank, size, 0, 1, rank, size)
            if style == "grouped_gemm" and shape[0] % size:
                continue  # an error there and here
            found = cut_by_us(placements, f"model.layers.7.mlp.{parameter}", shape, ranks)
            if style.startswith("packed") and not found.numel():
                continue  # transformers itself fails where nothing is left for a rank
            expected = cut_by_transformers(style, shape, parameter, rank, size)
            assert torch.equal(found, expected), (parameter, shape, rank)


# What each family needs to be as small as it can be; every other number is the same for all.
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
_LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_PARTICULAR: dict[str, dict[str, Any]] = {
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS | {"mlp_only_layers": [0]},
    "qwen3_moe": _EXPERTS | {"mlp_only_layers": [0]},
    "deepseek_v2": _LATENT | {"q_lora_rank": 24, "head_dim": 8},
    "deepseek_v3": _LATENT | {"q_lora_rank": 24, "head_dim": 8},
    "phi": {"qk_layernorm": True},
}


def _model_of(family: str, **more: Any) -> Any:
    numbers = _COMMON | _PARTICULAR.get(family, {}) | more
    made = transformers.CONFIG_MAPPING["gemma3_text" if family == "gemma3" else family](**numbers)
    torch.manual_seed(0)
    automatic: Any = transformers.AutoModelForCausalLM
    return automatic.from_config(made)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture
def model(family: str, models: dict[str, Any]) -> Any:
    if family not in models:
        models[family] = _model_of(family)
    return models[family]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_auto_knows_every_parameter_and_agrees_with_the_models_plan(model: Any, family: str) -> None:
    ours = Placements.from_config(model.config.to_dict())
    theirs = Placements.from_tp_plan(model.tp_plan)
    ranks = Ranks(tp_rank=1, tp_size=2)
    differing = set()
    for name, parameter in model.state_dict().items():
        tensor = TensorInfo(name, "F32", tuple(parameter.shape), 0, parameter.nbytes)
        if cut(ours, tensor, ranks) != cut(theirs, tensor, ranks):
            differing.add(".".join(part for part in name.split(".")[-3:-1]))
    expected = {
        # Its plan cuts what is fused across, and gathers it again before it is used.
        "phi3": {"self_attn.qkv_proj", "mlp.gate_up_proj"},
        # Its plan leaves attention whole.
        "deepseek_v3": {f"self_attn.{name}" for name in ("q_b_proj", "kv_b_proj", "o_proj")},
        # Its plan leaves the shared expert whole.
        "qwen2_moe": {f"shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    }
    assert differing == expected.get(family, set())


def cut(placements: Placements, tensor: TensorInfo, ranks: Ranks) -> TensorInfo | None:
    return slice_tensor(tensor, placements.of(tensor, ranks), ranks)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_the_family_saves_is_loaded_by_every_rank(model: Any, family: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    whole = streamload.load(tmp_path)
    for options in ({}, {"pp_size": 2}, {"expert_parallel": True}):
        every = [streamload.load(tmp_path, rank=rank, world_size=4, **options) for rank in range(4)]
        assert set().union(*every) == whole.keys()
        for name, tensor in whole.items():
            parts = [found[name] for found in every if name in found]
            assert len({part.shape for part in parts}) == 1
            changed = [dim for dim, size in enumerate(tensor.shape) if parts[0].shape[dim] != size]
            assert len(changed) <= 1
            if len(parts) > 1 and not changed:
                assert all(torch.equal(part, tensor) for part in parts)
            if len(parts) == 1:
                assert "expert_parallel" in options, "only experts are on one rank alone"


@pytest.mark.parametrize("family", ["gemma3"])
def test_the_eye_of_a_model_is_not_guessed_at(family: str) -> None:
    config = {"model_type": family, "text_config": _COMMON | {"model_type": "gemma3_text"}}
    placements = Placements.from_config(config)
    known = TensorInfo("language_model.model.layers.3.mlp.up_proj.weight", "BF16", (96, 64), 0, 96 * 64 * 2)
    assert placements.of(known, Ranks(tp_size=2)) == streamload.Shard(0)
    eye = TensorInfo("vision_tower.encoder.layers.0.self_attn.q_proj.weight", "BF16", (4, 4), 0, 32)
    with pytest.raises(streamload.OptionError, match="vision_tower"):
        placements.of(eye, Ranks(tp_size=2))


def test_the_configs_written_are_those_read(tmp_path: Path) -> None:
    _model_of("llama").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in FAMILIES
