"""Ranks that load their slices: equal to what torch cuts, no byte twice, from disk, memory and S3."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streamload
from streamload import Absent, Experts, PackedShard, Placement, Placements, Ranks, Replicate, Shard
from streamload.errors import (
    CheckpointError,
    ChecksumError,
    MemoryLimitError,
    MismatchError,
    NotFoundError,
    OptionError,
)
from streamload.pipeline.verify import BY_MANIFEST, NOT_WHOLE, SLICED
from streamload.sources.local import LocalSource
from streamload.sources.memory import MemorySource
from streamload.sources.s3 import S3Source
from tests.checkpoints import same_tensor, write_sharded
from tests.servers import S3Bucket

MIB = 1 << 20
WORLD = 4
HIDDEN, INNER, VOCABULARY, LAYERS, HEADS, KEY_VALUE_HEADS = 512, 768, 1000, 3, 8, 2
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
}


def llama() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = HIDDEN * KEY_VALUE_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm": (HIDDEN,),
            f"{name}.post_attention_layernorm": (HIDDEN,),
            f"{name}.self_attn.q_proj": (HIDDEN, HIDDEN),
            f"{name}.self_attn.k_proj": (heads, HIDDEN),
            f"{name}.self_attn.v_proj": (heads, HIDDEN),
            f"{name}.self_attn.o_proj": (HIDDEN, HIDDEN),
            f"{name}.mlp.gate_proj": (INNER, HIDDEN),
            f"{name}.mlp.up_proj": (INNER, HIDDEN),
            f"{name}.mlp.down_proj": (HIDDEN, INNER),
        }
    return {
        f"{name}.weight": torch.randn(*shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()
    }


def expected_of(tensors: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """What torch cuts."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            found[name] = tensor
        elif "o_proj" in name or "down_proj" in name:
            found[name] = tensor.chunk(WORLD, 1)[rank]
        elif "k_proj" in name or "v_proj" in name:
            found[name] = tensor.chunk(KEY_VALUE_HEADS)[rank * KEY_VALUE_HEADS // WORLD]
        else:
            found[name] = tensor.chunk(WORLD)[rank]
    return found


def check(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].is_contiguous()
        assert same_tensor(found[name], tensor.contiguous()), name


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return llama()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> Path:
    folder = write_sharded(tmp_path_factory.mktemp("ranks"), tensors, files=2)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """The same objects from a source that is neither a file nor a server."""
    objects = {file.name: file.read_bytes() for file in folder.iterdir()}

    def make(uri: str, **_: object) -> MemorySource:
        return MemorySource(objects, uri=uri)

    monkeypatch.setattr("streamload.planning.open_source", make)
    return "memory://ranks"


@pytest.mark.parametrize("memory_bytes", [MIB, 64 * MIB])
@pytest.mark.parametrize("rank", range(WORLD))
def test_each_rank_gets_what_torch_cuts(
    folder: Path, tensors: dict[str, torch.Tensor], rank: int, memory_bytes: int
) -> None:
    with streamload.stream(folder, rank=rank, world_size=WORLD, memory_bytes=memory_bytes) as stream:
        shapes = {tensor.name: tensor.shape for file in stream.catalog.files for tensor in file.tensors}
        found = dict(stream)
    check(found, expected_of(tensors, rank))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in found.items()}
    report = stream.report
    assert report.total_bytes == report.nbytes == sum(tensor.nbytes for tensor in found.values())
    assert report.unverified
    assert not report.verified
    if memory_bytes == MIB:
        assert report.raised_memory_bytes is None


@pytest.mark.parametrize("rank", [0, 3])
def test_from_memory(in_memory: str, tensors: dict[str, torch.Tensor], rank: int) -> None:
    check(streamload.load(in_memory, rank=rank, world_size=WORLD), expected_of(tensors, rank))


