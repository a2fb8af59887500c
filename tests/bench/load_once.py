"""One loader, once, in a process of its own: clients of S3 read the environment when they are first used.

Run with the loader's name and its job as JSON. Prints a JSON object: what is in the outcome, and the SHA-256 of each
tensor's bytes by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch

from bench.loaders import loader_named
from bench.loaders.base import Job

__all__ = ["digest", "load_once"]


def load_once(
    name: str, job: Job, params: dict[str, torch.Tensor], environ: dict[str, str], prefix: list[str]
) -> dict[str, Any]:
    """Run the loader and return what it says.

    Args:
        name: The loader's.
        job: What it is to do.
        params: Like these are the parameters that it fills, where its destination is ``params``.
        environ: What points it at its store, above this process's own variables.
        prefix: What to put before the command.
    """
    tuned = loader_named(name).environ(job)
    shapes = {name: (list(param.shape), str(param.dtype).removeprefix("torch.")) for name, param in params.items()}
    described = json.dumps(asdict(job) | {"shapes": shapes})
    command = [*prefix, sys.executable, "-m", "tests.bench.load_once", name, described]
    done = subprocess.run(command, env=os.environ | environ | tuned, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{name} failed: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of the tensor's bytes."""
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(flat).hexdigest()


def main() -> None:
    """What the process does."""
    name, described = sys.argv[1:]
    fields = json.loads(described)
    shapes = fields.pop("shapes")
    job = Job(**fields | {"files": tuple(fields["files"]), "sizes": tuple(fields["sizes"])})
    loader = loader_named(name)
    loader.imports()
    digests: dict[str, str] = {}
    if job.destination == "drain":
        outcome = loader.drain(job, lambda name, tensor: digests.__setitem__(name, digest(torch.as_tensor(tensor))))
    else:
        params = {name: torch.full(shape, 1, dtype=getattr(torch, dtype)) for name, (shape, dtype) in shapes.items()}
        outcome = loader.params(job, params)
        digests |= {name: digest(param) for name, param in params.items()}
    print(json.dumps({"nbytes": outcome.nbytes, "tensors": digests}))


if __name__ == "__main__":
    main()
