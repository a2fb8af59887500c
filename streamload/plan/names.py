"""What the names of a decoder's tensors say: which layer, which module."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["LayerName", "layer_name", "local_name", "wildcards"]

# What stands in front of the decoder's own names: of the class with a head, and of models with an eye or an ear.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "transformer.")

_LAYER = re.compile(r"layers\.(?P<number>[0-9]+)\.(?P<rest>.+)", re.DOTALL)


class LayerName(NamedTuple):
    """A tensor's name within its layer.

    Attributes:
        layer: The layer's number; None for a tensor outside the layers.
        rest: The name without the model's prefix and the layer: ``mlp.up_proj.weight``, ``embed_tokens.weight``.
    """

    layer: int | None
    rest: str


def local_name(name: str) -> str:
    """A tensor's name without what stands in front of the decoder's own names."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def layer_name(name: str) -> LayerName:
    """Take a tensor's name apart."""
    local = local_name(name)
    found = _LAYER.fullmatch(local)
    return LayerName(None, local) if found is None else LayerName(int(found["number"]), found["rest"])


def wildcards(name: str) -> str:
    """The name with ``*`` in place of each part that is a number."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
