"""Scenarios from end to end on a few megabytes: the results' contract, wrong loaders, interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench import datasets, measure, rounds
from bench.__main__ import main
from bench.datasets import Dataset
from bench.loaders import NAMES, loader_named
from bench.loaders.base import MIB, Destination, Job, Loader, Outcome, Took, now
from bench.measure import Request
from bench.results import Report
from bench.rounds import Settings, run_scenario

SIZE = 16_000_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of checkpoints for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def dataset(data: Path) -> Dataset:
    """A small checkpoint."""
    return datasets.make("llama", SIZE, data)


def job_of(dataset: Dataset, destination: Destination = "drain") -> Job:
    place = rounds.local_place(dataset)
    return Job("local-warm", destination, place.uri, place.files, dataset.sizes, 256 * MIB, "cpu")


def run(data: Path, *arguments: str) -> int:
    return main(["run", *arguments, "--dir", str(data), "--size", str(SIZE / 1e9), "--rounds", "1"])


def test_results_keep_the_contract(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    assert run(data, "local-warm", "--loaders", "limit,streamload,safetensors,obstore", "--json", str(file)) == 0
    found = json.loads(file.read_text())
    assert found["scenario"] == "local-warm"
    assert 0.5 * SIZE < found["size_bytes"] < 1.5 * SIZE
    assert found["machine"]["versions"]["torch"] == torch.__version__
    by_key = {(result["loader"], result["destination"]): result for result in found["results"]}
    ran = {("limit", "drain")} | {(name, to) for name in ("streamload", "safetensors") for to in ("drain", "params")}
    assert {key for key, result in by_key.items() if result["seconds"]} == ran
    for key in ran:
        result = by_key[key]
        assert result["correct"] is True
        assert len(result["seconds"]) == 1
        assert result["gb_per_s"] == pytest.approx(found["size_bytes"] / result["seconds"][0] / 1e9)
        assert result["cpu_s_per_gb"] >= 0
        assert result["peak_rss_bytes"] > 0
        assert result["limit_ratio"] > 0
        assert result["reason"] is None
    assert by_key["limit", "drain"]["limit_ratio"] == 1
    assert {name for name, _ in by_key.keys() - ran} == {"obstore"}
    assert by_key["obstore", "drain"]["reason"]
    assert by_key["obstore", "drain"]["correct"] is None
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("limit", "streamload", "safetensors"))


def test_several_scenarios_are_a_list(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert run(data, "small-tensors", "cold-start", "--loaders", "limit,streamload", "--json", str(file)) == 0
    small, cold = json.loads(file.read_text())
    assert small["machine"]["too_small"]
    assert {(result["loader"], result["destination"]) for result in cold["results"] if result["seconds"]} >= {
        ("limit", "drain"),
        ("streamload", "drain"),
        ("streamload", "params"),
    }
    # The interpreter and torch are counted.
    assert all(
        min(result["seconds"], default=1) > 0.1 for result in cold["results"] if result["loader"] == "streamload"
    )


def test_cold_start_without_a_gpu_is_said(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.machine.gpu", lambda: (None, "there is no GPU"))
    report = run_scenario("gpu-local", Settings(data, size_bytes=SIZE))
    assert (report.results, report.skipped) == ([], "there is no GPU")


class Swaps(Loader):
    """Hands out the right tensors under each other's names, where they have the same shape."""

    name = "safetensors"

    def __init__(self, spoil: Callable[[dict[str, torch.Tensor]], None]) -> None:
        self._spoil = spoil

    def _tensors(self, job: Job) -> dict[str, torch.Tensor]:
        tensors = {name: tensor for path in job.files for name, tensor in load_file(path).items()}
        self._spoil(tensors)
        return tensors

    def drain(self, job: Job, took: Took) -> Outcome:
        tensors = self._tensors(job)
        for name, tensor in tensors.items():
            took(name, tensor)
        return Outcome(sum(tensor.nbytes for tensor in tensors.values()), now())

    def params(self, job: Job, params: Any) -> Outcome:
        tensors = self._tensors(job)
        for name, tensor in tensors.items():
            params[name].copy_(tensor)
        return Outcome(sum(tensor.nbytes for tensor in tensors.values()), now())


UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"


def swap(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP], tensors[GATE] = tensors[GATE], tensors[UP]


def flip_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP].view(torch.int16)[-1, -1] ^= 1


def lose_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].view(-1)


