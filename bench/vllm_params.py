"""vLLM's loaders side by side: from the call of the loader to its return, into the parameters of a real vLLM's model.

::

    python -m bench.vllm_params [--size 2GB] [--rounds 5] [--vllm build/vllm/bin/python] [--json FILE]

streamload's load format in each of its modes and Run:ai's read from the fast S3 server of bench/; vLLM's own loader
reads the same files from the page cache. One process for each load, of vLLM's environment (``make vllm-test`` makes
it); the ways take turns. The model is made, and every page of it touched, before the clock starts; and so is what the
loaders import. In round 0, which is not counted, the parameters are summed up: all ways must come to the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import streamload
from bench import origin
from bench.datasets import Dataset, make
from bench.loaders.streamload_ import Streamload
from bench.scenarios import GB, MEMORY_BYTES
from streamload.units import format_bytes, parse_bytes
from streamload.vllm.config import MODES

__all__ = ["main"]

_HEAD_SIZE = 128
# As in the other scenarios: its default of 40 GB is slower where memory is fresh.
_RUNAI = {
    "RUNAI_STREAMER_MEMORY_LIMIT": str(MEMORY_BYTES),
    "RUNAI_STREAMER_CONCURRENCY": "8",
    "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
}
_VLLM = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "streamload",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_ANSWER = "measured: "


def main() -> None:
    """Measure, and show the medians and their ratios."""
    parser = argparse.ArgumentParser(prog="python -m bench.vllm_params", description="vLLM's loaders side by side")
    parser.add_argument("--size", type=parse_bytes, default=2 * GB)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vllm", type=Path, default=Path("build/vllm/bin/python"), help="vLLM's interpreter")
    parser.add_argument("--data", type=Path, default=Path("build/bench/data"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load is not None:
        print(_ANSWER + json.dumps(_load(json.loads(given.load))))
        return
    dataset = make("llama", given.size, given.data)
    with tempfile.TemporaryDirectory() as folder, origin.serve(dataset.folder, variant="http") as server:
        _write_config(dataset, Path(folder))
        seconds = _measure(_ways(dataset, Path(folder), server.bucket), given, server)
    _show(dataset, seconds)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"seconds": seconds, "tensor_bytes": dataset.tensor_bytes}, indent=2) + "\n")


def _ways(dataset: Dataset, config: Path, bucket: str) -> dict[str, dict[str, Any]]:
    """What vLLM is told, for each way."""
    uri = f"s3://{bucket}"
    ways: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        if mode != "sharded":
            extra = {"uri": uri, "mode": mode, "memory_bytes": MEMORY_BYTES}
            ways[f"streamload, {mode}"] = {
                "model": str(config),
                "load_format": "streamload",
                "model_loader_extra_config": extra,
            }
    ways["runai_streamer"] = {"model": str(config), "model_weights": uri, "load_format": "runai_streamer"}
    # Into a folder of its own, with the config beside the files.
    for path in dataset.bucket.glob("*.safetensors"):
        (config.parent / config.name / path.name).symlink_to(path.resolve())
    ways["default, local"] = {"model": str(config), "load_format": "safetensors"}
    return ways


def _measure(
    ways: dict[str, dict[str, Any]], given: argparse.Namespace, server: origin.Origin
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    environment = {**os.environ, **_VLLM, **_RUNAI, **server.environ}
    for number in range(given.rounds + 1):
        sums: dict[str, int] = {}
        # In another order each time: what one leaves in the machine's memory meets another one.
        names = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in names:
            request = json.dumps({"arguments": ways[name], "check": number == 0})
            command = [*server.command_prefix, str(given.vllm.absolute()), "-m", "bench.vllm_params", "--load", request]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(
                next(line for line in done.stdout.splitlines() if line.startswith(_ANSWER))[len(_ANSWER) :]
            )
            print(f"round {number}: {name:24} {found['seconds']:.3f} s", file=sys.stderr, flush=True)
            if number == 0:
                sums[name] = found["sum"]
            else:
                seconds[name].append(found["seconds"])
        if len(set(sums.values())) > 1:
            raise SystemExit(f"the parameters differ: {sums}")
    return seconds


def _load(request: dict[str, Any]) -> dict[str, Any]:
    """In vLLM's environment: make the model, load it, and say how long that took."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    Streamload().imports()
    for name in ("streamload.sources.s3", "streamload.sources.s3_client", "aiobotocore.session", "aiobotocore.client"):
        import_module(name)
    for name in ("runai_model_streamer", "runai_model_streamer_s3.files.files"):
        import_module(name)
    arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64, "use_tqdm_on_load": False}
    config = EngineArgs(**arguments, **request["arguments"]).create_engine_config()
    with tempfile.NamedTemporaryFile() as meeting, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
        initialize_model_parallel(1, 1, backend="gloo")
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(vllm_config=config)
        for parameter in model.parameters():
            parameter.data.fill_(1)
        loader = get_model_loader(config.load_config)
        began = time.perf_counter()
        loader.load_weights(model, config.model_config)
        seconds = time.perf_counter() - began
    summed = 0
    if request["check"]:
        from bench.datasets import checksum

        for _, tensor in sorted(model.state_dict().items()):
            summed = checksum(tensor.contiguous().view(-1).view(torch.uint8).numpy(), summed)
    return {"seconds": seconds, "sum": summed}


def _write_config(dataset: Dataset, folder: Path) -> None:
    """The config.json of the Llama whose shapes the data set has, for vLLM."""
    found = streamload.inspect(dataset.bucket)
    shapes = {tensor.name: tensor.shape for file in found.plan.catalog.files for tensor in file.tensors}
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("o_proj.weight") for name in shapes),
        "num_attention_heads": shapes["model.layers.0.self_attn.q_proj.weight"][0] // _HEAD_SIZE,
        "num_key_value_heads": shapes["model.layers.0.self_attn.k_proj.weight"][0] // _HEAD_SIZE,
        "head_dim": _HEAD_SIZE,
        "vocab_size": vocabulary,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _show(dataset: Dataset, seconds: dict[str, list[float]]) -> None:
    print(
        f"{format_bytes(dataset.tensor_bytes)} in {dataset.tensors} tensors, memory limit {format_bytes(MEMORY_BYTES)}"
    )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        others = ", ".join(
            f"{medians[other] / medians[name]:.2f} x the speed of {other}"
            for other in medians
            if name.startswith("streamload") and not other.startswith("streamload")
        )
        print(
            f"  {name:24} {medians[name]:7.3f} s ({min(times):.3f} to {max(times):.3f}), "
            f"{dataset.tensor_bytes / medians[name] / 1e9:5.2f} GB/s  {others}"
        )


if __name__ == "__main__":
    main()
