"""One rank of two that load models of transformers: ``python -m tests.ranks_of_transformers`` with JSON on stdin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["Told", "main", "run_two_ranks"]

_TIMEOUT_S = 600  # nobody waits so long: a test that needs it fails


@dataclass(frozen=True)
class Told:
    """What a rank has found of one model.

    Attributes:
        uri: Where it was loaded from.
        parameters: How many it has, buffers included.
        sharded: The names of those that are shared out.
        differing: Those that are not what transformers itself gives this rank.
        sharded_bytes: This rank's parts of what is shared out.
        whole_sharded_bytes: The same on all ranks together.
        nbytes: Everything that this rank has.
        checkpoint_bytes: Everything that the checkpoint has.
        delivered_bytes: By the report: what was handed to transformers.
        tensors: By the report: how many tensors or slices that were.
        total_tensors: By the report: how many were planned for.
    """

    uri: str
    parameters: int
    sharded: list[str]
    differing: list[str]
    sharded_bytes: int
    whole_sharded_bytes: int
    nbytes: int
    checkpoint_bytes: int
    delivered_bytes: int
    tensors: int
    total_tensors: int


def run_two_ranks(places: list[tuple[str, str]], last: tuple[str, str]) -> tuple[list[Told], list[str]]:
    """Have two ranks load models, and compare what they get with what transformers loads from a folder.

    Args:
        places: For each model the URI, and the folder.
        last: From where each rank loads at the end; one of them fails.

    Returns:
        What both say of all models, and what the error at the end was on each.
    """
    said = _run([{"places": places, "last": uri} for uri in last])
    return [Told(**line) for lines in said for line in lines[:-1]], [lines[-1]["error"] for lines in said]


def _run(tasks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Run a rank for each task; what each has said, a line at a time."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # As torchrun's agent does.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank, task in enumerate(tasks):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(tasks), "OMP_NUM_THREADS": 1}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks_of_transformers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **{name: str(value) for name, value in names.items()}},
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({**task, "port": store.port}) + "\n")
        process.stdin.close()
        process.stdin = None
        ranks.append(process)
    try:
        outputs = [process.communicate(timeout=_TIMEOUT_S)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0] * len(ranks)
    return [[json.loads(line) for line in output.splitlines()] for output in outputs]


def main() -> None:
    import torch.distributed as dist
    import transformers
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from streamload.errors import StreamloadError
    from streamload.transformers import from_pretrained

    task = json.loads(sys.stdin.readline())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=_TIMEOUT_S)
    store = TCPStore("127.0.0.1", task["port"], is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    for uri, folder in task["places"]:
        print(json.dumps(asdict(_compare(uri, folder, size))), flush=True)
    try:
        from_pretrained(transformers.AutoModelForCausalLM, task["last"], tp=size)
    except StreamloadError as error:
        print(json.dumps({"error": str(error)}), flush=True)
    # Not by way of the process group's own end: the ranks are not where they expect each other.
    os._exit(0)


def _compare(uri: str, folder: str, size: int) -> Told:
    import torch
    import transformers
    from torch.distributed.tensor import DTensor
    from transformers.distributed.configuration_utils import DistributedConfig

    import streamload
    from streamload.transformers import from_pretrained

    auto: Any = transformers.AutoModelForCausalLM
    reports: list[streamload.Report] = []
    ours = from_pretrained(auto, uri, tp=size, on_report=reports.append).state_dict()
    theirs = auto.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=size)).state_dict()
    whole = auto.from_pretrained(folder).state_dict()
    assert ours.keys() == theirs.keys()
    sharded = [name for name, tensor in theirs.items() if isinstance(tensor, DTensor)]
    differing = []
    memory: dict[int, int] = {}
    for name, tensor in theirs.items():
        found = ours[name]
        if isinstance(tensor, DTensor):
            same = found.placements == tensor.placements and torch.equal(found.full_tensor(), whole[name])
            found, tensor = found.to_local(), tensor.to_local()
        else:
            same = not isinstance(found, DTensor)
        if not (same and found.dtype == tensor.dtype and torch.equal(found, tensor)):
            differing.append(name)
        memory[found.data_ptr()] = found.nbytes  # tied ones once
    (report,) = reports
    local = sum(ours[name].to_local().nbytes for name in sharded)
    return Told(
        uri=uri,
        parameters=len(ours),
        sharded=sharded,
        differing=differing,
        sharded_bytes=local,
        whole_sharded_bytes=sum(whole[name].nbytes for name in sharded),
        nbytes=sum(memory.values()),
        checkpoint_bytes=streamload.inspect(folder).plan.catalog.nbytes,
        delivered_bytes=report.nbytes,
        tensors=report.tensors,
        total_tensors=report.total_tensors,
    )


if __name__ == "__main__":
    main()
