"""The loaders by name, each imported only when it is used.

The order is that of the tables: the limit, streamload, then the peers.
"""

from __future__ import annotations

from importlib import import_module

from bench.loaders.base import Loader

# name: (module, class)
_WHERE = {
    "limit": ("bench.loaders.limit", "Limit"),
    "streamload": ("bench.loaders.streamload_", "Streamload"),
    "streamload-runai": ("bench.loaders.streamload_", "StreamloadRunai"),
    "runai": ("bench.loaders.runai", "Runai"),
    "runai-default": ("bench.loaders.runai", "RunaiDefault"),
    "fastsafetensors": ("bench.loaders.fastsafetensors_", "Fastsafetensors"),
    "safetensors": ("bench.loaders.safetensors_", "Safetensors"),
    "obstore": ("bench.loaders.obstore_", "Obstore"),
    "aiobotocore": ("bench.loaders.aiobotocore_", "Aiobotocore"),
    "s3torchconnector": ("bench.loaders.s3torchconnector_", "S3torchconnector"),
    "tensorizer": ("bench.loaders.tensorizer_", "Tensorizer"),
    "instanttensor": ("bench.loaders.instanttensor_", "Instanttensor"),
}

NAMES = tuple(_WHERE)


def loader_named(name: str) -> Loader:
    """Make the loader of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in _WHERE:
        raise ValueError(f"no such loader: {name}; there are {', '.join(NAMES)}")
    module, kind = _WHERE[name]
    loader = getattr(import_module(module), kind)()
    if not isinstance(loader, Loader):
        raise TypeError(f"{module}.{kind} is no loader")
    return loader
