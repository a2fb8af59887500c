"""Placements from rules, plans and configs: what they know, and what they refuse to guess."""

from __future__ import annotations

from typing import Any

import pytest

from streamload.checkpoint import Catalog, ShardFile, TensorInfo
from streamload.errors import OptionError
from streamload.plan import Absent, Experts, PackedShard, Placements, Ranks, Replicate, Shard

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8}


def tensor(name: str, *shape: int, dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, dtype, shape or (8, 8), 0, 128)


def placed(config: dict[str, Any], name: str, ranks: Ranks, *shape: int, **more: Any) -> object:
    return Placements.from_config(config).of(tensor(name, *shape), ranks, **more)


def test_the_first_rule_that_matches_counts() -> None:
    placements = Placements.from_rules([("*.k_proj.*", Shard(0, 2)), ("*_proj.*", Shard(0)), ("norm", Replicate())])
    assert placements.of(tensor("a.k_proj.weight"), Ranks()) == Shard(0, 2)
    assert placements.of(tensor("a.v_proj.weight"), Ranks()) == Shard(0)
    with pytest.raises(OptionError, match="'other': no rule"):
        placements.of(tensor("other"), Ranks())


def test_a_plan_goes_by_modules_and_parameters_with_and_without_prefix() -> None:
    plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    placements, ranks = Placements.from_tp_plan(plan), Ranks(tp_size=2)
    for name, expected in {
        "model.layers.3.self_attn.q_proj.weight": Shard(-2),
        "layers.3.self_attn.q_proj.weight": Shard(-2),
        "layers.11.mlp.down_proj.weight": Shard(-1),
        "model.layers.0.mlp.experts.gate_up_proj": PackedShard(-2, 2),
        "model.layers.0.mlp.experts.3.gate_proj.weight": Shard(-2),
        "model.layers.0.block_sparse_moe.experts.3.w1.weight": Shard(-2),
        "model.embed_tokens.weight": Shard(0),
        "model.layers.0.mlp.gate.weight": Replicate(),
        "lm_head.weight": Replicate(),
    }.items():
        assert placements.of(tensor(name), ranks) == expected, name
    assert placements.of(tensor("model.layers.3.self_attn.q_proj.bias", 8), ranks) == Shard(-1)
    assert placements.of(tensor("model.layers.3.mlp.down_proj.bias", 8), ranks) == Replicate()


def test_a_plan_with_experts_that_lie_one_by_one() -> None:
    names = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in range(8)]
    file = ShardFile("x.safetensors", 2000, 0, tuple(map(tensor, names)))
    placements = Placements.from_tp_plan({"layers.*.mlp.experts.gate_up_proj": "grouped_gemm"})
    sliced = placements.slice(Catalog((file,)), Ranks(ep_rank=1, ep_size=4))
    assert [part.name for part in sliced.files[0].tensors] == names[2:4]
    wanted = Catalog((ShardFile("x.safetensors", 2000, 0, (tensor(names[3]),)),))
    assert placements.slice(wanted, Ranks(ep_rank=1, ep_size=4), whole=Catalog((file,))).tensors == 1
    with pytest.raises(OptionError, match="8 experts cannot be shared out equally to 3 ranks"):
        placements.slice(Catalog((file,)), Ranks(ep_rank=1, ep_size=3))


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "size", "expected"),
    [(8, 2, 2, 1), (8, 2, 8, 4), (8, 1, 4, 4), (8, 8, 8, 1), (8, 4, 4, 1)],
)
def test_key_value_heads(heads: int, key_value_heads: int, size: int, expected: int) -> None:
    config = LLAMA | {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": 4}
    name = "model.layers.0.self_attn.{}.weight"
    ranks = Ranks(tp_size=size)
    assert placed(config, name.format("q_proj"), ranks) == Shard(0)
    assert placed(config, name.format("v_proj"), ranks) == Shard(0, expected)
    fused = PackedShard(0, (heads * 4, key_value_heads * 4, key_value_heads * 4), (1, expected, expected))
    assert placed(config, name.format("qkv_proj"), ranks) == fused


@pytest.mark.parametrize(("heads", "key_value_heads", "size"), [(8, 8, 3), (12, 6, 4), (8, 3, 4)])
def test_heads_that_do_not_divide(heads: int, key_value_heads: int, size: int) -> None:
    config = LLAMA | {"num_attention_heads": heads, "num_key_value_heads": key_value_heads}
    with pytest.raises(OptionError, match=r"'model.layers.0.self_attn.k_proj.weight': . attention heads cannot"):
        placed(config, "model.layers.0.self_attn.k_proj.weight", Ranks(tp_size=size))
    assert placed(config, "model.layers.0.self_attn.k_proj.weight", Ranks(tp_size=size), uneven="ceil") == Shard(0)


def test_experts_whole_or_in_part() -> None:
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 8}
    shares, owners = Ranks(tp_rank=1, tp_size=2), Ranks(tp_rank=1, tp_size=2, ep_rank=1, ep_size=2)
    name = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    assert placed(config, name.format(5, "w1"), shares) == Shard(0)
    assert placed(config, name.format(5, "w2"), shares) == Shard(1)
    assert placed(config, name.format(5, "w2"), owners) == Replicate()
    assert placed(config, name.format(3, "w2"), owners) == Absent()
    assert placed(config, "model.layers.1.mlp.experts.gate_up_proj", shares) == PackedShard(-2, 2)
    assert placed(config, "model.layers.1.mlp.experts.down_proj", shares) == Shard(-1)
    assert placed(config, "model.layers.1.mlp.experts.down_proj", owners) == Experts()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.self_attn.q_proj.qweight",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.other_proj.weight",
        "model.layers.4.mlp.up_proj.weight",
        "model.vision.patch.weight",
        "embed.weight",
    ],
)
def test_what_is_not_known_is_an_error_naming_the_tensor(name: str) -> None:
    with pytest.raises(OptionError, match=f"tensor '{name}': placements='auto' does not know"):
        placed(LLAMA, name, Ranks(tp_size=2))


