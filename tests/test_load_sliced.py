"""load_sliced: what a model's own loading code takes is what is read, and what it would have made is what there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import streamload
from tests.checkpoints import same_tensor
from tests.recorded_models import Decoder, checkpoint, poisoned

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


class Norms(nn.Module):
    """Two modules and what some loading code does with them."""

    def __init__(self, load: Callable[[Norms, str, torch.Tensor], object]) -> None:
        super().__init__()
        self.one, self.two = nn.Module(), nn.Module()
        for module in (self.one, self.two):
            module.weight, module.other = poisoned(4, 256), poisoned(4, 256)
            module.seen = []
        self.both = poisoned(8, 256)
        self.calls = 0
        self._load = load

    def load_weights(self, weights: Weights) -> set[str]:
        self.calls += 1
        loaded = set()
        for name, tensor in weights:
            module, _, parameter = name.partition(".")
            target = getattr(self, module)
            if self._load(self, name, tensor) is None:
                target = target if isinstance(target, nn.Parameter) else getattr(target, parameter)
                target.data.copy_(tensor)
            if parameter:
                getattr(self, module).seen.append(name)
            loaded.add(name)
        return loaded


NAMES = ("one.weight", "one.other", "two.weight", "two.other")


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("norms")
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.rand(4, 256, generator=generator) + 0.5 for name in NAMES}
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def _squared(model: Norms, name: str, tensor: torch.Tensor) -> object:
    return model.one.weight.data.copy_(tensor * tensor) if name == "one.weight" else None


def _added(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if name != "one.weight":
        return None
    model.one.weight.data.zero_()
    return model.one.weight.data.add_(tensor)


def _looked_at(model: Norms, name: str, tensor: torch.Tensor) -> object:
    return model.one.weight.data.copy_(tensor) if name == "one.weight" and tensor.max().item() > 0 else None


def _changed_in_place(model: Norms, name: str, tensor: torch.Tensor) -> object:
    return model.one.weight.data.copy_(tensor).mul_(2) if name == "one.weight" else None


def _read_back(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if name != "one.weight":
        return None
    return model.one.weight.data.copy_(model.one.other.data)


def _indexed(model: Norms, name: str, tensor: torch.Tensor) -> object:
    return model.one.weight.data.copy_(tensor[torch.tensor([3, 0, 1, 2])]) if name == "one.weight" else None


def _by_index(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if name != "one.weight":
        return None
    model.one.weight.data[torch.tensor([3, 0, 1, 2])] = tensor
    return True


def _broadcast(model: Norms, name: str, tensor: torch.Tensor) -> object:
    return model.one.weight.data.copy_(tensor[0]) if name == "one.weight" else None


def _through_a_buffer(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if name != "one.weight":
        return None
    buffer = torch.empty(4, 256)
    buffer.copy_(tensor)
    return model.one.weight.data.copy_(buffer)


def _collected(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if not name.startswith("one"):
        return None
    waiting = vars(model).setdefault("waiting", {})
    waiting[name] = tensor
    if len(waiting) == 2:
        model.one.weight.data.copy_(torch.cat(list(waiting.values()))[2:6])
        model.one.other.data.copy_(waiting["one.other"])
        del model.waiting
    return True


def _kept(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if name == "one.weight":
        model.one.original = tensor
    return None


def _replaced(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if name != "one.weight":
        return None
    model.one.weight = nn.Parameter(torch.full((4, 256), -77.0), requires_grad=False)
    return model.one.weight.data.copy_(tensor)


def _given_other_memory(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if name != "one.weight":
        return None
    model.one.weight.data = torch.full((4, 256), -77.0)
    return model.one.weight.data.copy_(tensor)


def _cleared(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if name != "one.weight":
        return None
    model.one.weight.data.copy_(tensor)
    return model.one.weight.data[2:].zero_()


def _counting(model: Norms, name: str, tensor: torch.Tensor) -> object:
    """Says by an attribute of a parameter that it was loaded, and takes it only once."""
    if name == "one.weight":
        assert not hasattr(model.one.weight, "is_loaded")
        model.one.weight.is_loaded = True
        return model.one.weight.data.copy_(tensor.abs())
    return None


def _by_numpy(model: Norms, name: str, tensor: torch.Tensor) -> object:
    return model.one.weight.data.copy_(torch.from_numpy(tensor.numpy().copy())) if name == "one.weight" else None


def _caught(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if name != "one.weight":
        return None
    try:
        factor = float(tensor[0, 0])
    except Exception:
        factor = 3.0
    model.one.factor = factor
    return None


@pytest.mark.parametrize(
    "load",
    [
        *(_squared, _added, _looked_at, _indexed, _by_index, _broadcast, _through_a_buffer, _collected, _kept),
        *(_replaced, _given_other_memory, _counting, _by_numpy, _caught),
    ],
)
def test_what_cannot_be_recorded_is_read_whole(
    norms: tuple[Path, dict[str, torch.Tensor]], load: Callable[[Norms, str, torch.Tensor], object]
) -> None:
    folder, tensors = norms
    expected, found = Norms(load), Norms(load)
    expected.load_weights(sorted(tensors.items()))
    loaded = streamload.load_sliced(found, folder)
    check(found, expected)
    assert "one.weight" in loaded.whole
    assert all(name.startswith("one") for name in loaded.whole)
    assert loaded.loaded == set(NAMES)
    # What the code has noted about the modules is what it would have noted.
    for module, other in ((found.one, expected.one), (found.two, expected.two)):
        assert sorted(module.seen) == sorted(other.seen)
        assert vars(module).keys() == vars(other).keys()


def _overlapping(model: Norms, name: str, tensor: torch.Tensor) -> object:
    if not name.startswith("one"):
        return None
    first = 0 if name == "one.weight" else 2
    return model.both.data[first : first + 4].copy_(tensor)


@pytest.mark.parametrize("load", [_changed_in_place, _read_back, _cleared])
def test_who_computes_with_parameters_is_given_everything_whole(
    norms: tuple[Path, dict[str, torch.Tensor]], load: Callable[[Norms, str, torch.Tensor], object]
) -> None:
    folder, tensors = norms
    expected, found = Norms(load), Norms(load)
    expected.load_weights(sorted(tensors.items()))
    loaded = streamload.load_sliced(found, folder)
    check(found, expected)
    assert loaded.whole.keys() == set(NAMES)
    assert found.calls == 1


def test_copies_that_overlap_in_part_keep_their_order(norms: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = norms
    expected, found = Norms(_overlapping), Norms(_overlapping)
    expected.load_weights(sorted(tensors.items()))
    loaded = streamload.load_sliced(found, folder)
    check(found, expected)
    assert loaded.whole.keys() == {"one.weight", "one.other"}
