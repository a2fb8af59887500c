"""Llamas of a few thousand parameters, as the Hub would have them: a config and one ordinary safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["Llama"]

_HIDDEN = 64
_INTERMEDIATE = 128
_LAYERS = 2
_QUERY_HEADS = 4
_HEAD_SIZE = 32  # the smallest that vLLM's attention on the CPU has


@dataclass(frozen=True)
class Llama:
    """A random one.

    Attributes:
        kv_heads: How many heads its keys and values have.
        tied: Whether its head is its embedding.
        vocabulary: How many tokens it knows. A multiple of 128 is not padded where two ranks share it.
    """

    kv_heads: int = 2
    tied: bool = False
    vocabulary: int = 256

    def write(self, folder: Path, *, weights: bool = True) -> None:
        """Make a folder with its config and, unless they are not wanted, its weights: the same ones every time."""
        folder.mkdir()
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": _HIDDEN,
            "intermediate_size": _INTERMEDIATE,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": _QUERY_HEADS,
            "num_key_value_heads": self.kv_heads,
            "head_dim": _HEAD_SIZE,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config))
        if weights:
            save_file(self._weights(), folder / "model.safetensors", metadata={"format": "pt"})

    def _weights(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(5)

        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) / 4).to(torch.bfloat16)

        weights = {"model.embed_tokens.weight": random(self.vocabulary, _HIDDEN), "model.norm.weight": random(_HIDDEN)}
        if not self.tied:
            weights["lm_head.weight"] = random(self.vocabulary, _HIDDEN)
        for layer in range(_LAYERS):
            shapes = {
                "self_attn.q_proj": (_QUERY_HEADS * _HEAD_SIZE, _HIDDEN),
                "self_attn.k_proj": (self.kv_heads * _HEAD_SIZE, _HIDDEN),
                "self_attn.v_proj": (self.kv_heads * _HEAD_SIZE, _HIDDEN),
                "self_attn.o_proj": (_HIDDEN, _QUERY_HEADS * _HEAD_SIZE),
                "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
                "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
                "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
                "input_layernorm": (_HIDDEN,),
                "post_attention_layernorm": (_HIDDEN,),
            }
            weights |= {f"model.layers.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        return weights
