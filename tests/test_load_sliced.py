"""load_sliced: what a model's own loading code takes is what is read, and what it would have made is what there is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import streamload
from tests.checkpoints import same_tensor
from tests.recorded_models import Decoder, checkpoint

Weights = Iterable[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    save_file(checkpoint(), folder / "model.safetensors")
    return folder


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its parameters and all of its buffers."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def check(found: nn.Module, expected: nn.Module) -> None:
    assert state(found).keys() == state(expected).keys()
    for name, tensor in state(expected).items():
        assert same_tensor(state(found)[name], tensor), name


@pytest.mark.parametrize(("rank", "world"), [(rank, world) for world in (1, 2, 4) for rank in range(world)])
def test_a_rank_reads_what_its_model_takes(decoder: Path, rank: int, world: int) -> None:
    expected, found = Decoder(rank, world), Decoder(rank, world)
    expected.load_weights(checkpoint().items())
    loaded = streamload.load_sliced(found, decoder)
    check(found, expected)
    assert loaded.whole == {}
    assert loaded.loaded == set(checkpoint())
    assert found.seen == list(checkpoint()) or sorted(found.seen) == sorted(checkpoint())
    assert loaded.checkpoint_bytes == sum(tensor.nbytes for tensor in checkpoint().values())
    assert loaded.report.nbytes < (1.01 / world + 0.1) * loaded.checkpoint_bytes


def test_a_model_may_be_loaded_whole(decoder: Path) -> None:
    expected, found = Decoder(1, 2), Decoder(1, 2)
    expected.load_weights(checkpoint().items())
    loaded = streamload.load_sliced(found, decoder, record=False)
    check(found, expected)
    assert loaded.whole.keys() == set(checkpoint())
    assert loaded.report.nbytes == loaded.checkpoint_bytes
