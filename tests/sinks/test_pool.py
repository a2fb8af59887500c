"""Regions of host memory: owned while they live, used again afterwards, and never more of them resident than said."""

from __future__ import annotations

import gc
import mmap
import os
import random
import resource
import threading
from pathlib import Path

import pytest
import torch

from streamload.sinks.pool import PAGE_BYTES, HostPool, round_to_pages

MIB = 1 << 20


def tensor_over(region: memoryview) -> torch.Tensor:
    return torch.frombuffer(region, dtype=torch.uint8)


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def test_a_region_is_exact_page_aligned_and_writable() -> None:
    region = HostPool(MIB).take(1000)
    assert region.nbytes == 1000
    assert not region.readonly
    assert tensor_over(region).data_ptr() % PAGE_BYTES == 0


def test_memory_comes_back_when_the_last_view_of_the_tensor_is_gone() -> None:
    pool = HostPool(MIB)
    tensor = tensor_over(pool.take(MIB))
    address = tensor.data_ptr()
    parameter = torch.nn.Parameter(tensor.view(torch.float32)[5:7], requires_grad=False)
    del tensor
    assert tensor_over(pool.take(MIB)).data_ptr() != address, "a view still lives"
    del parameter
    assert tensor_over(pool.take(MIB)).data_ptr() == address


def test_regions_never_overlap_while_they_live() -> None:
    pool = HostPool(MIB)
    kept = []
    for number in range(200):
        tensor = tensor_over(pool.take(20_000 + number * 137))
        tensor.fill_(number % 251)
        if number % 3:
            kept.append((number, tensor))
    assert all(bool((tensor == number % 251).all()) for number, tensor in kept)


def test_gaps_that_are_too_small_lend_their_pages() -> None:
    """No page is touched for the first time while unused ones are resident, wherever those are."""
    pool = HostPool(16 * MIB)
    kept, dropped = [], []
    for number in range(5):
        dropped.append(tensor_over(pool.take(3 * MIB)).fill_(1))
        kept.append(tensor_over(pool.take(4096)).fill_(number + 10))
    del dropped
    resident_bytes = pool.resident_bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    whole = tensor_over(pool.take(15 * MIB)).fill_(2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 500
    assert pool.resident_bytes == resident_bytes
    assert pool.cached_bytes == 0
    assert all(bool((tensor == number + 10).all()) for number, tensor in enumerate(kept))
    assert bool((whole == 2).all())


def test_where_pages_cannot_be_moved_memory_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamload.sinks.pool.move_pages", lambda source, target, nbytes: False)
    pool = HostPool(4 * MIB)
    kept = [tensor_over(pool.take(MIB)).fill_(number) for number in range(4)]
    del kept[1], kept[2]
    assert pool.cached_bytes == 2 * MIB
    tensor = tensor_over(pool.take(2 * MIB)).fill_(7)
    assert pool.cached_bytes == 2 * MIB
    assert [int(each[0]) for each in kept] == [0, 2]
    assert bool((tensor == 7).all())


def test_moving_pages_keeps_every_tensor_as_it_is() -> None:
    pool = HostPool(8 * MIB)
    generator = random.Random(5)
    kept: dict[int, torch.Tensor] = {}
    for number in range(400):
        tensor = tensor_over(pool.take(generator.randrange(1, 3 * MIB)))
        kept[number] = tensor.fill_(number % 251)
        while sum(each.numel() for each in kept.values()) > 7 * MIB:
            del kept[generator.choice(list(kept))]
        pool.trim(MIB)
    assert all(bool((tensor == number % 251).all()) for number, tensor in kept.items())


def test_a_kept_region_outlives_the_pool() -> None:
    pool = HostPool(MIB)
    tensor = tensor_over(pool.take(MIB // 2))
    tensor.fill_(7)
    pool.close()
    del pool
    gc.collect()
    assert bool((tensor == 7).all())


def test_trim_bounds_what_stays_resident_and_keeps_what_lives() -> None:
    pool = HostPool(16 * MIB)
    kept = tensor_over(pool.take(MIB))
    kept.fill_(3)
    regions = [tensor_over(pool.take(MIB)).fill_(1) for _ in range(10)]
    assert pool.cached_bytes == 0
    del regions
    assert pool.cached_bytes == 10 * MIB
    pool.trim(4 * MIB)
    assert pool.cached_bytes == 4 * MIB
    pool.trim(0)
    assert pool.cached_bytes == 0
    assert bool((kept == 3).all())


def test_trimmed_pages_go_back_to_the_system() -> None:
    pool = HostPool(64 * MIB)
    regions = [tensor_over(pool.take(MIB)).fill_(1) for _ in range(64)]
    full = rss_bytes()
    del regions
    pool.trim(0)
    assert full - rss_bytes() > 56 * MIB


def test_after_close_each_region_goes_back_on_its_own() -> None:
    pool = HostPool(64 * MIB)
    regions = [tensor_over(pool.take(MIB)).fill_(1) for _ in range(64)]
    pool.close()
    full = rss_bytes()
    kept = regions[31]
    del regions
    assert full - rss_bytes() > 56 * MIB
    assert bool((kept == 1).all())


def test_a_region_larger_than_an_arena_gets_its_own_and_leaves_nothing() -> None:
    pool = HostPool(MIB)
    first = tensor_over(pool.take(1000))
    large = tensor_over(pool.take(5 * MIB))
    assert large.numel() == 5 * MIB
    del large
    pool.trim(0)
    assert pool.resident_bytes == round_to_pages(first.numel())


def test_an_empty_region_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        HostPool(MIB).take(0)


def test_regions_may_become_garbage_on_other_threads_and_inside_the_collector() -> None:
    pool = HostPool(MIB)

    class Cycle:
        """Garbage that only the collector finds, so that the region's finalizer runs wherever that happens to start."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            self.me = self

    def churn() -> None:
        for _ in range(300):
            Cycle(torch.frombuffer(bytearray(16), dtype=torch.uint8))
            gc.collect(0)

    other = threading.Thread(target=churn)
    other.start()
    for number in range(300):
        Cycle(tensor_over(pool.take(10_000 + number)))
    other.join()
    gc.collect()
    pool.trim(0)
    assert pool.resident_bytes == 0


def test_a_forked_child_writes_into_its_own_copy() -> None:
    region = HostPool(MIB).take(PAGE_BYTES)
    region[:4] = b"here"
    with mmap.mmap(-1, PAGE_BYTES) as shared:
        pid = os.fork()
        if pid == 0:
            region[:4] = b"away"
            shared[:1] = b"x"
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert shared[:1] == b"x"
    assert bytes(region[:4]) == b"here"
