"""A sample checkpoint: Llama's names, shapes and files, with deterministic random bytes for weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["INDEX_FILE", "LlamaShape", "write_checkpoint"]

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes that decide a Llama's tensors; the defaults come to 512 MiB of bfloat16.

    Attributes:
        hidden: The model's width.
        intermediate: The width inside a layer's MLP.
        heads: Attention heads.
        kv_heads: Heads of the keys and values, which groups of attention heads share.
        layers: How many decoder layers.
        vocabulary: How many tokens the embedding knows.
    """

    hidden: int = 1024
    intermediate: int = 2816
    heads: int = 16
    kv_heads: int = 4
    layers: int = 18
    vocabulary: int = 32_000

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, in the order in which transformers writes them."""
        kv = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        """What the model's ``config.json`` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def write_checkpoint(folder: Path, shape: LlamaShape, *, file_bytes: int = 128 << 20, seed: int = 0) -> int:
    """Write the shard files, their index and ``config.json`` into `folder`.

    The weights are random bits rather than random numbers: with every bit pattern among them, NaNs too, only a
    loader that leaves all bits alone passes a comparison.

    Args:
        folder: Where to write; it exists and is empty.
        shape: Which tensors.
        file_bytes: Start a new shard file before one grows beyond this, as transformers does; a tensor that is larger
            has a file to itself.
        seed: The same seed gives the same bytes.

    Returns:
        The tensors' size together, in bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = _split_into_files(shape, file_bytes)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: _random_bits(dimensions, generator) for name, dimensions in group}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    _write_json(folder / "config.json", shape.config())
    return total_bytes


def _split_into_files(shape: LlamaShape, file_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    groups: list[list[tuple[str, tuple[int, ...]]]] = []
    room = 0
    for name, dimensions in shape.tensors():
        nbytes = torch.Size(dimensions).numel() * torch.bfloat16.itemsize
        if not groups or nbytes > room:
            groups.append([])
            room = file_bytes
        groups[-1].append((name, dimensions))
        room -= nbytes
    return groups


def _random_bits(dimensions: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    bits = torch.randint(-(1 << 15), 1 << 15, dimensions, dtype=torch.int16, generator=generator)
    return bits.view(torch.bfloat16)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
