"""Pre-sharded checkpoints: each rank gets its own files, from disk and from S3 alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

import streamload
from streamload.errors import CheckpointError, OptionError
from tests.checkpoints import same_tensor
from tests.servers import S3Bucket


def ranked(rank: int, parts: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    return [
        {f"{part}.{at}": torch.randn(40, 30, generator=generator) for at in range(3)}
        | {f"{part}.rank": torch.tensor(rank)}
        for part in range(parts)
    ]


def presharded(ranks: int, pattern: str) -> dict[str, bytes]:
    return {
        pattern.format(rank=rank, tp_rank=rank, pp_rank=0, part=part): save(tensors)
        for rank in range(ranks)
        for part, tensors in enumerate(ranked(rank))
    }


def whole(rank: int) -> dict[str, torch.Tensor]:
    return {name: tensor for part in ranked(rank) for name, tensor in part.items()}


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_tensor(found[name], tensor), name


def check_rank(uri: str | Path, rank: int, **options: Any) -> None:
    expected = whole(rank)
    into = {name: torch.full_like(tensor, -1) for name, tensor in expected.items()}
    report = streamload.load_into(into, uri, rank=rank, **options)
    check(into, expected)
    assert report.files == 3
    check(streamload.load(uri, rank=rank, **options), expected)
    assert streamload.inspect(uri, rank=rank, **options).plan.tensor_bytes == report.nbytes


@pytest.mark.parametrize("pattern", [None, "mine.{{tp}}{tp_rank}.of12.{part}.safetensors"])
def test_each_rank_gets_its_own_files_from_disk(tmp_path: Path, pattern: str | None) -> None:
    for name, content in presharded(12, pattern or "model-rank-{rank}-part-{part}.safetensors").items():
        (tmp_path / name).write_bytes(content)
    for rank in (0, 1, 11):
        check_rank(tmp_path, rank, world_size=12, pattern=pattern)
    with pytest.raises(CheckpointError, match="made for more than 4 ranks"):
        streamload.load(tmp_path, rank=1, world_size=4, pattern=pattern)
    with pytest.raises(CheckpointError, match=r"no file is called 'mine-13\.safetensors'"):
        streamload.load(tmp_path, rank=13, world_size=14, pattern="mine-{rank}.safetensors")


def test_each_rank_gets_its_own_files_from_s3_page_by_page(s3_bucket: S3Bucket) -> None:
    # A page lists a thousand objects, and these come before the ranks' files.
    for at in range(1001):
        s3_bucket.put(f"model/log-{at}.txt", b"")
    for name, content in presharded(12, "model-rank-{rank}-part-{part}.safetensors").items():
        s3_bucket.put(f"model/{name}", content)
    for rank in (1, 11):
        check_rank(f"s3://{s3_bucket.name}/model", rank, world_size=12)


def test_pre_sharded_wins_where_a_rank_is_given(tmp_path: Path) -> None:
    for name, content in presharded(2, "model-rank-{rank}-part-{part}.safetensors").items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="give rank and world_size"):
        streamload.load(tmp_path)
    save_file({"ordinary": torch.ones(3)}, tmp_path / "model.safetensors")
    check_rank(tmp_path, 1, world_size=2)
    check(streamload.load(tmp_path), {"ordinary": torch.ones(3)})


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"rank": -1, "world_size": 2}, "rank=-1 is not a whole number from 0 to 1"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not a whole number from 0 to 1"),
        ({"rank": True, "world_size": 2}, "rank=True is not"),
        ({"rank": 0}, "rank=0 is given without world_size"),
        ({"rank": 0, "world_size": 0}, "world_size=0 is not a whole number of at least 1"),
        ({"pattern": "{rank}.safetensors"}, "pattern is given without a rank"),
        ({"rank": 0, "world_size": 2, "pattern": "{part}.safetensors"}, "cannot tell ranks apart"),
        ({"rank": 0, "world_size": 4, "pp_size": 2, "pattern": "{tp_rank}.safetensors"}, "it needs {pp_rank}"),
        ({"rank": 0, "world_size": 2, "pattern": 3}, "pattern=3 is not the name of a file"),
        ({"rank": "auto"}, "rank='auto' takes rank from RANK, which is not set"),
    ],
)
def test_options_without_meaning_are_refused(
    options: dict[str, Any], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(OptionError) as caught:
        streamload.load("nowhere", **options)
    assert cause in caught.value.cause


def test_the_rank_may_be_what_torchrun_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in presharded(2, "model-rank-{rank}-part-{part}.safetensors").items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(streamload.load(tmp_path, rank="auto"), whole(1))
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(OptionError, match="rank=1 is not a whole number from 0 to 0"):
        streamload.load(tmp_path, rank="auto")


def test_one_part_by_its_own_name(tmp_path: Path) -> None:
    streamload.save_sharded({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path, max_file_bytes=8)
    part = tmp_path / "model-rank-0-part-1.safetensors"
    assert set(streamload.load(part)) == {"b"}
    (tmp_path / "model-rank-0-part-0.safetensors").unlink()
    assert set(streamload.load(part)) == {"b"}
    with pytest.raises(CheckpointError, match="part 0 of rank 0 is missing"):
        streamload.load(tmp_path)
