"""Medians, ratios, comparing two files, tables and the plot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import results
from bench.__main__ import main
from bench.results import Report, Run


def runs(loader: str, *seconds: float, destination: str = "drain") -> list[Run]:
    """Round 0, which took very long, and the others."""
    return [
        Run(
            loader, destination, number, value, cpu_s=2 * value, peak_rss_bytes=number * 100, above_imports_bytes=number
        )
        for number, value in enumerate([99.0, *seconds])
    ]


def summarized(*every: list[Run]) -> Report:
    return results.summarize(
        "local-warm", 10**9, {"cpu": "x"}, [run for found in every for run in found], {("obstore", "drain"): "no files"}
    )


def test_medians_leave_out_round_0() -> None:
    limit, ours, peer = summarized(runs("limit", 1.0, 3.0, 2.0), runs("streamload", 4.0, 4.0, 8.0)).results
    assert (limit.seconds, limit.gb_per_s, limit.cpu_s_per_gb) == ([1.0, 3.0, 2.0], 0.5, 4.0)
    assert (limit.peak_rss_bytes, limit.limit_ratio) == (300, 1.0)
    assert (ours.gb_per_s, ours.limit_ratio) == (0.25, 0.5)
    assert (peer.loader, peer.correct, peer.seconds, peer.reason) == ("obstore", None, [], "no files")


def test_parameters_are_compared_with_the_drain_s_limit() -> None:
    report = summarized(runs("limit", 1.0), runs("streamload", 2.0, destination="params"))
    assert report.results[1].limit_ratio == 0.5


def test_a_wrong_loader_is_shown_as_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [replace(run, wrong="1 of 9 tensors") if run.number == 0 else run for run in runs("runai", 1.0)]
    report = summarized(runs("limit", 1.0), wrong)
    result = report.results[1]
    assert (result.correct, result.reason) == (False, "1 of 9 tensors")
    results.write(tmp_path / "old.json", [summarized(runs("runai", 1.0))])
    results.write(tmp_path / "new.json", [report])
    assert main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 0
    assert "WRONG now" in capsys.readouterr().out


def test_a_file_is_shown_as_tables_for_people_and_for_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [replace(run, wrong="1 of 9 tensors") for run in runs("safetensors", 1.0)]
    counted = runs("runai", 4.0, 2.0, 3.0), runs("streamload", 1.5), runs("limit", 2.0)
    skipped = Report("gpu-s3", 10**9, {}, [], skipped="no GPU")
    results.write(tmp_path / "a.json", [summarized(*counted, wrong), skipped])
    assert main(["show", str(tmp_path / "a.json")]) == 0
    shown = capsys.readouterr().out
    assert "WRONG: 1 of 9 tensors" in shown
    assert "not run: no GPU" in shown
    assert main(["show", "--markdown", str(tmp_path / "a.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "### Local files in the page cache (`local-warm`, 1.0 GB)"
    assert lines[4:7] == [
        "| drain | limit | 2.00 | 2.00 | 2.00 | 0.50 | 1.00 | 4.00 | 0 |",
        "| drain | **streamload** | 1.50 | 1.50 | 1.50 | 0.67 | 1.33 | 3.00 | 0 |",
        "| drain | runai | 3.00 | 2.00 | 4.00 | 0.33 | 0.67 | 6.00 | 0 |",
    ]
    assert lines[8] == "safetensors: WRONG: 1 of 9 tensors; obstore: not run: no files."
    assert lines[-1] == "Not run: no GPU."


def test_runs_with_an_error_do_not_count() -> None:
    found = runs("streamload", 1.0, 2.0)
    found[1] = replace(found[1], error="verified 9 of 10 bytes: not counted")
    result = summarized(found).results[0]
    assert (result.seconds, result.reason) == ([2.0], "verified 9 of 10 bytes: not counted")


@pytest.mark.parametrize("number", [1, 2])
def test_files_come_back_as_they_were_written(tmp_path: Path, number: int) -> None:
    reports = [summarized(runs("limit", 1.0), runs("streamload", 2.0))] * number
    results.write(tmp_path / "a.json", reports)
    assert results.read(tmp_path / "a.json") == reports


def test_compare_tells_change_from_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = summarized(runs("limit", 1.0, 1.2, 1.1), runs("streamload", 4.0, 5.0, 4.5), runs("runai", 9.0))
    new = summarized(runs("limit", 1.1, 1.3, 1.2), runs("streamload", 2.0, 2.5, 2.2), runs("safetensors", 1.0))
    limit, ours, runai, peer, safetensors = results.compare([old], [new])
    assert (limit.loader, limit.beyond_noise) == ("limit", False)
    assert (ours.loader, ours.beyond_noise) == ("streamload", True)
    assert ours.speed == pytest.approx(4.5 / 2.2)
    assert (runai.loader, runai.new, runai.speed) == ("runai", None, None)
    assert (peer.loader, peer.speed) == ("obstore", None)
    assert (safetensors.loader, safetensors.old) == ("safetensors", None)
    results.write(tmp_path / "old.json", [old])
    results.write(tmp_path / "new.json", [new])
    assert main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 0
    printed = capsys.readouterr().out
    assert "within the noise" in printed
    assert "faster" in printed
    assert "only in the old one" in printed


def test_plot_writes_a_png(tmp_path: Path) -> None:
    reports = [
        summarized(runs("limit", 1.0), runs("streamload", 2.0, 3.0), runs("streamload", 4.0, destination="params"))
    ]
    results.write(tmp_path / "a.json", [*reports, Report("gpu-local", 1, {}, [], skipped="there is no GPU")])
    assert main(["plot", str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("seconds", [0.0031, 0.7, 4.438, 12.204])
def test_plot_of_a_single_round(tmp_path: Path, seconds: float) -> None:
    """Median, least and most are one number, which rounding must not make three."""
    results.write(tmp_path / "a.json", [summarized(runs("limit", 1.0), runs("streamload", seconds))])
    assert main(["plot", str(tmp_path / "a.json")]) == 0


def test_nothing_to_plot_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(tmp_path / "a.json", [Report("gpu-local", 1, {}, [], skipped="there is no GPU")])
    assert main(["plot", str(tmp_path / "a.json")]) == 1
    assert "no loader has a counted run" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[1]", '{"scenario": 1, "size_bytes": 2, "machine": {}, "results": [{}]}', "x"])
def test_what_are_no_results_is_said(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(text)
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 1
    assert capsys.readouterr().err.startswith("bench: ")


def test_list_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("local-warm", "s3-capped", "gpu-s3", "instanttensor"))
