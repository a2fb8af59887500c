"""What is measured: on which checkpoint, read from where, into what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from bench.loaders.base import MIB, Destination

Place: TypeAlias = Literal["warm", "cold", "http", "tls", "capped", "latency", "stalls", "link"]

GB = 1_000_000_000
# The memory limit that every loader is given which has one; four of the largest tensors.
MEMORY_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing to measure, the same work for all loaders.

    Attributes:
        name: Its name on the command line and in the results.
        title: One line for people.
        dataset: The checkpoint's kind, see `bench.datasets`.
        place: ``warm`` and ``cold`` are local files, in the page cache or not; the others an object store's manners.
        destinations: Where tensors go, see `bench.loaders.base.Job`.
        quick: Those of ``make bench``; none where the scenario is left out there.
        size_bytes: Of the checkpoint, where the user names none.
        quick_bytes: The same for ``make bench``.
        device: ``cpu`` or ``cuda``.
        whole_process: The clock runs from starting the interpreter, not from the loader's call.
        least_bytes: Below this the scenario does not show what it is meant to; a smaller size is said in the results.
        paced: The store and not the client says how fast it can go, so a run that only warms up teaches nothing: the
            limit has none.
    """

    name: str
    title: str
    dataset: str
    place: Place
    destinations: tuple[Destination, ...] = ("drain", "params")
    quick: tuple[Destination, ...] = ("drain",)
    size_bytes: int = 4 * GB
    quick_bytes: int = GB
    device: str = "cpu"
    whole_process: bool = False
    least_bytes: int = 0
    paced: bool = False

    @property
    def remote(self) -> bool:
        """Whether it reads from an object store."""
        return self.place not in ("warm", "cold")


# Before the capped store's pace shows, a load of a few gigabytes is over.
_CAPPED_BYTES = 8 * GB
# 50,000 tensors of 34 KiB, the middle of 4 and 64.
_SMALL_BYTES = 50_000 * 34 * 1024

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("local-warm", "local files in the page cache", "llama", "warm", quick=("drain", "params")),
        Scenario("local-cold", "local files, the page cache dropped", "llama", "cold"),
        Scenario("s3-http", "S3 on loopback", "llama", "http", quick=("drain", "params")),
        Scenario("s3-tls", "S3 on loopback, through TLS", "llama", "tls"),
        Scenario(
            "s3-capped",
            "S3 at about 100 MiB/s for each connection",
            "llama",
            "capped",
            size_bytes=_CAPPED_BYTES,
            quick_bytes=_CAPPED_BYTES,
            least_bytes=_CAPPED_BYTES,
            paced=True,
        ),
        Scenario("s3-latency", "S3 with 30 ms before each first byte", "llama", "latency"),
        Scenario(
            "s3-stalls",
            "S3 of whose answers one in a hundred, the last among them, is 3 s late",
            "llama",
            "stalls",
            destinations=("drain",),
            quick=(),
        ),
        Scenario("s3-link", "S3 over a link of 4 Gbit/s", "llama", "link", size_bytes=2 * GB, paced=True),
        Scenario(
            "small-tensors",
            "50,000 tensors of 4 to 64 KiB, local and warm",
            "small",
            "warm",
            size_bytes=_SMALL_BYTES,
            quick_bytes=_SMALL_BYTES,
            least_bytes=_SMALL_BYTES,
        ),
        Scenario(
            "large-tensor",
            "a tensor of four times the memory limit among others, local and warm",
            "large",
            "warm",
            destinations=("drain",),
            quick=(),
            least_bytes=4 * GB,
        ),
        Scenario(
            "cold-start",
            "from starting the interpreter: the command line (drain), the library (params), staging (stage)",
            "llama",
            "warm",
            destinations=("drain", "params", "stage"),
            quick=("drain", "params", "stage"),
            size_bytes=GB,
            whole_process=True,
        ),
        Scenario("gpu-local", "local files in the page cache, onto a GPU", "llama", "warm", device="cuda"),
        Scenario("gpu-s3", "S3 on loopback, onto a GPU", "llama", "http", device="cuda"),
    )
}
