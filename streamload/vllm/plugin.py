"""Makes the load format known to vLLM."""

from __future__ import annotations

import logging

from streamload.errors import OptionError
from streamload.options import from_environment, parse_globs
from streamload.vllm.config import Mode

__all__ = ["LOAD_FORMAT", "REPLACEABLE", "register"]

LOAD_FORMAT = "streamload"

#: Load formats of vLLM's that this one can be put in the place of, and the mode that serves each of them.
REPLACEABLE: dict[str, Mode] = {"runai_streamer": "whole", "runai_streamer_sharded": "sharded"}

_registered: set[str] = set()


def register() -> None:
    """Register the load format; called again, it changes nothing.

    A vLLM that knows no foreign load formats is told of in one warning, and goes on without this one: whoever installed
    the plugin may be using another.

    Raises:
        OptionError: ``STREAMLOAD_VLLM_REPLACES`` names what cannot be replaced.
    """
    formats = {LOAD_FORMAT, *_replaced()} - _registered
    if not formats:
        return
    try:
        from vllm.model_executor.model_loader import register_model_loader

        from streamload.vllm.loader import loader_class
    except ImportError as error:
        logging.getLogger("vllm.streamload").warning(
            "this vLLM takes no load formats from plugins, so there is no --load-format %s: %s", LOAD_FORMAT, error
        )
        return
    made = loader_class()
    for name in sorted(formats):
        register_model_loader(name)(made)
        _registered.add(name)


def _replaced() -> list[str]:
    names: list[str] = list(from_environment({"replaces": parse_globs}, prefix="VLLM_").get("replaces", ()))
    for name in names:
        if name not in REPLACEABLE:
            raise OptionError(f"STREAMLOAD_VLLM_REPLACES={name!r} is none of {', '.join(REPLACEABLE)}")
    return names
