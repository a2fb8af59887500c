"""Whether a model has got all of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamload.checkpoint.text import brief
from streamload.errors import MismatchError

if TYPE_CHECKING:
    import torch

__all__ = ["check_loaded"]


def check_loaded(model: torch.nn.Module, loaded: set[str], *, uri: str, quantized: bool, draft: bool) -> None:
    """Refuse a model of which parameters were left as they were.

    vLLM's own check passes over all parameters of layers whose weights are processed after loading, which is every
    linear layer of a model that is not quantized, too: such a layer would compute with whatever lay in its memory.
    Here, layers that are not quantized are looked at.

    Args:
        model: Loaded.
        loaded: What its ``load_weights`` returned.
        uri: Where it was loaded from.
        quantized: Whether the model is.
        draft: Whether it guesses tokens for another model: it may be given that one's embedding later.

    Raises:
        MismatchError: A parameter was not loaded.
    """
    excused: set[str] = set()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        processed = getattr(method, "uses_meta_device", False) or hasattr(method, "process_weights_after_loading")
        plain = type(method).__name__.startswith("Unquantized")
        if processed and (quantized or draft or not plain):
            prefix = f"{name}." if name else ""
            excused.update(prefix + parameter for parameter, _ in module.named_parameters())
    missing = sorted(name for name, _ in model.named_parameters() if name not in loaded and name not in excused)
    if missing:
        raise MismatchError(
            f"the checkpoint has nothing for {len(missing)} of the model's parameters: {brief(missing)}; if they are "
            "made otherwise, say enable_weights_track=false",
            missing=missing,
            uri=uri,
        )
