"""The checkpoints that are loaded: their shapes, their bytes, and where they lie.

A data set is a folder that holds a bucket (a folder named ``bench`` with the safetensors files) and beside it
``expected.json``: every tensor's dtype, shape and checksum, written down while the file is. The bytes are pseudo-random
and the same on every machine, so that no two tensors, and no two parts of one, can be taken for each other.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.loaders.base import MIB

# As fast as memory, where it is there; a machine that only has a GPU to test needs nothing of it.
_crt: Any = import_module("awscrt.checksums") if find_spec("awscrt") else None

BUCKET = "bench"
KIB = 1 << 10

# A change of shapes or bytes must not meet files of an older version.
_VERSION = 1
_ITEM_BYTES = {"BF16": 2, "F32": 4, "U8": 1}

# The random bytes that all tensors are cut from; a tensor's number, and a block's within it, is added
# to each eight-byte word.
_BLOCK_BYTES = 64 * MIB
_SMALL_TENSORS = 50_000
_SMALL_PER_FILE = 5_000


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Expected:
    """What a tensor must be when a loader hands it out."""

    dtype: str
    shape: tuple[int, ...]
    checksum: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """A checkpoint on disk.

    Attributes:
        name: Its kind and size; also the name of its folder.
        folder: What holds the folder ``bench``.
        files: The safetensors files' names, in order.
        sizes: Their sizes in bytes.
        tensor_bytes: What their tensors have together.
        tensors: How many there are.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    tensor_bytes: int
    tensors: int

    @property
    def bucket(self) -> Path:
        """The folder that the files lie in."""
        return self.folder / BUCKET

    @property
    def size_bytes(self) -> int:
        """What the files have together, headers included."""
        return sum(self.sizes)


def make(kind: str, size_bytes: int, under: Path) -> Dataset:
    """Make a checkpoint, or find the one that was made before.

    Args:
        kind: ``llama``, ``small``, or ``large``.
        size_bytes: About so many bytes; of ``small``, at most 50,000 tensors.
        under: The folder for all data sets.

    Raises:
        ValueError: No such kind, or fewer bytes than it takes.
    """
    if kind not in KINDS:
        raise ValueError(f"no such data set: {kind}")
    name = f"{kind}-{size_bytes // 1_000_000}MB-v{_VERSION}{'' if _crt else '-crc32'}"
    folder = under / name
    if not (folder / "expected.json").is_file():
        partial = folder.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / BUCKET).mkdir(parents=True)
        files = list(KINDS[kind](size_bytes))
        if not files:
            raise ValueError(f"{size_bytes} bytes are too few for the data set {kind}")
        _write(partial, files)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return _found(name, folder)


def expected(folder: Path) -> dict[str, Expected]:
    """Every tensor of a data set, by its name."""
    described = json.loads((folder / "expected.json").read_text())["tensors"]
    return {name: Expected(dtype, tuple(shape), checksum) for name, (dtype, shape, checksum) in described.items()}


def checksum(content: Any, before: int = 0) -> int:
    """Of anything that has a buffer, and what came before it; CRC-64/NVME, or CRC-32 without awscrt."""
    if _crt is None:
        return zlib.crc32(content, before)
    return int(_crt.crc64nvme(content, before))


def drop_from_page_cache(folder: Path) -> str | None:
    """Let go of all pages of the folder's files.

    Returns:
        None where they are gone, else why they are not.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # dirty pages stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    if not any(map(_cached, paths)):
        return None
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError as error:
        return f"the page cache cannot be dropped here ({error.strerror})"
    return "files stay in memory here, whatever is asked for" if any(map(_cached, paths)) else None


def _cached(path: Path) -> bool:
    """Whether one of a few pages of a file is in memory; true where the system cannot tell."""
    size = path.stat().st_size
    page = bytearray(1)
    file = os.open(path, os.O_RDONLY)
    try:
        for number in range(8):
            try:
                if os.preadv(file, [page], size * number // 8, os.RWF_NOWAIT):
                    return True
            except BlockingIOError:
                continue
            except OSError:
                return True
    finally:
        os.close(file)
    return False


async def upload(dataset: Dataset, endpoint: str | None, bucket: str, prefix: str) -> None:
    """Put the files that a bucket lacks into it, with checksums of the whole object where the store keeps them."""
    from aiobotocore.session import get_session
    from botocore.exceptions import ClientError

    async with get_session().create_client("s3", endpoint_url=endpoint) as client:
        for name, size in zip(dataset.files, dataset.sizes, strict=True):
            key = f"{prefix}{name}"
            try:
                if (await client.head_object(Bucket=bucket, Key=key))["ContentLength"] == size:
                    continue
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise
            with (dataset.bucket / name).open("rb") as file:
                await client.put_object(Bucket=bucket, Key=key, Body=file, ChecksumAlgorithm="CRC64NVME")


# Shapes


def _llama(size_bytes: int) -> Iterator[list[Tensor]]:
    """Layers like an 8B Llama's, cut so that the largest tensor has 64 MiB; two to a file; narrower where few bytes."""
    for hidden in (4096, 2048, 1024, 512, 256, 128):
        layer = _layer(hidden, 0)
        layer_bytes = sum(tensor.nbytes for tensor in layer)
        vocabulary = Tensor("model.embed_tokens.weight", "BF16", (2 * hidden, hidden))
        head = [Tensor("model.norm.weight", "BF16", (hidden,)), Tensor("lm_head.weight", "BF16", (2 * hidden, hidden))]
        layers = round((size_bytes - 2 * vocabulary.nbytes) / layer_bytes)
        if layers >= 3:
            break
    else:
        return
    for first in range(0, layers, 2):
        tensors = [tensor for number in range(first, min(first + 2, layers)) for tensor in _layer(hidden, number)]
        if not first:
            tensors.insert(0, vocabulary)
        if first + 2 >= layers:
            tensors += head
        yield tensors


