"""Loading a model of transformers: from S3 on loopback and from a folder, beside transformers' own way from a folder.

In turns, each in a process of its own, from the call to the model that is there, imports done:

- ``streamload, S3``: `streamload.transformers.from_pretrained` from the bucket;
- ``download, then load``: boto3's ``download_file`` of each file onto a disk, then transformers' ``from_pretrained``;
- ``streamload, folder`` and ``transformers, folder``: from the same files in the page cache.

transformers maps files and copies nothing where a parameter can stay in the mapping: its model from a folder is there
before its bytes are. So ``touched`` counts until each parameter was summed up once, as a first step of inference would.

::

    python -m bench.transformers_load --size 4GB --rounds 5

It needs nginx, see bench/origin.py.
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
from pathlib import Path
from typing import Any

import streamload
from bench import origin
from bench.datasets import Dataset, make
from bench.scenarios import GB, MEMORY_BYTES
from streamload.units import parse_bytes

__all__ = ["main"]

_WAYS = ("streamload, S3", "download, then load", "streamload, folder", "transformers, folder")


def main() -> None:
    """Measure, and show the medians."""
    parser = argparse.ArgumentParser(prog="python -m bench.transformers_load", description=__doc__)
    parser.add_argument("--size", type=parse_bytes, default=4 * GB, help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="of each")
    parser.add_argument("--memory-bytes", type=parse_bytes, default=MEMORY_BYTES, help="streamload's limit")
    parser.add_argument("--data", type=Path, default=Path("build/bench/data"), help="where the checkpoint is kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "JOB"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_load(given.one[0], json.loads(given.one[1]))))
        return
    # In a folder of its own: the files that transformers needs would change what others measure.
    dataset = make("llama", given.size, given.data / "transformers")
    _write_model_files(dataset)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    with origin.serve(dataset.folder, variant="http") as served:
        for _ in range(given.rounds + 1):
            for way in _WAYS:
                found[way].append(_in_a_process(way, dataset, served, given.memory_bytes))
    print(f"{dataset.size_bytes / 1e9:.2f} GB, {given.rounds} rounds: seconds, median (least to most)")
    for way, rounds in found.items():
        del rounds[0]  # which warmed caches
        print(f"{way:22}" + "".join(f"  {what} {_shown(rounds, what)}" for what in ("loaded", "touched", "peak_mib")))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


def _shown(rounds: list[dict[str, float]], what: str) -> str:
    values = [each[what] for each in rounds]
    return f"{statistics.median(values):8.2f} ({min(values):.2f} to {max(values):.2f})"


def _write_model_files(dataset: Dataset) -> None:
    """The config of the model whose shapes the data set has, and the index of its files."""
    found = streamload.inspect(dataset.bucket).plan.catalog
    shapes = {tensor.name: tensor.shape for file in found.files for tensor in file.tensors}
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    heads = max(4, hidden // 128)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("o_proj.weight") for name in shapes),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (dataset.bucket / "config.json").write_text(json.dumps(config))
    index: dict[str, Any] = {"metadata": {}}
    index["weight_map"] = {tensor.name: file.key for file in found.files for tensor in file.tensors}
    (dataset.bucket / "model.safetensors.index.json").write_text(json.dumps(index))


def _in_a_process(way: str, dataset: Dataset, served: origin.Origin, memory_bytes: int) -> dict[str, float]:
    job = {
        "folder": str(dataset.bucket),
        "bucket": served.bucket,
        "endpoint": served.endpoint_url,
        "memory_bytes": memory_bytes,
        "scratch": str(dataset.folder.parent),
    }
    command = [*served.command_prefix, sys.executable, "-m", "bench.transformers_load", "--one", way, json.dumps(job)]
    done = subprocess.run(command, env=os.environ | served.environ, stdout=subprocess.PIPE, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _load(way: str, job: dict[str, Any]) -> dict[str, float]:
    """In a process of its own."""
    import boto3  # type: ignore[import-untyped]
    import transformers

    from streamload.transformers import from_pretrained

    auto: Any = transformers.AutoModelForCausalLM
    _ = transformers.LlamaForCausalLM  # imported when it is first named
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    with tempfile.TemporaryDirectory(dir=job["scratch"]) as scratch:
        began = time.perf_counter()
        if way == "streamload, S3":
            model = from_pretrained(auto, f"s3://{job['bucket']}", memory_bytes=job["memory_bytes"])
        elif way == "streamload, folder":
            model = from_pretrained(auto, job["folder"], memory_bytes=job["memory_bytes"])
        elif way == "transformers, folder":
            model = auto.from_pretrained(job["folder"])
        else:
            client = boto3.client("s3", endpoint_url=job["endpoint"])
            for file in os.listdir(job["folder"]):
                client.download_file(job["bucket"], file, f"{scratch}/{file}")
            model = auto.from_pretrained(scratch)
        loaded = time.perf_counter() - began
        for parameter in model.parameters():
            parameter.detach().float().sum()
        touched = time.perf_counter() - began
    return {"loaded": loaded, "touched": touched, "peak_mib": (_status("VmHWM") - before) / 2**20}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
