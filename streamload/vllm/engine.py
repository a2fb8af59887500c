"""What is asked of vLLM about the rank that loads; each part that only some versions have may be missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import streamload
from streamload.events import Progress

if TYPE_CHECKING:
    import torch

__all__ = ["Bar", "expert_filter", "is_draft", "is_first_rank", "node_ranks", "ranks", "untied_embedding"]

# As vLLM draws its bars: a line each time, since the output of several processes is mixed.
_BAR_FORMAT = "{desc}: {percentage:3.0f}% completed | {n_fmt}B/{total_fmt}B [{elapsed}<{remaining}, {rate_fmt}]\n"
_BAR_INTERVAL_S = 2.0


def ranks() -> streamload.Ranks:
    """Which rank this process is, of how many, in each way in which vLLM divides a model's layers."""
    from vllm.distributed import get_pp_group, get_tp_group

    tp, pp = get_tp_group(), get_pp_group()
    return streamload.Ranks(tp.rank_in_group, tp.world_size, pp.rank_in_group, pp.world_size)


def node_ranks() -> int:
    """How many ranks load on this node at the same time, as far as vLLM tells."""
    config = _current_config()
    if config is None:
        return 1
    parallel = config.parallel_config
    ranks = getattr(parallel, "local_world_size", parallel.world_size)
    return max(1, int(ranks) * int(getattr(parallel, "data_parallel_size_local", 1)))


def is_first_rank() -> bool:
    """Whether this rank is the one that shows progress."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def is_draft(model_config: Any) -> bool:
    """Whether the model is one that guesses tokens for another, which has the same load options."""
    return getattr(model_config, "runner_type", None) == "draft"


def expert_filter(model_config: Any) -> Callable[[str], bool] | None:
    """Which tensors are of experts that other ranks have; None where this rank wants all.

    It is vLLM's own rule, where the user has switched it on.
    """
    config = _current_config()
    if config is None or not getattr(model_config, "is_moe", False):
        return None
    parallel = config.parallel_config
    wanted = parallel.enable_expert_parallel and getattr(parallel, "enable_ep_weight_filter", False)
    # Where experts are replicated, a rank may hold copies of others' experts.
    if not wanted or parallel.enable_eplb:
        return None
    from vllm.distributed.parallel_state import get_ep_group
    from vllm.model_executor.model_loader.ep_weight_filter import compute_local_expert_ids, should_skip_weight

    group = get_ep_group()
    experts = compute_local_expert_ids(
        model_config.get_num_experts(),
        group.world_size,
        group.rank_in_group,
        placement=parallel.expert_placement_strategy,
    )
    return None if experts is None else lambda name: bool(should_skip_weight(name, experts))


def untied_embedding(model: torch.nn.Module, model_config: Any) -> tuple[str, str] | None:
    """The parameters of a model's embedding and of its head, where vLLM has parted the two; None elsewhere.

    It does that where a head lies in the checkpoint although the config says that they are one; and ties them again
    when they turn out to be equal. But in a pre-sharded checkpoint the one is there under the head's name only.
    """
    if not getattr(model_config, "word_embeddings_untied_by_checkpoint", False):
        return None
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [f"{name}.weight" for name, module in found if isinstance(module, ParallelLMHead)]
    embeddings = [f"{name}.weight" for name, module in found if not isinstance(module, ParallelLMHead)]
    return (embeddings[0], heads[0]) if len(heads) == len(embeddings) == 1 else None


class Bar:
    """A progress bar like those of vLLM's own loaders; a callable for the option ``progress``."""

    def __init__(self, title: str) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(desc=title, unit="B", unit_scale=True, bar_format=_BAR_FORMAT, mininterval=_BAR_INTERVAL_S)

    def __call__(self, progress: Progress) -> None:
        """Show how far a load is."""
        self._bar.total = progress.total_bytes or None
        self._bar.update(progress.read_bytes - self._bar.n)

    def close(self) -> None:
        """Draw it for the last time."""
        self._bar.close()


def _current_config() -> Any:
    """What vLLM is configured with, where it is about to load; None elsewhere."""
    try:
        from vllm.config import get_current_vllm_config_or_none
    except ImportError:
        from vllm.config import get_current_vllm_config

        return get_current_vllm_config()
    return get_current_vllm_config_or_none()
