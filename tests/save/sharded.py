"""What the tests of saving share: tensors of every kind, and readers that have nothing to do with what wrote them."""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from streamload.pipeline.engine import Engine
from streamload.sinks.dtypes import torch_dtypes
from tests.checkpoints import same_tensor

__all__ = ["MIB", "cancelling", "check_folder", "load_as_vllm", "read_folder", "state", "threads_of_ours"]

MIB = 1 << 20


def state(seed: int = 0, *, large: int = 3) -> dict[str, torch.Tensor]:
    """A tensor of each dtype that torch has; large ones; ones that are not contiguous; scalars."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, dtype in torch_dtypes().items():
        raw = torch.randint(0, 2 if name == "BOOL" else 256, (6, 32), generator=generator, dtype=torch.uint8)
        tensors[f"dtype.{name}"] = raw.view(dtype)
        tensors[f"transposed.{name}"] = raw.clone().view(dtype).t()
    for number in range(large):
        tensors[f"large.{number}"] = torch.randn(1 << 18, generator=generator)
    tensors["wide"] = torch.randn(3, 700_001, generator=generator)[:, ::2]
    tensors["conjugate"] = torch.randn(40, 2, generator=generator).to(torch.complex64).conj()
    tensors["scalar"] = torch.tensor(3.25, dtype=torch.float64)
    tensors["parameter"] = torch.nn.Parameter(torch.randn(17, 3, generator=generator))
    return tensors


def read_folder(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """What safetensors reads from a folder's files."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def check_folder(folder: Path, expected: Mapping[str, torch.Tensor], pattern: str = "*.safetensors") -> None:
    """Assert that a folder's files hold these tensors and no others, bit for bit."""
    found = read_folder(folder, pattern)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_tensor(found[name], tensor.detach().resolve_conj().contiguous()), name


def load_as_vllm(folder: Path, rank: int, model: Mapping[str, torch.Tensor]) -> None:
    """Fill a rank's tensors as vLLM's loader does: a glob over its own pattern, and every name in both or an error."""
    pattern = f"model-rank-{rank}-part-*.safetensors"
    paths = sorted(path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, pattern))
    assert paths
    missing = dict(model)
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                missing.pop(name).copy_(file.get_tensor(name))
    assert not missing


def threads_of_ours() -> list[str]:
    """The names of this package's threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamload")]


def cancelling(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What cancels the engine that was started last, and waits until it knows; for any thread but the engine's."""
    engines: list[Engine] = []
    start = Engine.start

    def started(engine: Engine) -> None:
        engines.append(engine)
        start(engine)

    patch.setattr(Engine, "start", started)

    def cancel() -> None:
        known = threading.Event()
        engines[-1].cancel()
        engines[-1].post(known.set)
        assert known.wait(60)

    return cancel
