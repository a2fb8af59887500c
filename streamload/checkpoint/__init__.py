"""What the files of a checkpoint say: headers, index and catalog. Nothing here does I/O."""

from streamload.checkpoint.catalog import build_catalog, select, shard_keys
from streamload.checkpoint.dtypes import DTYPE_BITS
from streamload.checkpoint.header import MAX_HEADER_BYTES, HeaderReader, parse_header
from streamload.checkpoint.index import MAX_INDEX_BYTES, Index, choose_index, parse_index
from streamload.checkpoint.tensors import Catalog, ShardFile, Stripe, TensorInfo

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "MAX_INDEX_BYTES",
    "Catalog",
    "HeaderReader",
    "Index",
    "ShardFile",
    "Stripe",
    "TensorInfo",
    "build_catalog",
    "choose_index",
    "parse_header",
    "parse_index",
    "select",
    "shard_keys",
]