@pytest.mark.parametrize("dtype", ["U8", "I32", "F8_E4M3", "F4"])
def test_quantized_weights_are_not_guessed_at(dtype: str) -> None:
    weight = tensor("model.layers.0.self_attn.q_proj.weight", dtype=dtype)
    with pytest.raises(OptionError, match=f"{weight.name}' is {dtype}.*quantized"):
        Placements.from_config(LLAMA).of(weight, Ranks(tp_size=2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "a model of type None"),
        ({"model_type": "rwkv"}, "a model of type 'rwkv'"),
        ({"model_type": "llama", "num_attention_heads": 8}, "num_hidden_layers is None"),
        (LLAMA | {"num_attention_heads": "8"}, "num_attention_heads is '8'"),
        (LLAMA | {"text_config": 7}, "text_config is no object"),
    ],
)
def test_a_config_that_does_not_say(config: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Placements.from_config(config)


@pytest.mark.parametrize(("layers", "stages"), [(4, 2), (5, 2), (7, 3), (3, 3)])
def test_stages_are_ranges_of_layers(layers: int, stages: int) -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{number}.mlp.up_proj.weight" for number in range(layers)]
    catalog = Catalog((ShardFile("x.safetensors", 200, 0, tuple(map(tensor, names))),))
    placements = Placements.from_config(LLAMA | {"num_hidden_layers": layers})
    found = [
        [
            part.name
            for file in placements.slice(catalog, Ranks(pp_rank=rank, pp_size=stages)).files
            for part in file.tensors
        ]
        for rank in range(stages)
    ]
    assert sorted(name for stage in found for name in stage) == sorted(names)
    assert names[0] in found[0]
    assert {names[1], names[2]} <= set(found[-1])
    sizes = [sum("layers" in name for name in stage) for stage in found]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(OptionError, match="pipeline stages"):
        placements.slice(catalog, Ranks(pp_size=layers + 1))


def test_a_tensor_of_no_known_stage() -> None:
    catalog = Catalog(
        (ShardFile("x.safetensors", 200, 0, (tensor("model.layers.0.a"), tensor("model.layers.1.a"), tensor("odd"))),)
    )
    placements = Placements.from_rules({"*": Replicate()})
    assert placements.slice(catalog, Ranks()).tensors == 3
    with pytest.raises(OptionError, match="'odd': it is in no layer"):
        placements.slice(catalog, Ranks(pp_size=2))