@pytest.mark.parametrize("rank", [1, 2])
def test_from_s3(
    s3_bucket: S3Bucket, folder: Path, tensors: dict[str, torch.Tensor], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As large in proportion to these tensors as the real one is to a large model's.
    monkeypatch.setattr(S3Source, "request_cost_bytes", 4096)
    for file in folder.iterdir():
        s3_bucket.put(f"llama/{file.name}", file.read_bytes())
    uri = f"{s3_bucket.uri}/llama"
    with streamload.stream(uri, rank=rank, world_size=WORLD) as stream:
        check(dict(stream), expected_of(tensors, rank))
    report = stream.report
    assert sorted(report.unverified) == [NOT_WHOLE, SLICED]
    # Row-parallel tensors are read whole, but for the ends; of the others, the slices and nothing else.
    rows = sum(tensor.nbytes for name, tensor in tensors.items() if "o_proj" in name or "down_proj" in name)
    sliced = sum(
        tensor.nbytes
        for name, tensor in expected_of(tensors, rank).items()
        if not ("o_proj" in name or "down_proj" in name)
    )
    fetched = report.fetched_bytes - report.header_bytes
    assert sliced < fetched <= sliced + rows + 20 * 4096
    assert report.read_amplification == report.fetched_bytes / report.nbytes > 1.2


@pytest.mark.parametrize("memory_bytes", [MIB, 64 * MIB])
@pytest.mark.parametrize("rank", [0, 3])
def test_slices_go_straight_into_a_model(
    folder: Path, tensors: dict[str, torch.Tensor], rank: int, memory_bytes: int
) -> None:
    expected = expected_of(tensors, rank)
    into = {
        name: torch.full_like(tensor, 7, memory_format=torch.contiguous_format) for name, tensor in expected.items()
    }
    into["model.norm.weight"] = torch.zeros(2 * HIDDEN, dtype=torch.bfloat16)[::2]
    report = streamload.load_into(into, folder, rank=rank, world_size=WORLD, memory_bytes=memory_bytes)
    check({name: tensor.contiguous() for name, tensor in into.items()}, expected)
    assert report.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert report.peak_staged_bytes <= memory_bytes
    assert report.raised_memory_bytes is None


def test_slices_go_into_a_model_from_a_source_that_passes_over_nothing(
    in_memory: str, tensors: dict[str, torch.Tensor]
) -> None:
    expected = expected_of(tensors, 2)
    into = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in expected.items()}
    with pytest.raises(MismatchError, match="cast=True converts it"):
        streamload.load_into(into, in_memory, rank=2, world_size=WORLD)
    streamload.load_into(into, in_memory, rank=2, world_size=WORLD, cast=True)
    check(into, {name: tensor.double() for name, tensor in expected.items()})
    direct = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in expected.items()}
    streamload.load_into(direct, in_memory, rank=2, world_size=WORLD)
    check(direct, expected)


def test_a_model_of_another_stage_is_told_from_a_checkpoint_that_lacks_something(folder: Path) -> None:
    into = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(HIDDEN, HIDDEN), "lost": torch.zeros(2)}
    with pytest.raises(MismatchError) as caught:
        streamload.load_into(into, folder, rank=2, world_size=3, pp_size=3, ignore_unexpected=True)
    assert caught.value.cause == (
        "1 name ['lost'] of the model missing from the checkpoint; "
        "1 name ['model.layers.0.self_attn.q_proj.weight'] of the model not among this rank's"
    )
    assert caught.value.missing == ("model.layers.0.self_attn.q_proj.weight", "lost")