def _large(size_bytes: int) -> Iterator[list[Tensor]]:
    """The same with an embedding in front that has a quarter of all bytes, at most 1 GiB."""
    width = 4096
    rows = min(size_bytes // 4, 1024 * MIB) // (2 * width)
    files = list(_llama(size_bytes - 2 * rows * width))
    if rows and files:
        files[0].insert(0, Tensor("model.large.weight", "BF16", (rows, width)))
        yield from files


def _layer(hidden: int, number: int) -> list[Tensor]:
    shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (2 * hidden, hidden),
        "mlp.up_proj": (2 * hidden, hidden),
        "mlp.down_proj": (hidden, 2 * hidden),
    }
    return [Tensor(f"model.layers.{number}.{name}.weight", "BF16", shape) for name, shape in shapes.items()]


def _small(size_bytes: int) -> Iterator[list[Tensor]]:
    """Weights and scales of a quantized mixture of experts: 4 to 64 KiB each."""
    random_ = random.Random(_VERSION)
    written = number = 0
    tensors: list[Tensor] = []
    while number < _SMALL_TENSORS and written < size_bytes:
        expert, part = divmod(number, 6)
        kind = ("gate_proj", "up_proj", "down_proj")[part // 2]
        name = f"model.layers.{expert // 128}.mlp.experts.{expert % 128}.{kind}"
        # In steps of 512 bytes, so that every dtype's rows come out whole.
        nbytes = random_.randrange(4 * KIB, 64 * KIB + 1, 512)
        tensor = (
            Tensor(f"{name}.weight", "U8", (nbytes // 256, 256))
            if part % 2 == 0
            else Tensor(f"{name}.weight_scale", "BF16", (nbytes // 256, 128))
        )
        tensors.append(tensor)
        written += tensor.nbytes
        number += 1
        if len(tensors) == _SMALL_PER_FILE:
            yield tensors
            tensors = []
    if tensors:
        yield tensors


KINDS: dict[str, Callable[[int], Iterator[list[Tensor]]]] = {"llama": _llama, "small": _small, "large": _large}


# Files


def _write(folder: Path, files: Iterable[list[Tensor]]) -> None:
    import numpy as np

    # MT19937, whose stream never changes, unlike that of the default generator.
    words = np.frombuffer(random.Random(_VERSION).randbytes(_BLOCK_BYTES), dtype="<u8")
    found: dict[str, tuple[str, tuple[int, ...], int]] = {}
    total = 0
    every = list(files)
    for place, tensors in enumerate(every, 1):
        with (folder / BUCKET / f"model-{place:05d}-of-{len(every):05d}.safetensors").open("wb") as file:
            file.write(_header(tensors))
            for tensor in tensors:
                crc = 0
                for number, start in enumerate(range(0, tensor.nbytes, _BLOCK_BYTES)):
                    nbytes = min(_BLOCK_BYTES, tensor.nbytes - start)
                    salt = np.uint64(len(found) + (number << 32))
                    content = (words[: -(-nbytes // 8)] + salt).view(np.uint8)[:nbytes]
                    file.write(content.data)
                    crc = checksum(content.data, crc)
                found[tensor.name] = (tensor.dtype, tensor.shape, crc)
                total += tensor.nbytes
            file.flush()
            # What is still written while others read would be what is measured.
            os.fsync(file.fileno())
    (folder / "expected.json").write_text(json.dumps({"tensor_bytes": total, "tensors": found}))


def _header(tensors: list[Tensor]) -> bytes:
    described = {}
    at = 0
    for tensor in tensors:
        described[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **described}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _found(name: str, folder: Path) -> Dataset:
    described = json.loads((folder / "expected.json").read_text())
    paths = sorted((folder / BUCKET).glob("*.safetensors"))
    return Dataset(
        name=name,
        folder=folder,
        files=tuple(path.name for path in paths),
        sizes=tuple(path.stat().st_size for path in paths),
        tensor_bytes=described["tensor_bytes"],
        tensors=len(described["tensors"]),
    )
