"""``streamload inspect``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from streamload.cli.tables import table
from tests.cli.models import FIRST, INDEX, SECOND, shard
from tests.cli.programs import TIMEOUT_S, Program, program


class TestText:
    def test_files_tensors_and_totals(self, cli: Program, model: Path) -> None:
        found = cli("inspect", model)
        assert (found.code, found.err) == (0, "")
        lines = found.out.splitlines()
        assert lines[0] == f"{model}: 2 files, 5 tensors, 40.1 KiB (3 requests to find out)"
        assert any(line.startswith(f"{FIRST}: ") and line.endswith("2 tensors") for line in lines)
        rows = [line.split() for line in lines]
        assert ["model.embed.weight", "BF16", "[100,", "100]", "19.5", "KiB"] in rows
        assert ["model.norm.weight", "F32", "[5]", "20", "B"] in rows
        assert ["BF16", "3", "39.1", "KiB"] in rows
        assert ["U8", "1", "1000", "B"] in rows
        assert "plan" not in found.out

    def test_the_plan(self, cli: Program, model: Path) -> None:
        found = cli("inspect", model, "--plan", "--read-bytes", "8KiB", "--concurrency", "3")
        assert "reads of at most 8.0 KiB, 3 in flight; 40.1 KiB of tensors and 0 B of gaps" in found.out
        rows = [" ".join(line.split()) for line in found.out.splitlines()]
        parts = [row for row in rows if ", part " in row]
        assert [row.partition("B model")[2] for row in parts[:3]] == [
            f".embed.weight, part {number} of 3" for number in (1, 2, 3)
        ]
        # Reads of one file come one after the other: each begins where the one before ended.
        starts_and_ends = [tuple(map(int, row.split()[:2])) for row in parts[:3]]
        assert starts_and_ends[0][1] == starts_and_ends[1][0]
        assert starts_and_ends[1][1] == starts_and_ends[2][0]

    def test_the_plan_of_little_memory(self, cli: Program, model: Path) -> None:
        found = cli("inspect", model, "--json", "--plan", "--memory-bytes", "1MiB")
        assert (found.code, found.json["plan"]["read_bytes"]) == (0, 1 << 18)

    def test_neighbours_in_one_read(self, cli: Program, model: Path) -> None:
        assert "2: model.embed.weight to model.norm.weight" in cli("inspect", model, "--plan").out

    def test_long_names_are_whole_where_there_is_no_terminal(self, cli: Program, tmp_path: Path) -> None:
        name = "model." + "very." * 60 + "weight"
        (tmp_path / "a.safetensors").write_bytes(shard({name: ("F32", (1,))}))
        assert sum(name in line for line in cli("inspect", tmp_path, "--plan").out.splitlines()) == 2

    def test_names_cannot_drive_the_terminal(self, cli: Program, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(shard({"evil\x1b[2J\x00\nname ü": ("F32", (1,))}))
        assert r"evil\x1b[2J\x00\nname ü" in cli("inspect", tmp_path).out

    def test_a_terminal_that_cannot_show_a_name(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(shard({"gewicht_ü": ("F32", (1,))}))
        with program("inspect", tmp_path, environment={"PYTHONIOENCODING": "ascii"}) as process:
            out, err = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, err) == (0, "")
        assert r"gewicht_\xfc" in out

    def test_a_file_without_tensors(self, cli: Program, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(shard({}))
        found = cli("inspect", tmp_path, "--plan")
        assert (found.code, found.err) == (0, "")
        assert "1 file, 0 tensors, 0 B" in found.out


class TestJson:
    def test_everything(self, cli: Program, model: Path) -> None:
        found = cli("inspect", model, "--json")
        assert (found.code, found.err) == (0, "")
        assert found.json["uri"] == str(model)
        assert (found.json["tensors"], found.json["bytes"]) == (5, 41020)
        assert [file["name"] for file in found.json["files"]] == [FIRST, SECOND]
        assert found.json["dtypes"]["BF16"] == {"tensors": 3, "bytes": 40000}
        assert "plan" not in found.json

    def test_a_failure_is_an_object_too(self, cli: Program, model: Path) -> None:
        (model / SECOND).unlink()
        found = cli("inspect", model, "--json")
        assert found.code == 1
        assert found.json["error"] == found.error
        assert found.json["kind"] == "IndexFileError"
        assert (found.json["uri"], found.json["object"]) == (str(model), INDEX)
        assert found.json["cause"] in found.error

    @pytest.mark.parametrize(
        "given",
        [("inspect", "ftp://b/x"), ("doctor", "ftp://b/x"), ("load", "ftp://b/x"), ("load", ".", "--trace", "/")],
    )
    def test_wrong_use_is_an_object_too(self, cli: Program, given: tuple[str, ...]) -> None:
        found = cli(*given, "--json")
        assert (found.code, found.json["kind"], found.json["error"]) == (2, "OptionError", found.error)

    def test_the_plan_covers_every_byte_once(self, cli: Program, model: Path) -> None:
        found = cli("inspect", model, "--json", "--plan", "--read-bytes", "4096").json
        assert found["plan"]["read_bytes"] == 4096
        for file in found["files"]:
            reads = [read for read in found["plan"]["reads"] if read["file"] == file["name"]]
            assert reads[0]["start"] == file["header_bytes"]
            assert [read["end"] for read in reads[:-1]] == [read["start"] for read in reads[1:]]
            assert reads[-1]["end"] == file["bytes"]

    def test_include_and_exclude(self, cli: Program, model: Path) -> None:
        globs = ("--include", "*.weight", "*.mask", "--include", "none.*", "--exclude", "model.up.*")
        assert cli("inspect", model, "--json", *globs).code == 2  # nothing is called none.*
        globs = ("--include", "*.weight", "--include", "*.mask", "--exclude", "model.up.*", "*.norm.*")
        found = cli("inspect", model, "--json", *globs).json
        names = [tensor["name"] for file in found["files"] for tensor in file["tensors"]]
        assert names == ["model.embed.weight", "model.down.weight", "model.mask"]


class TestProgram:
    def test_needs_no_torch(self, model: Path) -> None:
        code = "import sys; sys.modules['torch'] = None; from streamload.cli import main; sys.exit(main())"
        with program("inspect", model, "--json", python=("-c", code)) as process:
            out, err = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, err) == (0, "")
        assert json.loads(out)["tensors"] == 5

    def test_a_reader_that_has_gone_away(self, model: Path) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as stdout, program("inspect", model, stdout=stdout) as process:
            _, err = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, err) == (0, "")

    def test_help_for_a_reader_that_has_gone_away(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as stdout, program("--help", stdout=stdout) as process:
            _, err = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, err) == (0, "")

    def test_no_room_for_the_result(self, model: Path) -> None:
        with open("/dev/full", "w") as stdout, program("inspect", model, stdout=stdout) as process:
            _, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 1
        assert err == "streamload: error: stdout cannot be written to: No space left on device\n"


class TestTable:
    _ROWS = (("model.layers.0.self_attn.q_proj.weight", "BF16", "1.0 MiB"), ("b", "F32", "12.0 MiB"))

    def test_columns_are_as_wide_as_they_need_to_be(self) -> None:
        assert table(("tensor", "dtype", "size"), self._ROWS, right=(2,), indent="  ").splitlines() == [
            "  tensor                                  dtype      size",
            "  model.layers.0.self_attn.q_proj.weight  BF16    1.0 MiB",
            "  b                                       F32    12.0 MiB",
        ]

    def test_a_narrow_terminal_folds_names_and_loses_nothing(self) -> None:
        assert table(("tensor", "dtype", "size"), self._ROWS, right=(2,), indent="  ", width=39).splitlines() == [
            "  tensor                dtype      size",
            "  model.layers.0.self_  BF16    1.0 MiB",
            "  attn.q_proj.weight",
            "  b                     F32    12.0 MiB",
        ]

    @pytest.mark.parametrize("width", [1, 40, 60, 79, 80, 200])
    @pytest.mark.parametrize("fold", [0, 2])
    def test_fits_wherever_that_is_possible(self, width: int, fold: int) -> None:
        lines = table(("a", "b", "c"), [("x" * 50, "BF16", "y" * 50)], fold=fold, indent="  ", width=width).splitlines()
        least = len("  ") + 20 + len("  ") + len("BF16") + len("  ") + 50
        assert max(map(len, lines)) <= max(width, least)
        assert ("".join(lines).count("x"), "".join(lines).count("y")) == (50, 50)

    def test_no_rows(self) -> None:
        assert table(("a", "b"), ()) == "a  b"
