"""vLLM's ``--load-format streamload``: `register` is what vLLM calls, by the entry point, in each of its processes.

Nothing of vLLM is imported before that.
"""

from __future__ import annotations

from streamload.vllm.plugin import register

__all__ = ["register"]
