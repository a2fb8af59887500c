"""What the files of a checkpoint say: headers, index and catalog. Nothing here does I/O."""

from streamload.checkpoint.catalog import build_catalog, select, shard_keys
from streamload.checkpoint.dtypes import DTYPE_BITS
from streamload.checkpoint.header import MAX_HEADER_BYTES, HeaderReader, parse_header
from streamload.checkpoint.index import MAX_INDEX_BYTES, Index, choose_index, parse_index
from streamload.checkpoint.layout import Entry, encode_header, lay_out, tensor_bytes
from streamload.checkpoint.manifest import (
    BLOCK_BYTES,
    MANIFEST_ALGORITHM,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    BlockMap,
    BlockPiece,
    ManifestFile,
    ManifestTensor,
    check_manifest,
    encode_manifest,
    is_manifest,
    manifest_name,
    manifest_names,
    parse_manifest,
)
from streamload.checkpoint.rank_files import PIPELINE_PATTERN, RANK_PATTERN, RankFiles, without_rank_files
from streamload.checkpoint.tensors import Catalog, ShardFile, Stripe, TensorInfo

__all__ = [
    "BLOCK_BYTES",
    "DTYPE_BITS",
    "MANIFEST_ALGORITHM",
    "MANIFEST_NAME",
    "MAX_HEADER_BYTES",
    "MAX_INDEX_BYTES",
    "MAX_MANIFEST_BYTES",
    "PIPELINE_PATTERN",
    "RANK_PATTERN",
    "BlockMap",
    "BlockPiece",
    "Catalog",
    "Entry",
    "HeaderReader",
    "Index",
    "ManifestFile",
    "ManifestTensor",
    "RankFiles",
    "ShardFile",
    "Stripe",
    "TensorInfo",
    "build_catalog",
    "check_manifest",
    "choose_index",
    "encode_header",
    "encode_manifest",
    "is_manifest",
    "lay_out",
    "manifest_name",
    "manifest_names",
    "parse_header",
    "parse_index",
    "parse_manifest",
    "select",
    "shard_keys",
    "tensor_bytes",
    "without_rank_files",
]
