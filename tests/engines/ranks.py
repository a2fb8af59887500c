"""One rank's part of a vLLM model, built, loaded and saved by vLLM's own classes without an engine around it.

An engine repacks the weights for its kernels once they are loaded, and on a CPU drops what they were: what it would
save then is not what its loader wants. So models are looked at, saved and loaded before that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import destroy_model_parallel, init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mixtral import MixtralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.utils.torch_utils import set_default_torch_dtype

__all__ = ["Rank"]

# The class, not its name: with a name, vLLM starts a process to find out what the class can do.
for _model in (LlamaForCausalLM, MixtralForCausalLM, Qwen2ForCausalLM):
    ModelRegistry.register_model(_model.__name__, _model)


@dataclass(frozen=True)
class Rank:
    """This process among those of a model.

    Attributes:
        tp_size: How many ranks share each layer.
        pp_size: How many pipeline stages there are.
    """

    tp_size: int
    pp_size: int

    @property
    def numbers(self) -> dict[str, Any]:
        """Which rank of how many, as streamload takes it."""
        return {"rank": dist.get_rank(), "world_size": self.tp_size * self.pp_size, "pp_size": self.pp_size}

    def join(self, folder: Path | str) -> None:
        """Have vLLM group the ranks.

        Args:
            folder: A model's; it does not matter which.
        """
        # Each rank another, and anew, since engines change it: ranks that find no common shared memory go by gloo, and
        # sleep while they wait instead of spinning. Its name would not be this run's alone, either.
        os.environ["VLLM_DIST_IDENT"] = os.environ["RANK"]
        with set_current_vllm_config(self._config(folder)):
            destroy_model_parallel()
            init_distributed_environment(backend="gloo")
            initialize_model_parallel(self.tp_size, self.pp_size, backend="gloo")

    def empty(self, folder: Path | str, load_format: str = "auto", **extra: Any) -> torch.nn.Module:
        """A model of the shape that a folder's config says, filled with a number that no checkpoint has.

        The load format plays a part: vLLM looks into a checkpoint to see whether a head is tied, but into some not.
        """
        config = self._config(folder, load_format, **extra)
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            model: torch.nn.Module = initialize_model(vllm_config=config)
        for tensor in model.state_dict().values():
            tensor.fill_(-77)
        return model

    def loaded(self, folder: Path | str, load_format: str = "auto", **extra: Any) -> torch.nn.Module:
        """A model, with the folder's weights in it: by the loader that vLLM has for the format."""
        model = self.empty(folder, load_format, **extra)
        with self.loading(folder, load_format, **extra) as (loader, config):
            loader.load_weights(model, config)
        return model

    @contextmanager
    def loading(self, folder: Path | str, load_format: str, **extra: Any) -> Iterator[tuple[Any, Any]]:
        """A loader of vLLM's, and the model's config that it wants to see; vLLM is configured meanwhile."""
        config = self._config(folder, load_format, **extra)
        with set_current_vllm_config(config):
            yield get_model_loader(config.load_config), config.model_config

    def arguments(
        self, folder: Path | str, load_format: str = "auto", *, engine: dict[str, Any] | None = None, **extra: Any
    ) -> dict[str, Any]:
        """What vLLM is told of a model and of the ranks that have it.

        Args:
            folder: The model's, or a URI.
            load_format: How it is loaded.
            engine: What the engine is told beside that.
            **extra: What the loader is told.
        """
        return {
            "model": str(folder),
            "load_format": load_format,
            "model_loader_extra_config": {name: value for name, value in extra.items() if value is not None},
            "tensor_parallel_size": self.tp_size,
            "pipeline_parallel_size": self.pp_size,
            # The ranks are there already: they are torchrun's processes.
            "distributed_executor_backend": "external_launcher",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            **(engine or {}),
        }

    def _config(self, folder: Path | str, load_format: str = "auto", **extra: Any) -> VllmConfig:
        return EngineArgs(**self.arguments(folder, load_format, **extra)).create_engine_config()