@pytest.mark.parametrize("destination", ["drain", "params"])
@pytest.mark.parametrize("spoil", [swap, flip_a_bit, lose_one])
def test_wrong_tensors_are_found(
    dataset: Dataset, destination: Destination, spoil: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    found = measure.measure(Swaps(spoil), Request("x", job_of(dataset, destination), str(dataset.folder), "check"))
    assert found.wrong is not None
    assert "mlp" in found.wrong


def test_a_wrong_shape_is_found(dataset: Dataset) -> None:
    found = measure.measure(Swaps(reshape), Request("x", job_of(dataset), str(dataset.folder), "check"))
    assert found.wrong is not None
    assert UP in found.wrong


def test_right_tensors_are_right(dataset: Dataset) -> None:
    for destination in ("drain", "params"):
        request = Request("x", job_of(dataset, destination), str(dataset.folder), "check")
        assert measure.measure(Swaps(lambda tensors: None), request).wrong is None


def test_what_was_not_verified_does_not_count() -> None:
    assert rounds.unverified(None, None) is None
    assert rounds.unverified(10, 10) is None
    assert rounds.unverified(9, 10) == "verified 9 of 10 bytes: not counted"
    assert rounds.unverified(None, 10) is not None


class Tries:
    """Tries at the limit's two destinations, which import no torch, in three rounds: six runs in all."""

    def __init__(self, data: Path, journal: Path) -> None:
        self.data, self.journal = data, journal

    def go(self, *, stop_after: int | None = None) -> tuple[int, Report | None]:
        """How many runs this try made, and its report; None where it was interrupted after so many of them."""
        made = 0

        def say(text: str) -> None:
            nonlocal made
            if " limit: " in text:
                made += 1
                if made == stop_after:
                    raise KeyboardInterrupt

        settings = Settings(self.data, ("limit",), SIZE, rounds=2, runs=self.journal, say=say)
        try:
            report = run_scenario("cold-start", settings)
        except KeyboardInterrupt:
            return made, None
        return made, report


@pytest.fixture
def tries(data: Path, tmp_path: Path) -> Tries:
    return Tries(data, tmp_path / "results.json.runs")


def test_files_that_somebody_reads_meanwhile_are_dropped_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drops = iter([None, "somebody reads them", None, "not here", *["not here"] * 100])
    monkeypatch.setattr(datasets, "drop_from_page_cache", lambda folder: next(drops))
    settings = Settings(data, ("limit",), SIZE, rounds=1)
    report = run_scenario("local-cold", settings)
    (limit,) = [result for result in report.results if result.destination == "drain"]
    assert (report.skipped, len(limit.seconds), limit.reason) == (None, 1, None)
    assert run_scenario("local-cold", settings).skipped == "not here"


def test_an_interrupted_run_goes_on(tries: Tries) -> None:
    assert tries.go(stop_after=4) == (4, None)
    # Cut off in the middle of a line, as by a power failure.
    tries.journal.write_text(tries.journal.read_text() + '\n{"scenario": "cold-st')
    made, report = tries.go()
    assert report is not None
    assert made == 6 - 4
    assert [(result.correct, len(result.seconds)) for result in report.results] == [(True, 2)] * 2


def test_a_run_of_other_code_is_not_gone_on_with(tries: Tries, monkeypatch: pytest.MonkeyPatch) -> None:
    tries.go(stop_after=2)
    monkeypatch.setattr("bench.machine.fingerprint", lambda machine: "other")
    assert tries.go()[0] == 6


def test_the_journal_goes_when_all_is_done(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert run(data, "local-warm", "--loaders", "limit", "--json", str(file)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_data_sets_are_the_same_each_time_and_real(dataset: Dataset, tmp_path: Path) -> None:
    again = datasets.make("llama", SIZE, tmp_path)
    assert datasets.expected(again.folder) == datasets.expected(dataset.folder)
    tensors = {name: tensor for path in job_of(dataset).files for name, tensor in load_file(path).items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: value.shape for name, value in datasets.expected(dataset.folder).items()
    }
    checksums = [value.checksum for value in datasets.expected(dataset.folder).values()]
    assert len(set(checksums)) == len(checksums)


def test_the_full_size_checkpoints_are_as_described() -> None:
    llama = [tensor for file in datasets.KINDS["llama"](4_000_000_000) for tensor in file]
    assert max(tensor.nbytes for tensor in llama) == 64 * MIB
    assert sum(tensor.nbytes for tensor in llama) == pytest.approx(4e9, rel=0.05)
    small = [tensor for file in datasets.KINDS["small"](10**12) for tensor in file]
    assert len(small) == 50_000
    assert {min(tensor.nbytes for tensor in small), max(tensor.nbytes for tensor in small)} == {4096, 65536}


def test_every_loader_can_be_asked(dataset: Dataset) -> None:
    for name in NAMES:
        loader = loader_named(name)
        assert loader.name == name
        reason = loader.reason_not(job_of(dataset))
        assert reason is None or reason


@pytest.mark.parametrize("arguments", [["--loaders", "nobody"], ["--size", "0"], ["--rounds", "0"], ["--size", "nan"]])
def test_wrong_use_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["run", "local-warm", *arguments])
    assert raised.value.code == 2
    assert arguments[0] in capsys.readouterr().err