def test_a_model_that_is_not_made_for_as_many_ranks_is_refused(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A slice in a corner of a whole parameter would be taken for a padded one."""
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with pytest.raises(
        MismatchError, match=r"of shape \[1000, 512\] is shared out, and this rank's part of shape"
    ) as caught:
        streamload.load_into(into, folder, rank=0, world_size=WORLD)
    assert "make the model for as many ranks" in str(caught.value)
    assert not any(bool(tensor.any()) for tensor in into.values())


def test_a_plan_for_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="no tensor is called as the tp_plan says: its first name is 'decoder"):
        streamload.load(folder, rank=0, world_size=WORLD, placements={"decoder.*.dense": "colwise"})


def test_blocks_of_a_slice_that_is_one_range_are_verified_by_a_manifest(tmp_path: Path) -> None:
    columns = torch.randn(4096, 1024)  # 16 MiB: a rank's slice has four whole blocks of the manifest
    save_file({"q_proj": columns, "o_proj": torch.randn(512, 512)}, tmp_path / "model.safetensors")
    streamload.write_manifest(tmp_path)
    rules = {"q_proj": Shard(0), "o_proj": Shard(1)}
    with streamload.stream(tmp_path, rank=1, world_size=WORLD, placements=rules) as stream:
        assert torch.equal(dict(stream)["q_proj"], columns.chunk(WORLD)[1])
    report = stream.report
    assert report.verified == {BY_MANIFEST: columns.nbytes // WORLD}
    assert report.unverified == {SLICED: 512 * 512 * 4 // WORLD}
    with pytest.raises(ChecksumError, match=r"verify is 'require', and nothing vouches for 262144 bytes: slices"):
        streamload.load(tmp_path, rank=1, world_size=WORLD, placements=rules, verify="require")

    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-columns.nbytes + columns.nbytes // WORLD] ^= 1  # the first byte of rank 1's
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ChecksumError, match=r"block 5 of 16 of tensor 'q_proj'"):
        streamload.load(tmp_path, rank=1, world_size=WORLD, placements=rules)
    streamload.load(tmp_path, rank=0, world_size=WORLD, placements=rules)


def test_what_is_passed_over_is_not_asked_for(tmp_path: Path) -> None:
    tensor = torch.arange(512 * 12_000, dtype=torch.float32).reshape(512, 12_000)
    save_file({"o_proj": tensor}, tmp_path / "model.safetensors")
    for rank in range(4):
        with streamload.stream(
            tmp_path, rank=rank, world_size=4, placements={"*": Shard(1)}, memory_bytes=64 * MIB
        ) as stream:
            ((_, found),) = stream
        assert torch.equal(found, tensor.chunk(4, 1)[rank])
        report = stream.report
        assert report.fetched_bytes - report.header_bytes == report.nbytes
        assert report.requests >= 512, "a call to the kernel for each row"
        assert report.reads == 3


def test_all_placements_and_both_rules_for_what_does_not_divide(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "a.packed": torch.randn(12, 2 * 15, 40, generator=generator),
        "b.experts": torch.randn(8, 20, 300, generator=generator).to(torch.float16),
        "c.owned": torch.randn(8, 20, 300, generator=generator),
        "d.uneven": torch.randn(7, 11, generator=generator),
        "e.gone": torch.randn(10, generator=generator),
        "f.whole": torch.randn(5, generator=generator),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    rules: dict[str, Placement] = {
        "a.*": PackedShard(-2, (15, 15)),
        "b.*": Experts(),
        "c.*": Experts((6, 1, 2), Shard(-1)),
        "d.*": Shard(-1),
        "e.*": Absent(),
        "*": Replicate(),
    }
    ranks = Ranks(tp_rank=2, tp_size=3, ep_rank=1, ep_size=4)
    found = streamload.load(tmp_path, rank=ranks, placements=rules, uneven="ceil")
    check(
        found,
        {
            "a.packed": torch.cat([half.chunk(3, 1)[2] for half in tensors["a.packed"].chunk(2, 1)], 1),
            "b.experts": tensors["b.experts"][2:4],
            "c.owned": tensors["c.owned"][[6, 1, 2]].chunk(3, -1)[2],
            "d.uneven": tensors["d.uneven"].chunk(3, -1)[2],
            "f.whole": tensors["f.whole"],
        },
    )
    with pytest.raises(OptionError, match=r"'d.uneven' of shape \[7, 11\]: 11 cannot be shared out equally"):
        streamload.load(tmp_path, rank=ranks, placements=rules)


def test_pipeline_stages_share_the_layers_and_tensors_within(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    every = [streamload.load(folder, rank=rank, world_size=4, pp_size=2) for rank in range(4)]
    assert every[0].keys() == every[1].keys()
    assert not every[0].keys() & every[2].keys()
    assert every[0].keys() | every[2].keys() == tensors.keys()
    assert "model.embed_tokens.weight" in every[0]
    assert {"model.norm.weight", "lm_head.weight", "model.layers.2.mlp.up_proj.weight"} < every[2].keys()
    assert torch.equal(every[3]["lm_head.weight"], tensors["lm_head.weight"].chunk(2)[1])


def test_a_tied_embedding_is_on_the_last_stage_too(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tied = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    write_sharded(tmp_path, tied, files=1)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    stages = [streamload.load(tmp_path, rank=rank, world_size=3, pp_size=3) for rank in range(3)]
    assert ["model.embed_tokens.weight" in stage for stage in stages] == [True, False, True]


@pytest.mark.parametrize("placements", ["auto", {"layers.*.mlp.gate_proj": "colwise"}])
def test_a_selection_is_sliced(folder: Path, tensors: dict[str, torch.Tensor], placements: Any) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    found = streamload.load(folder, rank=1, world_size=2, include=[name], placements=placements)
    check(found, {name: tensors[name].chunk(2)[1]})


def test_an_object_that_is_read_whole_is_verified(in_memory: str, tensors: dict[str, torch.Tensor]) -> None:
    with streamload.stream(in_memory, rank=0, world_size=2, placements={"*": Replicate()}) as stream:
        check(dict(stream), tensors)
    assert sum(stream.report.verified.values()) == stream.report.total_bytes


def test_what_auto_cannot_know(folder: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_sharded(tmp_path, {"model.layers.0.self_attn.strange_proj.weight": torch.zeros(4)}, files=1)
    with pytest.raises(CheckpointError, match=r"there is none beside the weights") as raised:
        streamload.load(tmp_path, rank=0, world_size=2)
    assert isinstance(raised.value.__cause__, NotFoundError)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        streamload.load(tmp_path, rank=0, world_size=2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(OptionError, match="'mamba'"):
        streamload.load(tmp_path, rank=0, world_size=2)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(OptionError, match=r"'model\.layers\.0\.self_attn\.strange_proj\.weight'"):
        streamload.load(tmp_path, rank=0, world_size=2)


def test_a_strict_limit_counts_what_is_kept_and_not_the_whole(tmp_path: Path) -> None:
    save_file({"large": torch.zeros(1024, 1024)}, tmp_path / "model.safetensors")
    options: Any = {"placements": {"*": Shard(1)}, "memory_bytes": 2 * MIB, "strict_memory": True}
    assert streamload.load(tmp_path, rank=0, world_size=4, **options)["large"].shape == (1024, 256)
    with pytest.raises(MemoryLimitError):
        streamload.load(tmp_path, rank=0, world_size=1, **options)


def test_inspection_sums_up_the_ranks(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = streamload.inspect(folder, rank=1, world_size=WORLD)
    assert len(found.ranks) == WORLD
    assert found.ranks[1].nbytes == found.plan.tensor_bytes
    assert found.ranks[1].fetched_bytes == found.plan.tensor_bytes + found.plan.gap_bytes
    heads = sum(tensor.nbytes for name, tensor in tensors.items() if "k_proj" in name or "v_proj" in name)
    norms = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("norm.weight"))
    # Every rank has the norms, and each key and value head is on two.
    assert found.all_ranks.nbytes == sum(tensor.nbytes for tensor in tensors.values()) + heads + 3 * norms
    described = found.to_dict(plan=True)["plan"]
    assert len(described["ranks"]) == WORLD
    assert described["all_ranks"]["bytes"] == found.all_ranks.nbytes
    assert described["fetched_bytes"] == sum(read["fetched_bytes"] for read in described["reads"])


def test_no_rank_means_everything(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    check(streamload.load(folder), tensors)
    assert streamload.inspect(folder).ranks == ()


def test_placements_of_ones_own(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    placements = Placements.from_config(CONFIG)
    check(streamload.load(folder, rank=3, world_size=WORLD, placements=placements), expected_of(tensors, 3))


def test_a_file_by_name(folder: Path) -> None:
    (first, *_) = sorted(folder.glob("*.safetensors"))
    assert LocalSource.skipped_gap_bytes is not None
    found = streamload.load(first, rank=0, world_size=WORLD)
    assert found
