"""A model whose loading code is like that of an inference engine: given whole tensors, it takes this rank's parts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

__all__ = ["Decoder", "checkpoint", "poisoned"]

_HIDDEN = 512
_INTERMEDIATE = 1024
_HEAD = 128
_HEADS, _KV_HEADS = 4, 2
_VOCABULARY, _PADDED = 1000, 1024
_EXPERTS = 3


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Memory that nothing was loaded into."""
    return nn.Parameter(torch.full(shape, -77, dtype=dtype), requires_grad=False)


@cache
def checkpoint() -> dict[str, torch.Tensor]:
    """A whole one, the same for all."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "embed.weight": random(_VOCABULARY, _HIDDEN),
        "head.weight": random(_VOCABULARY, _HIDDEN),
        "column.weight": random(_INTERMEDIATE, _HIDDEN),
        "column.bias": random(_INTERMEDIATE),
        "row.weight": random(_HIDDEN, _INTERMEDIATE),
        "row.bias": random(_HIDDEN),
        "q.weight": random(_HEADS * _HEAD, _HIDDEN),
        "k.weight": random(_KV_HEADS * _HEAD, _HIDDEN),
        "v.weight": random(_KV_HEADS * _HEAD, _HIDDEN),
        "gate.weight": random(_INTERMEDIATE, _HIDDEN),
        "up.weight": random(_INTERMEDIATE, _HIDDEN),
        "gate_up.weight": random(2 * _INTERMEDIATE, _HIDDEN),
        "transposed.weight": random(_HIDDEN, _INTERMEDIATE),
        "converted.weight": random(_INTERMEDIATE, _HIDDEN),
        "scale": random(1)[0],
        "unused": random(_HIDDEN),
        **{
            f"experts.{number}.{part}": random(*shape)
            for number in range(_EXPERTS)
            for part, shape in (
                ("w1", (_INTERMEDIATE, _HIDDEN)),
                ("w2", (_HIDDEN, _INTERMEDIATE)),
                ("w3", (_INTERMEDIATE, _HIDDEN)),
            )
        },
    }


class Decoder(nn.Module):
    """One rank's part of it.

    Args:
        rank: Which one.
        world: Of how many: 1, 2 or 4.
    """

    doubled: torch.Tensor

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        share = _INTERMEDIATE // world
        self.kv_heads = max(1, _KV_HEADS // world)
        self.replicas = max(1, world // _KV_HEADS)
        self.embed = poisoned(_PADDED // world, _HIDDEN)
        self.head = self.embed
        self.column, self.column_bias = poisoned(share, _HIDDEN), poisoned(share)
        self.row, self.row_bias = poisoned(_HIDDEN, share), poisoned(_HIDDEN)
        self.qkv = poisoned((_HEADS // world + 2 * self.kv_heads) * _HEAD, _HIDDEN)
        self.gate_up, self.fused = poisoned(2 * share, _HIDDEN), poisoned(2 * share, _HIDDEN)
        self.transposed = poisoned(share, _HIDDEN)
        self.converted = poisoned(share, _HIDDEN, dtype=torch.bfloat16)
        self.scale = poisoned(1)
        self.w13, self.w2 = poisoned(_EXPERTS, 2 * share, _HIDDEN), poisoned(_EXPERTS, _HIDDEN, share)
        self.register_buffer("doubled", torch.zeros(share, _HIDDEN), persistent=False)
        self.seen: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take this rank's parts."""
        loaded = set()
        for name, tensor in weights:
            self.seen.append(name)
            if name.startswith("experts."):
                _, number, part = name.split(".")
                self._expert(int(number), part, tensor)
            elif name != "unused":
                getattr(self, f"_load_{name.replace('.', '_')}")(tensor)
            loaded.add(name)
        return loaded

    def _part(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        size = tensor.shape[dim] // self.world
        return tensor.narrow(dim, self.rank * size, size)

    def _load_embed_weight(self, tensor: torch.Tensor) -> None:
        size = _PADDED // self.world
        part = tensor[self.rank * size : min((self.rank + 1) * size, _VOCABULARY)]
        self.embed[: len(part)].data.copy_(part)
        self.embed[len(part) :].data.fill_(0)

    def _load_head_weight(self, tensor: torch.Tensor) -> None:
        self._load_embed_weight(tensor)  # tied: the second tensor takes the first one's place

    def _load_column_weight(self, tensor: torch.Tensor) -> None:
        self.column.data.copy_(self._part(tensor, 0))
        self.doubled.copy_(self._part(tensor, 0))

    def _load_column_bias(self, tensor: torch.Tensor) -> None:
        self.column_bias.data[:] = self._part(tensor, 0)

    def _load_row_weight(self, tensor: torch.Tensor) -> None:
        self.row.data.copy_(tensor.chunk(self.world, dim=1)[self.rank])

    def _load_row_bias(self, tensor: torch.Tensor) -> None:
        self.row_bias.data.copy_(tensor if self.rank == 0 else tensor.clone())

    def _load_q_weight(self, tensor: torch.Tensor) -> None:
        size = _HEADS // self.world * _HEAD
        self.qkv.data.narrow(0, 0, size).copy_(self._part(tensor, 0))

    def _head(self, tensor: torch.Tensor, place: int) -> None:
        size = self.kv_heads * _HEAD
        start = _HEADS // self.world * _HEAD + place * size
        self.qkv.data.narrow(0, start, size).copy_(tensor.narrow(0, self.rank // self.replicas * size, size))

    def _load_k_weight(self, tensor: torch.Tensor) -> None:
        self._head(tensor, 0)

    def _load_v_weight(self, tensor: torch.Tensor) -> None:
        self._head(tensor, 1)

    def _load_gate_weight(self, tensor: torch.Tensor) -> None:
        self.gate_up.data.chunk(2)[0].copy_(self._part(tensor, 0))

    def _load_up_weight(self, tensor: torch.Tensor) -> None:
        self.gate_up.data.chunk(2)[1].copy_(self._part(tensor.to("cpu"), 0))

    def _load_gate_up_weight(self, tensor: torch.Tensor) -> None:
        whole = tensor.view(2, self.world, _INTERMEDIATE // self.world, _HIDDEN)
        self.fused.data.view(2, -1, _HIDDEN).copy_(whole[:, self.rank])

    def _load_transposed_weight(self, tensor: torch.Tensor) -> None:
        self.transposed.data.copy_(self._part(tensor.t().contiguous(), 0))

    def _load_converted_weight(self, tensor: torch.Tensor) -> None:
        self.converted.data.copy_(self._part(tensor.to(torch.float16), 0))

    def _load_scale(self, tensor: torch.Tensor) -> None:
        self.scale.data.copy_(tensor.view(1))

    def _expert(self, number: int, part: str, tensor: torch.Tensor) -> None:
        if part == "w2":
            self.w2.data[number].copy_(self._part(tensor, 1))
        else:
            self.w13.data[number].chunk(2)[part == "w3"].copy_(self._part(tensor, 0))
