"""Models of a few thousand parameters, as the Hub would have them: a config and one ordinary safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["Fp8", "Gptq", "Int8", "Llama", "Mixtral", "Qwen2"]

_LAYERS = 2
_QUERY_HEADS = 4
_EXPERTS = 4
# As many rows of a matrix share a scale of GPTQ's, and so many of its numbers are in one of 32 bits.
_GROUP = 32
_PACKED = 8


@dataclass(frozen=True)
class Llama:
    """A random one.

    Attributes:
        kv_heads: How many heads its keys and values have.
        tied: Whether its head is its embedding.
        vocabulary: How many tokens it knows. A multiple of 128 is not padded where two ranks share it.
        hidden: How many numbers a token is between the layers.
        intermediate: How many it is within an MLP.
        head_size: How many each head has. 32 is the least that vLLM's attention on the CPU has.
    """

    kv_heads: int = 2
    tied: bool = False
    vocabulary: int = 256
    hidden: int = 64
    intermediate: int = 128
    head_size: int = 32

    def write(self, folder: Path, *, weights: bool = True) -> None:
        """Make a folder with its config and, unless they are not wanted, its weights: the same ones every time."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self._config()))
        if weights:
            save_file(self.weights(), folder / "model.safetensors", metadata={"format": "pt"})

    def weights(self, seed: int = 5) -> dict[str, torch.Tensor]:
        """Its tensors, in the order in which they lie in the file."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) / 4).to(torch.bfloat16)

        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        for layer in range(_LAYERS):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer().items()}
        return {name: random(*shape) for name, shape in shapes.items()}

    def _config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": _QUERY_HEADS,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "dtype": "bfloat16",
        }

    def _layer(self) -> dict[str, tuple[int, ...]]:
        return self._attention() | {
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
        }

    def _attention(self) -> dict[str, tuple[int, ...]]:
        return {
            "self_attn.q_proj.weight": (_QUERY_HEADS * self.head_size, self.hidden),
            "self_attn.k_proj.weight": (self.kv_heads * self.head_size, self.hidden),
            "self_attn.v_proj.weight": (self.kv_heads * self.head_size, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, _QUERY_HEADS * self.head_size),
        }


@dataclass(frozen=True)
class Qwen2(Llama):
    """With biases, and its head tied to its embedding."""

    tied: bool = True
    # This one's heads have their share of it.
    hidden: int = _QUERY_HEADS * 32

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}

    def _attention(self) -> dict[str, tuple[int, ...]]:
        weights = super()._attention()
        biases = {
            name.replace(".weight", ".bias"): shape[:1] for name, shape in weights.items() if "o_proj" not in name
        }
        return weights | biases


@dataclass(frozen=True)
class Mixtral(Llama):
    """With experts."""

    hidden: int = _QUERY_HEADS * 32

    def _config(self) -> dict[str, Any]:
        experts = {"num_local_experts": _EXPERTS, "num_experts_per_tok": 2}
        return super()._config() | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"} | experts

    def _layer(self) -> dict[str, tuple[int, ...]]:
        shapes = self._attention() | {
            "block_sparse_moe.gate.weight": (_EXPERTS, self.hidden),
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
        }
        for expert in range(_EXPERTS):
            for name, shape in {"w1": (self.intermediate, self.hidden), "w2": (self.hidden, self.intermediate)}.items():
                shapes[f"block_sparse_moe.experts.{expert}.{name}.weight"] = shape
            shapes[f"block_sparse_moe.experts.{expert}.w3.weight"] = (self.intermediate, self.hidden)
        return shapes


@dataclass(frozen=True)
class _Quantized(Llama):
    """With linear layers whose weights have fewer bits, and tensors beside them that say what these mean."""

    def weights(self, seed: int = 5) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = {}
        for name, tensor in super().weights(seed).items():
            layer, linear, _ = name.rpartition("_proj.weight")
            weights |= self._quantized(f"{layer}_proj", tensor) if linear else {name: tensor}
        return weights

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"quantization_config": self._quantization()}

    def _quantization(self) -> dict[str, Any]:
        raise NotImplementedError

    def _quantized(self, layer: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def _compressed(kind: str, strategy: str, inputs: str) -> dict[str, Any]:
    """What compressed-tensors writes into a config."""
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": strategy, "dynamic": False},
        "input_activations": common | {"strategy": inputs, "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Int8(_Quantized):
    """By compressed-tensors: eight bits, and a scale for each row."""

    def _quantization(self) -> dict[str, Any]:
        return _compressed("int", "channel", "token")

    def _quantized(self, layer: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
        return {f"{layer}.weight": (weight / scale).round().to(torch.int8), f"{layer}.weight_scale": scale}


@dataclass(frozen=True)
class Fp8(_Quantized):
    """By compressed-tensors: eight bits with an exponent, and a scale for each matrix, of which vLLM joins three."""

    def _quantization(self) -> dict[str, Any]:
        return _compressed("float", "tensor", "tensor")

    def _quantized(self, layer: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.float().abs().amax().reshape(1) / 448
        return {f"{layer}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{layer}.weight_scale": scale}


@dataclass(frozen=True)
class Gptq(_Quantized):
    """By GPTQ: four bits, eight numbers of a column in one of 32 bits, and a scale for each group of rows."""

    def _quantization(self) -> dict[str, Any]:
        return {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "sym": True, "desc_act": False}

    def _quantized(self, layer: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.float().t().reshape(weight.shape[1] // _GROUP, _GROUP, weight.shape[0])
        scales = groups.abs().amax(dim=1) / 7
        numbers = ((groups / scales[:, None]).round() + 8).to(torch.int64).reshape(weight.shape[1], weight.shape[0])
        return {
            f"{layer}.qweight": _packed(numbers.t()).t().contiguous(),
            f"{layer}.qzeros": _packed(torch.full_like(scales, 7, dtype=torch.int64)),
            f"{layer}.scales": scales.to(weight.dtype),
            f"{layer}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // _GROUP,
        }


def _packed(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers of four bits, eight of a row in each of the result's."""
    shifts = torch.arange(_PACKED) * 4
    parts = numbers.reshape(numbers.shape[0], -1, _PACKED) << shifts
    # As one of 32 bits with a sign.
    return parts.sum(dim=-1).to(torch.int32)
