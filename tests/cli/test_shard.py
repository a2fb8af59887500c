"""``streamload shard``."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from streamload.save.journal import JOURNAL_NAME
from tests.cli.models import shard
from tests.cli.programs import TIMEOUT_S, Program, program
from tests.cli.test_ranks import CONFIG, SHAPES

NBYTES = 96 * 64 * 2 + 64 * 64 * 2 + 80 * 64 * 2 + 64 * 4


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(shard(SHAPES))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_conversion_its_result_and_what_comes_of_it(cli: Program, llama: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    done = cli("shard", llama, made, "--tp", 4, "--quiet")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == f"{llama} -> {made}: 4 ranks"
    assert lines[1].startswith("  written        4 files, ")
    assert lines[1].endswith(", 1 other file copied")
    assert lines[2].startswith("  read           4 tensors, 30.2 KiB in ")
    assert lines[3].startswith("  not verified   30.2 KiB: the source keeps no checksum")
    assert cli("verify", made, "--quiet").code == 0
    shown = cli("inspect", made, "--rank", 3, "--world-size", 4, "--json").json
    assert [tensor["shape"] for tensor in shown["files"][0]["tensors"]] == [[64], [24, 64], [64, 16], [20, 64]]
    again = cli("shard", llama, made, "--tp", 4, "--quiet")
    assert again.out.splitlines()[3] == "  done before    all of it"


def test_as_json_with_all_options(cli: Program, llama: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    options = ("--max-file-bytes", "8KiB", "--memory-bytes", "8MiB", "--verify", "auto", "--exclude", "*.norm.*")
    done = cli("shard", llama, made, "--tp", 2, "--pp", 2, *options, "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert found["nbytes"] == NBYTES - 64 * 4
    assert (found["ranks"], found["tensors"], found["resumed_bytes"]) == (4, 3, 0)
    assert sorted(found["files"]) == sorted(path.name for path in made.glob("*.safetensors"))
    assert found["files"][0] == "model-pp-0-tp-0-part-0.safetensors"
    assert found["written_bytes"] == sum(path.stat().st_size for path in made.glob("*.safetensors"))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers.*.mlp.up_proj": "colwise", "layers.*.self_attn.o_proj": "rowwise"}))
    done = cli("shard", llama, tmp_path / "planned", "--tp", 2, "--tp-plan", plan, "--pattern", "r{rank}.safetensors")
    assert done.code == 0
    assert (tmp_path / "planned" / "r1.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (("--tp", "0"), 2, "tp=0 is not a whole number of at least 1"),
        (("--tp", "5"), 2, "cannot be shared out"),
        (("--tp", "2", "--pattern", "r{part}.safetensors"), 2, "cannot tell ranks apart"),
        (("--tp", "4"), 1, "files of another checkpoint"),
    ],
)
def test_wrong_use(
    cli: Program, llama: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, cause: str
) -> None:
    made = tmp_path / "made"
    if code == 1:
        made.mkdir()
        (made / "model-rank-5-part-0.safetensors").write_bytes(b"somebody else's")
    failed = cli("shard", llama, made, *arguments, "--quiet")
    assert failed.code == code
    assert cause in failed.error
    assert failed.out == ""


def test_one_that_is_stopped_says_so_and_goes_on(cli: Program, llama: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    large = {name: (dtype, (*shape[:-1], shape[-1] * 256)) for name, (dtype, shape) in SHAPES.items()}
    (llama / "model.safetensors").write_bytes(shard(large))
    # It takes half a minute, and is under way when the file is there that is written first.
    with program("shard", llama, made, "--tp", 2, "--max-bytes-per-s", "256KiB", "--quiet") as process:
        while not (made / ".model-rank-0-part-0.safetensors.streamload-unfinished").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (143, "")
    assert err == "streamload: stopped by SIGTERM\n"
    assert not list(made.glob("*.safetensors"))
    assert cli("shard", llama, made, "--tp", 2, "--quiet").code == 0
    assert sorted(path.name for path in made.iterdir()) == sorted(
        [
            JOURNAL_NAME,
            "config.json",
            *(f"model-rank-{rank}-part-0.safetensors" for rank in range(2)),
            *(f"streamload-manifest-model-rank-{rank}-part-all.json" for rank in range(2)),
        ]
    )
