"""Every loader that reads from S3 brings what safetensors finds in the same files, and the limit moves all bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.loaders import loader_named
from bench.loaders.base import MIB, Job, TensorEntry
from bench.loaders.ranges import RANGE_BYTES, Target, Unit, units_of
from bench.origin import serve
from tests.bench.load_once import digest, load_once
from tests.servers import S3Bucket

NAMES = ["streamload", "runai", "runai-default", "obstore", "aiobotocore", "s3torchconnector"]
# Those of the peers that are installed; what reads a bucket needs no more than streamload itself.
INSTALLED = [name for name in NAMES if loader_named(name).missing() is None]
# ministack answers requests of Run:ai's client with 403; the origin, which checks the same signatures, takes them.
WITH_MINISTACK = [name for name in INSTALLED if not name.startswith("runai")]


def make_checkpoint(folder: Path, rows: int) -> dict[str, torch.Tensor]:
    """Two files: tensors above and below a range, an odd one, an empty one."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(7)
    for number in range(2):
        tensors = {
            f"layers.{number}.{name}.weight": torch.randint(-99, 99, (size, 1024), generator=random).to(torch.bfloat16)
            for name, size in {"up": 2 * rows, "q": rows, "k": rows // 4}.items()
        }
        tensors |= {f"layers.{number}.norm.{each}": torch.rand(37, generator=random) for each in range(20)}
        tensors |= {f"layers.{number}.odd": torch.arange(7, dtype=torch.uint8)}
        tensors |= {f"layers.{number}.empty": torch.empty(0, 3)}
        save_file(tensors, folder / f"model-{number}.safetensors", {"format": "pt"})
    return {name: tensor for path in sorted(folder.iterdir()) for name, tensor in load_file(path).items()}


def job_of(
    bucket: str, prefix: str, folder: Path, endpoint: str, destination: Literal["drain", "params"] = "drain"
) -> Job:
    paths = sorted(folder.iterdir())
    return Job(
        scenario="test",
        destination=destination,
        uri=f"s3://{bucket}/{prefix}".rstrip("/"),
        files=tuple(f"{prefix}{path.name}" for path in paths),
        sizes=tuple(path.stat().st_size for path in paths),
        memory_bytes=256 * MIB,
        device="cpu",
        endpoint=endpoint,
    )


@pytest.fixture(params=["drain", "params"])
def destination(request: pytest.FixtureRequest) -> Literal["drain", "params"]:
    found: Literal["drain", "params"] = request.param
    return found


@pytest.mark.parametrize("name", WITH_MINISTACK)
def test_a_loader_brings_every_tensor_from_a_bucket(
    name: str, destination: Literal["drain", "params"], s3_bucket: S3Bucket, tmp_path: Path
) -> None:
    expected = make_checkpoint(tmp_path / "llama", 1024)
    for path in (tmp_path / "llama").iterdir():
        s3_bucket.put(f"llama/{path.name}", path.read_bytes())
    job = job_of(s3_bucket.name, "llama/", tmp_path / "llama", s3_bucket.server.endpoint, destination)

    found = load_once(name, job, expected, {}, [])

    assert found["tensors"] == {name: digest(tensor) for name, tensor in expected.items()}
    assert found["nbytes"] == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.root
@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("variant", ["http", "tls"])
def test_a_loader_brings_every_tensor_from_the_origin(
    name: str,
    variant: Literal["http", "tls"],
    destination: Literal["drain", "params"],
    clean_aws_env: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    expected = make_checkpoint(tmp_path / "bench" / "llama", 4096)
    with serve(tmp_path, variant=variant) as origin:
        job = job_of(origin.bucket, "llama/", tmp_path / "bench" / "llama", origin.endpoint_url, destination)
        found = load_once(name, job, expected, origin.environ, origin.command_prefix)

    assert found["tensors"] == {name: digest(tensor) for name, tensor in expected.items()}
    assert found["nbytes"] == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.root
@pytest.mark.parametrize("variant", ["http", "tls"])
def test_the_limit_moves_all_bytes_from_the_origin(
    variant: Literal["http", "tls"], clean_aws_env: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "bench", 4096)
    with serve(tmp_path, variant=variant) as origin:
        job = job_of(origin.bucket, "", tmp_path / "bench", origin.endpoint_url)
        found = load_once("limit", job, {}, origin.environ, origin.command_prefix)

    assert found["nbytes"] == job.size_bytes


def test_the_limit_moves_all_bytes_from_a_bucket(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "llama", 1024)
    for path in (tmp_path / "llama").iterdir():
        s3_bucket.put(path.name, path.read_bytes())
    job = job_of(s3_bucket.name, "", tmp_path / "llama", s3_bucket.server.endpoint)

    assert load_once("limit", job, {}, {}, [])["nbytes"] == job.size_bytes


def test_a_key_that_is_missing_is_an_error_of_the_limit(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "llama", 64)
    job = job_of(s3_bucket.name, "", tmp_path / "llama", s3_bucket.server.endpoint)

    with pytest.raises(AssertionError, match="404"):
        load_once("limit", job, {}, {}, [])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("streamload", "runai", "runai-default")])
def test_what_only_reads_buckets_says_so(name: str, tmp_path: Path) -> None:
    job = Job("test", "drain", str(tmp_path), (), (), 256 * MIB, "cpu")

    assert loader_named(name).reason_not(job) == "reads from object stores only"


def entry(name: str, start: int, nbytes: int) -> TensorEntry:
    return TensorEntry(name, "U8", (nbytes,), start, start + nbytes)


def test_small_neighbours_share_a_unit_and_large_tensors_have_their_own() -> None:
    entries = [entry("a", 8, 10), entry("b", 18, RANGE_BYTES), entry("c", 18 + RANGE_BYTES, 3 * RANGE_BYTES)]

    units = units_of("key", entries)

    assert [[each.name for each in unit.entries] for unit in units] == [["a", "b"], ["c"]]
    assert [(unit.start, unit.end) for unit in units] == [
        (8, 18 + RANGE_BYTES),
        (18 + RANGE_BYTES, 18 + 4 * RANGE_BYTES),
    ]


@pytest.mark.parametrize("piece_bytes", range(1, 12))
def test_pieces_of_any_length_go_where_they_belong(piece_bytes: int) -> None:
    content = bytes(range(100, 110))
    parts = [bytearray(3), bytearray(0), bytearray(5), bytearray(2)]
    target = Target(Unit("key", 40, 50, []), map(memoryview, parts))

    at = 40
    for start in range(0, 10, piece_bytes):
        at = target.write(at, content[start : start + piece_bytes])

    assert at == 50
    assert b"".join(parts) == content
