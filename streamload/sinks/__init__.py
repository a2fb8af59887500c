"""Where do tensors go? Host memory, or a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from streamload.errors import DeviceError
from streamload.sinks.base import Delivery, Lease, NamedTensor, Sink
from streamload.sinks.dtypes import require_torch

__all__ = ["Delivery", "Lease", "MakeSink", "NamedTensor", "OnCopy", "Sink", "sink_for"]

OnCopy = Callable[[float, float, int, str], None]
"""Told of each copy to the device: began and ended (seconds of `time.perf_counter`), bytes, and what it was."""


class MakeSink(Protocol):
    """Makes the sink once it is known how the load will read.

    Args:
        memory_bytes: The load's memory limit.
        read_bytes: How large a read is at most.
        concurrency: How many reads are in flight at most.
        congruence_bytes: See `streamload.sources.base.Source`.
    """

    def __call__(
        self, *, memory_bytes: int, read_bytes: int, concurrency: int, congruence_bytes: int = 1
    ) -> Sink[Any]: ...


def sink_for(device: str, on_copy: OnCopy) -> MakeSink:
    """Choose the sink for a device. Called on the caller's thread, whose current CUDA stream counts.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        on_copy: Told of each copy to the device.

    Raises:
        MissingDependencyError: torch is not installed.
        DeviceError: There is no such device.
    """
    require_torch()
    if device == "cpu":
        from streamload.sinks.host import HostSink

        return lambda *, memory_bytes, read_bytes, concurrency, congruence_bytes=1: HostSink(
            memory_bytes, congruence_bytes=congruence_bytes
        )
    if device == "cuda" or device.startswith("cuda:"):
        from streamload.sinks.cuda import CudaSink
        from streamload.sinks.device import open_device

        opened = open_device(device)
        return lambda *, memory_bytes, read_bytes, concurrency, congruence_bytes=1: CudaSink(
            opened,
            read_bytes=read_bytes,
            concurrency=concurrency,
            staging_bytes=memory_bytes,
            on_copy=on_copy,
        )
    raise DeviceError(f"device {device!r} is neither cpu nor cuda nor cuda:N")
