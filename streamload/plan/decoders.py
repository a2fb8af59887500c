"""Placements of decoder families that are known, from their config.json.

What the names below do not cover, and what is quantized, is an error naming the tensor: a tensor that is shared out by
a guess would make a model that is wrong and says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from streamload.checkpoint import TensorInfo
from streamload.errors import OptionError
from streamload.plan.names import layer_name
from streamload.plan.placement import Experts, PackedShard, Placement, Ranks, Replicate, Shard
from streamload.plan.placements import Placements, one_expert
from streamload.plan.slices import Uneven

__all__ = ["FAMILIES", "DecoderPlacements"]

FAMILIES = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi", "phi3"),
        *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"),
    }
)
"""Each ``model_type`` that is known."""

# Of others, elements are packed or scaled in a way that nobody here knows.
_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})

_NORMS = (
    r"input_layernorm|post_attention_layernorm|pre_feedforward_layernorm|post_feedforward_layernorm"
    r"|self_attn\.(q_norm|k_norm|q_layernorm|k_layernorm|q_a_layernorm|kv_a_layernorm)"
)
_ROUTERS = r"(block_sparse_moe|mlp)\.gate|mlp\.shared_expert_gate"
_MLP = r"mlp|mlp\.shared_experts?"
_LEAF = r"\.(?P<leaf>weight|bias)"


class DecoderPlacements(Placements):
    """Placements of a known family; see `Placements.from_config`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        found: Any = config.get("text_config", config)
        if not isinstance(found, Mapping):
            raise OptionError("config.json: text_config is no object")
        self._config: Mapping[str, Any] = found
        family = config.get("model_type")
        if family not in FAMILIES:
            raise OptionError(
                f"config.json: how a model of type {family!r} is shared out is not known, only "
                f"{', '.join(sorted(FAMILIES))}; give placements as rules or as a tp_plan"
            )
        self._layers = self._number("num_hidden_layers")
        self._heads = self._number("num_attention_heads")
        self._rules: list[tuple[re.Pattern[str], Callable[[re.Match[str], TensorInfo, Ranks, Uneven], Placement]]] = [
            (re.compile(pattern, re.DOTALL), rule)
            for pattern, rule in (
                (rf"({_NORMS}|{_ROUTERS}){_LEAF}", _replicated),
                (r"self_attn\.rotary_emb\.inv_freq|mlp\.gate\.e_score_correction_bias", _replicated),
                (rf"self_attn\.(q_a_proj|kv_a_proj_with_mqa){_LEAF}", _replicated),
                (rf"self_attn\.(q_proj|q_b_proj|kv_b_proj){_LEAF}", self._query),
                (rf"self_attn\.(k_proj|v_proj){_LEAF}", self._key_value),
                (rf"self_attn\.qkv_proj{_LEAF}", self._fused_attention),
                (rf"self_attn\.(o_proj|dense){_LEAF}", self._attention_rows),
                (rf"({_MLP})\.(gate_proj|up_proj|fc1){_LEAF}", _columns),
                (rf"({_MLP})\.gate_up_proj{_LEAF}", _packed_columns),
                (rf"({_MLP})\.(down_proj|fc2){_LEAF}", _rows),
                (r"mlp\.experts\.gate_up_proj", _fused_experts(PackedShard(-2, 2))),
                (r"mlp\.experts\.down_proj", _fused_experts(Shard(-1))),
                (
                    rf"(block_sparse_moe|mlp)\.experts\.(?P<number>[0-9]+)\.(w1|w3|gate_proj|up_proj){_LEAF}",
                    self._expert(_columns),
                ),
                (
                    rf"(block_sparse_moe|mlp)\.experts\.(?P<number>[0-9]+)\.(w2|down_proj){_LEAF}",
                    self._expert(_rows),
                ),
            )
        ]
        self._outside = re.compile(r"(?:(?P<shared>embed_tokens|lm_head)|norm|final_layernorm)\.(?:weight|bias)")

    @property
    def layers(self) -> int:
        return self._layers

    def of(self, tensor: TensorInfo, ranks: Ranks, uneven: Uneven = "error") -> Placement:
        layer, rest = layer_name(tensor.name)
        if layer is None:
            found = self._outside.fullmatch(rest)
            if found is not None:
                self._check_dtype(tensor)
                return Shard(0) if found["shared"] else Replicate()
        elif layer < self._layers:
            for pattern, rule in self._rules:
                match = pattern.fullmatch(rest)
                if match is not None:
                    self._check_dtype(tensor)
                    return rule(match, tensor, ranks, uneven)
        family = self._config.get("model_type")
        beyond = "" if layer is None or layer < self._layers else f" of {self._layers} layers"
        raise OptionError(
            f"tensor {tensor.name!r}: placements='auto' does not know how this tensor of a {family}{beyond} is shared "
            "out; leave it out with exclude, or give placements as rules or as a tp_plan"
        )

    def _number(self, name: str, default: int | None = None) -> int:
        value = self._config.get(name, default)
        if value is None:
            value = default
        if type(value) is not int or value < 1:
            raise OptionError(f"config.json: {name} is {value!r}, not a whole number of at least 1")
        return value

    def _check_dtype(self, tensor: TensorInfo) -> None:
        if tensor.dtype not in _DTYPES:
            raise OptionError(
                f"tensor {tensor.name!r} is {tensor.dtype}: placements='auto' does not know how quantized tensors are "
                "shared out"
            )

    def _replicas(self, tensor: TensorInfo, heads: int, ranks: Ranks, uneven: Uneven) -> int:
        """How many ranks have the same heads."""
        if heads % ranks.tp_size == 0 or uneven == "ceil":
            return 1
        raise OptionError(
            f"tensor {tensor.name!r}: {heads} attention heads cannot be shared out equally to {ranks.tp_size} ranks"
        )

    def _key_value_replicas(self, tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> int:
        heads = self._number("num_key_value_heads", self._heads)
        if heads < ranks.tp_size and ranks.tp_size % heads == 0:
            return ranks.tp_size // heads
        return self._replicas(tensor, heads, ranks, uneven)

    def _query(self, match: re.Match[str], tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> Placement:
        return Shard(0, self._replicas(tensor, self._heads, ranks, uneven))

    def _key_value(self, match: re.Match[str], tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> Placement:
        return Shard(0, self._key_value_replicas(tensor, ranks, uneven))

    def _fused_attention(self, match: re.Match[str], tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> Placement:
        head = self._number("head_dim", max(1, self._number("hidden_size") // self._heads))
        keys = self._number("num_key_value_heads", self._heads) * head
        queries = self._replicas(tensor, self._heads, ranks, uneven)
        replicas = self._key_value_replicas(tensor, ranks, uneven)
        return PackedShard(0, (self._heads * head, keys, keys), (queries, replicas, replicas))

    def _attention_rows(self, match: re.Match[str], tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> Placement:
        if match["leaf"] == "bias":
            return Replicate()
        return Shard(1, self._replicas(tensor, self._heads, ranks, uneven))

    def _expert(
        self, within: Callable[[re.Match[str], TensorInfo, Ranks, Uneven], Placement]
    ) -> Callable[[re.Match[str], TensorInfo, Ranks, Uneven], Placement]:
        def rule(match: re.Match[str], tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> Placement:
            if ranks.ep_size == 1:
                return within(match, tensor, ranks, uneven)
            return one_expert(tensor.name, int(match["number"]), self._experts(), ranks)

        return rule

    def _experts(self) -> int:
        for name in ("num_local_experts", "num_experts", "n_routed_experts"):
            if self._config.get(name) is not None:
                return self._number(name)
        raise OptionError("config.json does not say how many experts there are")


def _replicated(match: re.Match[str], tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> Placement:
    return Replicate()


def _columns(match: re.Match[str], tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> Placement:
    return Shard(0)


def _packed_columns(match: re.Match[str], tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> Placement:
    return PackedShard(0, 2)


def _rows(match: re.Match[str], tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> Placement:
    return Replicate() if match["leaf"] == "bias" else Shard(1)


def _fused_experts(
    within: Shard | PackedShard,
) -> Callable[[re.Match[str], TensorInfo, Ranks, Uneven], Placement]:
    """Experts in one tensor: whole ones where they are shared out, else a share of each."""

    def rule(match: re.Match[str], tensor: TensorInfo, ranks: Ranks, uneven: Uneven) -> Placement:
        return Experts() if ranks.ep_size > 1 else within

    return rule
