"""load_sliced: what a model's own loading code takes is what is read, and what it would have made is what there is."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import streamload
from streamload.errors import DeadlineError, NotFoundError, OptionError, StreamloadError
from tests.checkpoints import same_tensor, wrapped
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


class Part(nn.Module):
    """A module with two parameters, and a note of what was given to it."""

    factor: float

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = poisoned(4, 256), poisoned(4, 256)
        self.seen: list[str] = []


class Norms(nn.Module):
    """Two modules and what some loading code does with them."""

    def __init__(self, load: Callable[[Norms, str, torch.Tensor], object]) -> None:
        super().__init__()
        self.one, self.two = Part(), Part()
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
        vars(model.one.weight)["is_loaded"] = True
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


def test_the_order_is_that_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller tensor is read before the larger one is, and has to be copied after it."""
    monkeypatch.setenv("STREAMLOAD_ORDER", "completion")
    tensors = {"large": torch.full((4000, 1024), 1.0), "small": torch.full((20, 1024), 2.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = nn.Module()
    model.register_parameter("weight", poisoned(4000, 1024))

    def load_weights(weights: Weights) -> None:
        for name, tensor in weights:
            first = 0 if name == "large" else 3990
            model.get_parameter("weight").data[first : first + len(tensor)].copy_(tensor[: 4000 - first])

    streamload.load_sliced(model, tmp_path, load_weights)
    assert model.get_parameter("weight")[3990:].eq(2).all()


def _into_anothers(model: Norms, name: str, tensor: torch.Tensor) -> object:
    """Nothing is known of this name before its values are, and then it changes what the others were copied to."""
    return model.two.weight.data.mul_(2) if name == "one.weight" and tensor[0, 0].item() > -99 else None


def test_what_is_read_whole_must_not_touch_what_was_recorded(norms: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = norms
    order = ["two.weight", "one.weight", "one.other", "two.other"]
    expected, found = Norms(_into_anothers), Norms(_into_anothers)
    weights = [(name, tensors[name]) for name in order]
    files = [streamload_file(folder.parent / "conflict", number, *weight) for number, weight in enumerate(weights)]
    expected.load_weights(weights)
    loaded = streamload.load_sliced(found, files[0].parent)
    check(found, expected)
    assert loaded.whole.keys() == set(NAMES)


def _tied_unless_seen(model: Norms, weights: Weights) -> object:
    """Computes with some names, and decides by the names that it was given."""
    seen = {}
    for name, tensor in weights:
        model.get_parameter(name).data.copy_(tensor + 1 if name.startswith("one") else tensor)
        seen[name] = tensor.shape
    if "two.weight" not in seen:
        model.two.weight = model.both
    return seen


def _refuses_a_part(model: Norms, weights: Weights) -> object:
    seen = set()
    for name, tensor in weights:
        model.get_parameter(name).data.copy_(tensor + 1 if name.startswith("one") else tensor)
        seen.add(name)
    if seen != set(NAMES):
        raise ValueError(f"only {seen} were given")
    return seen


def _loads_once(model: Norms, weights: Weights) -> object:
    if hasattr(model, "is_loaded"):
        return None
    vars(model)["is_loaded"] = True
    return _refuses_a_part(model, weights)


def _notes_with_others(model: Norms, weights: Weights) -> object:
    """What it notes about a module that is read whole comes with names that are not."""
    for name, tensor in weights:
        model.get_parameter(name).data.copy_(tensor + 1 if name.startswith("one") else tensor)
        model.one.seen.append(name)
        model.calls += 1
    return model.calls


def _clears_first(model: Norms, weights: Weights) -> object:
    for name, tensor in weights:
        target = model.get_parameter(name).data
        if name.startswith("one"):
            target.copy_(tensor + 1)
        else:
            target.zero_()
            target[:3].copy_(tensor[:3])
    return None


def _tied_by_a_value(model: Norms, weights: Weights) -> object:
    factor = 0.0
    for name, tensor in weights:
        if name == "one.other":
            factor = tensor.max().item()
        else:
            model.get_parameter(name).data.copy_(tensor)
    if not factor:
        model.two.weight = model.both
    return factor


ONE = {"one.weight", "one.other"}


def _takes_other_bits(model: Norms, weights: Weights) -> object:
    for name, tensor in weights:
        model.get_parameter(name).data.copy_(tensor + 1 if name.startswith("one") else tensor)
    model.one.weight.data = model.one.weight.data.view(torch.int32)
    return None


def _turns_memory(model: Norms, weights: Weights) -> object:
    for name, tensor in weights:
        model.get_parameter(name).data.copy_(tensor + 1 if name.startswith("one") else tensor)
    model.one.weight.data = model.one.weight.data.view(256, 4).t()
    return model.one.weight.stride()


def _keeps_what_it_made(model: Norms, weights: Weights) -> object:
    for name, tensor in weights:
        model.get_parameter(name).data.copy_(tensor)
        if name == "two.weight":
            vars(model)["zeros"] = torch.zeros_like(tensor)
            vars(model)["index"] = torch.arange(4, device=tensor.device)
    return [tensor.device.type for tensor in vars(model).values() if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize(
    ("code", "whole"),
    [
        *((_takes_other_bits, ONE), (_turns_memory, ONE), (_keeps_what_it_made, {"two.weight"})),
        *((_tied_unless_seen, ONE), (_refuses_a_part, ONE), (_loads_once, ONE), (_notes_with_others, ONE)),
        *((_clears_first, ONE), (_tied_by_a_value, {"one.other", "two.weight", "two.other"})),
    ],
)
def test_the_code_sees_every_name_when_it_counts(
    norms: tuple[Path, dict[str, torch.Tensor]], code: Callable[[Norms, Weights], object], whole: set[str]
) -> None:
    check_code(norms, code, whole)


def check_code(
    norms: tuple[Path, dict[str, torch.Tensor]], code: Callable[[Norms, Weights], object], whole: set[str]
) -> None:
    """Whether some code leaves and returns what it would have, and which names it was given whole."""
    folder, tensors = norms
    expected, found = Norms(lambda *_: None), Norms(lambda *_: None)
    returned = code(expected, sorted((name, tensor.clone()) for name, tensor in tensors.items()))
    loaded = streamload.load_sliced(found, folder, lambda weights: code(found, weights))
    check(found, expected)
    assert loaded.loaded == returned
    assert loaded.whole.keys() == whole
    for module, other in zip(found.modules(), expected.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()
    assert (found.calls, found.one.seen) == (expected.calls, expected.one.seen)


def _paired(model: Norms, weights: Weights) -> object:
    """Waits for two tensors, and looks at one."""
    held: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        held[name] = tensor
        if len(held) == 2:
            scale, _ = held.values()
            model.get_parameter(name).data.copy_(tensor * 2 if scale.max().item() > 0 else tensor)
            held.clear()
    return None


def _carried(model: Norms, weights: Weights) -> object:
    factor = 1.0
    for name, tensor in weights:
        if name == "one.other":
            factor = tensor.max().item()
        model.get_parameter(name).data.copy_(tensor if factor == 1.0 else tensor * factor)
    return factor


def _accumulated(model: Norms, weights: Weights) -> object:
    """Adds to what there is, and does what is not to be foreseen when it has."""
    factor = 1.0
    for name, tensor in weights:
        if name == "one.other":
            model.one.other.data.add_(tensor)
            model.one.weight.data.copy_(model.one.weight.data + 1)
            factor = tensor.max().item()
        elif name != "one.weight":
            model.get_parameter(name).data.copy_(tensor)
            if factor != 1.0:
                model.get_parameter(name).data.mul_(factor)
    return None


def _kept_by_a_value(model: Norms, weights: Weights) -> object:
    last = None
    for name, tensor in weights:
        model.get_parameter(name).data.copy_(tensor)
        if last is not None and last.max().item() > 0:
            model.one.seen.append("kept")
            vars(model)["original"] = tensor
        last = tensor if name == "one.other" else None
    return vars(model).pop("original").sum().item()


def _fails_by_a_value(model: Norms, weights: Weights) -> object:
    """Takes another way where it cannot go on; which is of no use when a value is there at last."""
    factor = 0.0
    for name, tensor in weights:
        if name == "one.other":
            factor = tensor.max().item()
        elif factor:
            model.get_parameter(name).data.copy_(torch.from_numpy(tensor.numpy().copy()))
        else:
            model.get_parameter(name).data.copy_(tensor)
    return None


@torch.inference_mode()
def _read_in_inference_mode(model: Norms, weights: Weights) -> object:
    for name, tensor in weights:
        if name != "two.weight":
            model.get_parameter(name).data.copy_(tensor)
    return model.two.weight.data.copy_(model.one.weight.data.to(torch.bfloat16)).sum().item()


@torch.inference_mode()
def _reshaped_in_inference_mode(model: Norms, weights: Weights) -> object:
    for name, tensor in weights:
        model.get_parameter(name).data.copy_(tensor)
    return model.one.weight.data.t().reshape(-1)[0].item()


@pytest.mark.parametrize(
    "code",
    [
        *(_paired, _carried, _accumulated, _kept_by_a_value, _fails_by_a_value),
        *(_read_in_inference_mode, _reshaped_in_inference_mode),
    ],
)
def test_who_does_otherwise_when_there_are_values_is_given_everything_whole(
    norms: tuple[Path, dict[str, torch.Tensor]], code: Callable[[Norms, Weights], object]
) -> None:
    check_code(norms, code, set(NAMES))


def _elsewhere_by_a_value(model: Norms, weights: Weights) -> object:
    factor = 0.0
    for name, tensor in weights:
        if name == "one.other":
            factor = tensor.max().item()
        elif name == "two.weight" and factor:
            model.both.data[:4].copy_(tensor)
        else:
            model.get_parameter(name).data.copy_(tensor)
    return None


def _cleared_by_a_value(model: Norms, weights: Weights) -> object:
    factor = 0.0
    for name, tensor in weights:
        if name == "one.other":
            factor = tensor.max().item()
        elif name == "two.weight":
            model.both.data[:4].copy_(tensor)
            if not factor:
                model.both.data[4:].zero_()
    return None


@pytest.mark.parametrize(
    ("code", "left"), [(_elsewhere_by_a_value, "'two.weight'"), (_cleared_by_a_value, "a constant")]
)
def test_what_was_written_in_vain_is_not_left_there(
    norms: tuple[Path, dict[str, torch.Tensor]], code: Callable[[Norms, Weights], object], left: str
) -> None:
    model = Norms(lambda *_: None)
    with pytest.raises(StreamloadError, match=rf"was seen to write {left}.*undefined now"):
        streamload.load_sliced(model, norms[0], lambda weights: code(model, weights))


def _tied_at_the_end(model: Norms, weights: Weights) -> object:
    for name, tensor in weights:
        if name.startswith("one"):
            model.get_parameter(name).data.copy_(tensor)
    model.two.weight = model.one.weight
    model.register_buffer("made", torch.arange(3))
    return None


def test_what_one_run_has_changed_stays(norms: tuple[Path, dict[str, torch.Tensor]]) -> None:
    check_code(norms, _tied_at_the_end, set())


def streamload_file(folder: Path, number: int, name: str, tensor: torch.Tensor) -> Path:
    """A tensor in a file of its own: so it is known in which order tensors come."""
    folder.mkdir(exist_ok=True)
    path = folder / f"model-{number:05}-of-00004.safetensors"
    save_file({name: tensor}, path)
    return path


def test_a_model_without_memory_is_given_everything_whole(norms: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """One that makes its parameters as tensors come."""
    folder, tensors = norms

    def load_weights(weights: Weights) -> None:
        for name, tensor in weights:
            setattr(model, name.replace(".", "_"), nn.Parameter(tensor, requires_grad=False))

    model = nn.Module()
    model.register_parameter("one_weight", nn.Parameter(torch.empty(4, 256, device="meta"), requires_grad=False))
    loaded = streamload.load_sliced(model, folder, load_weights)
    assert loaded.whole == dict.fromkeys(NAMES, "'one_weight' of a Module is on the meta device")
    assert loaded.loaded is None
    for name, tensor in tensors.items():
        assert same_tensor(getattr(model, name.replace(".", "_")).data, tensor)


def test_a_parameter_that_wraps_others_makes_everything_whole(norms: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = norms
    model = Norms(lambda *_: None)
    model.register_buffer("strange", wrapped())
    loaded = streamload.load_sliced(model, folder)
    assert set(loaded.reasons) == {"'strange' of a Norms has no memory of its own"}
    assert same_tensor(model.two.other.data, tensors["two.other"])


def test_what_the_model_refuses_is_its_own_error(norms: tuple[Path, dict[str, torch.Tensor]]) -> None:
    def refused(model: Norms, name: str, tensor: torch.Tensor) -> object:
        raise KeyError(name)

    with pytest.raises(KeyError) as raised:
        streamload.load_sliced(Norms(refused), norms[0])
    assert raised.value.args == ("one.other",)


def test_a_file_that_ends_early_leaves_the_model_undefined(tmp_path: Path, decoder: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((decoder / "model.safetensors").read_bytes())
    model = Decoder()

    def load_weights(weights: Weights) -> None:
        model.load_weights(weights)
        # After the headers: a rename keeps what is open, a truncation is what it is seen by.
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1000)

    with pytest.raises(StreamloadError, match="now undefined") as raised:
        streamload.load_sliced(model, tmp_path, load_weights)
    assert "model.safetensors" in str(raised.value)


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"rank": 1, "world_size": 2}, {"order": "completion"}])
def test_the_model_decides_what_goes_where(decoder: Path, options: Any) -> None:
    with pytest.raises(OptionError, match="load_sliced takes no"):
        streamload.load_sliced(Decoder(), decoder, **options)
    with pytest.raises(OptionError, match="has no load_weights"):
        streamload.load_sliced(nn.Linear(2, 2), decoder)


def test_parameters_may_lie_in_a_dict_of_another_kind(norms: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = norms
    expected, found = Norms(_squared), Norms(_squared)
    found.one._parameters = OrderedDict(found.one._parameters)
    expected.load_weights(sorted(tensors.items()))
    assert streamload.load_sliced(found, folder).whole.keys() == ONE
    check(found, expected)


def test_a_deadline_may_pass_while_the_code_runs(norms: tuple[Path, dict[str, torch.Tensor]]) -> None:
    threads = set(threading.enumerate())

    def load_weights(weights: Weights) -> None:
        for _ in weights:
            pass
        for thread in set(threading.enumerate()) - threads:
            thread.join()  # the engine's, among others: it ends at the deadline

    with pytest.raises(DeadlineError):
        streamload.load_sliced(Norms(lambda *_: None), norms[0], load_weights, deadline_s=0.5)


def test_what_cannot_be_read_is_an_error_though_the_code_goes_on(
    tmp_path: Path, norms: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((norms[0] / "model.safetensors").read_bytes())
    model = Norms(_squared)

    def load_weights(weights: Weights) -> None:
        with suppress(StreamloadError):
            model.load_weights(weights)
        os.truncate(path, 1000)

    with pytest.raises(StreamloadError, match="now undefined"):
        streamload.load_sliced(model, tmp_path, load_weights)


def test_nothing_there_is_an_error_before_the_code_runs(tmp_path: Path) -> None:
    model = Norms(lambda *_: pytest.fail("run"))
    with pytest.raises(NotFoundError):
        streamload.load_sliced(model, tmp_path / "none")
    assert model.calls == 0


def _reshaped(tensor: torch.Tensor, first: int) -> torch.Tensor:
    sizes = [number for number in range(1, tensor.numel() + 1) if tensor.numel() % number == 0]
    return tensor.reshape(sizes[first % len(sizes)], -1)


# What loading code does with a tensor and two numbers; what is not possible raises an error.
OPERATIONS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "narrow": lambda it, a, b: it.narrow(a % it.dim(), b % it.shape[a % it.dim()], 1 + a % 2),
    "half": lambda it, a, b: it.chunk(2, dim=a % it.dim())[b % 2],
    "split": lambda it, a, b: torch.split(it, 1 + a % 3, dim=-1)[b % 2],
    "index": lambda it, a, b: it[a % it.shape[0]],
    "step": lambda it, a, b: it[a % 2 :: 1 + b % 3],
    "last": lambda it, a, b: it[..., a % 3 : 7 + b],
    "unbind": lambda it, a, b: it.unbind(a % it.dim())[0],
    "transpose": lambda it, a, b: it.transpose(a % it.dim(), b % it.dim()),
    "permute": lambda it, a, b: it.permute(*range(1, it.dim()), 0),
    "reshape": lambda it, a, b: _reshaped(it, a),
    "flatten": lambda it, a, b: it.flatten(a % it.dim()),
    "contiguous": lambda it, a, b: it.contiguous(),
    "clone": lambda it, a, b: it.clone(),
    "unsqueeze": lambda it, a, b: it.unsqueeze(a % (it.dim() + 1)),
    "squeeze": lambda it, a, b: it.squeeze(),
    "diagonal": lambda it, a, b: it.diagonal(),
    "float16": lambda it, a, b: it.to(torch.float16),
    "float32": lambda it, a, b: it.float(),
    "bits": lambda it, a, b: it.view(torch.int32),
    "bytes": lambda it, a, b: it.view(torch.uint8),
    "device": lambda it, a, b: it.to("cpu"),
    "detach": lambda it, a, b: it.detach(),
    # What cannot be recorded.
    "abs": lambda it, a, b: it.abs(),
    "expand": lambda it, a, b: it.unsqueeze(0).expand(2, *it.shape),
    "cat": lambda it, a, b: torch.cat([it, it]),
}

Step = tuple[str, int, int]


class Random(nn.Module):
    """Takes tensors by random operations, into random regions of its parameters.

    Args:
        copies: For each the tensor's name, what is done with it, where it goes, how far apart its elements lie there,
            and whether its dimensions are in another order.
        dtype: The second parameter's.
    """

    def __init__(self, copies: list[tuple[str, list[Step], int, int, bool]], dtype: torch.dtype) -> None:
        super().__init__()
        self.one, self.two = poisoned(20_000), poisoned(20_000, dtype=dtype)
        self._copies = copies

    def load_weights(self, weights: Weights) -> None:
        """Take them."""
        for name, tensor in weights:
            for wanted, steps, place, distance, turned in self._copies:
                if wanted == name:
                    self._take(tensor, steps, self.one if place % 2 else self.two, place * 100, distance, turned)

    def _take(
        self, tensor: torch.Tensor, steps: list[Step], into: nn.Parameter, start: int, distance: int, turned: bool
    ) -> None:
        for name, first, second in steps:
            try:
                found = OPERATIONS[name](tensor, first, second)
            except (IndexError, RuntimeError, ZeroDivisionError):
                continue
            if found.numel():
                tensor = found
        order = list(range(tensor.dim()))
        strides = dict.fromkeys(order, 0)
        for dim in order if turned else reversed(order):
            strides[dim] = distance
            distance *= tensor.shape[dim]
        if start + distance <= into.numel():
            into.data.as_strided(tensor.shape, list(strides.values()), start).copy_(tensor)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tensor of short rows and one of long ones."""
    folder = tmp_path_factory.mktemp("pair")
    generator = torch.Generator().manual_seed(9)
    tensors = {
        "long": torch.randn(4, 3, 256, generator=generator),
        "short": torch.randn(8, 6, 10, generator=generator).to(torch.bfloat16),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


@given(
    copies=st.lists(
        st.tuples(
            st.sampled_from(["long", "short"]),
            st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9), st.integers(0, 9)), max_size=6),
            st.integers(0, 60),
            st.integers(1, 3),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int32]),
)
def test_whatever_the_code_does_the_model_gets(
    pair: tuple[Path, dict[str, torch.Tensor]],
    copies: list[tuple[str, list[Step], int, int, bool]],
    dtype: torch.dtype,
) -> None:
    folder, tensors = pair
    expected, found = Random(copies, dtype), Random(copies, dtype)
    expected.load_weights(tensors.items())
    streamload.load_sliced(found, folder)
    check(found, expected)
