"""``--rank`` and its kin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.models import shard
from tests.cli.programs import Program

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64}
SHAPES = {
    "model.embed_tokens.weight": ("BF16", (96, 64)),
    "model.layers.0.self_attn.o_proj.weight": ("BF16", (64, 64)),
    "model.layers.1.mlp.up_proj.weight": ("BF16", (80, 64)),
    "model.norm.weight": ("F32", (64,)),
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(shard(SHAPES))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_inspect_shows_each_rank_and_all_of_them(cli: Program, llama: Path) -> None:
    found = cli("inspect", llama, "--rank", "1", "--world-size", "4", "--plan")
    assert (found.code, found.err) == (0, "")
    rows = [line.split() for line in found.out.splitlines()]
    assert ["model.layers.0.self_attn.o_proj.weight", "BF16", "[64,", "16]", "2.0", "KiB"] in rows
    assert ["rank", "reads", "keeps", "asks", "for", "amplification"] in rows
    assert [row[0] for row in rows[-5:]] == ["0", "1", "2", "3", "all"]
    whole = cli("inspect", llama, "--plan")
    assert "amplification" not in whole.out


def test_inspect_as_json(cli: Program, llama: Path) -> None:
    found = cli("inspect", llama, "--rank", "1", "--world-size", "4", "--plan", "--json")
    plan = json.loads(found.out)["plan"]
    kept = 96 * 64 * 2 // 4 + 64 * 64 * 2 // 4 + 80 * 64 * 2 // 4 + 64 * 4
    assert plan["ranks"][1]["bytes"] == plan["bytes"] == kept
    assert plan["all_ranks"]["bytes"] == 4 * kept
    assert plan["fetched_bytes"] == plan["bytes"] + plan["gap_bytes"]
    assert plan["read_amplification"] == plan["fetched_bytes"] / plan["bytes"]


@pytest.mark.torch
def test_load_takes_the_ranks_share(cli: Program, llama: Path) -> None:
    found = cli("load", llama, "--rank", "3", "--world-size", "4", "--json", "--quiet")
    report = json.loads(found.out)
    assert report["tensors"] == 4
    assert report["nbytes"] == 96 * 64 * 2 // 4 + 64 * 64 * 2 // 4 + 80 * 64 * 2 // 4 + 64 * 4
    stage = cli("load", llama, "--rank", "3", "--world-size", "4", "--pp-size", "2", "--json", "--quiet")
    assert json.loads(stage.out)["tensors"] == 3


def test_a_plan_from_a_file(cli: Program, llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers.*.mlp.up_proj": "rowwise"}))
    found = cli("inspect", llama, "--rank", "0", "--world-size", "2", "--tp-plan", plan, "--json")
    shapes = {tensor["name"]: tensor["shape"] for tensor in json.loads(found.out)["files"][0]["tensors"]}
    assert shapes["model.layers.1.mlp.up_proj.weight"] == [80, 32]
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == [64, 64]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rank", "1"], "rank=1 is given without world_size"),
        (["--rank", "four", "--world-size", "4"], "'four' is neither a number nor auto"),
        (["--rank", "0", "--world-size", "3"], "cannot be shared out equally to 3 ranks"),
        (["--rank", "0", "--world-size", "2", "--tp-plan", "/nowhere"], "/nowhere: No such file or directory"),
        (["--rank", "auto"], "RANK, which is not set"),
    ],
)
def test_wrong_use(cli: Program, llama: Path, given: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    found = cli("inspect", llama, *given)
    assert (found.code, found.out) == (2, "")
    assert message in found.err
