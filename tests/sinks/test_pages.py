"""Pages that change their address: what was in them comes along, and what was around them stays."""

from __future__ import annotations

import mmap
import resource

import pytest

from streamload.sinks.pages import address_of, move_pages

PAGE = mmap.PAGESIZE


def mapping(pages: int, fill: int = 0) -> mmap.mmap:
    made = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if fill:
        made[:] = bytes([fill]) * len(made)
    return made


@pytest.mark.parametrize(("source", "target", "pages"), [(0, 0, 8), (1, 3, 4), (7, 0, 1)])
def test_content_moves_and_its_neighbours_stay(source: int, target: int, pages: int) -> None:
    one, other = mapping(8, fill=1), mapping(8, fill=2)
    assert move_pages(address_of(one) + source * PAGE, address_of(other) + target * PAGE, pages * PAGE)
    moved = range(target, target + pages)
    left = range(source, source + pages)
    for page in range(8):
        assert other[page * PAGE] == (1 if page in moved else 2)
        assert one[page * PAGE] == (0 if page in left else 1)


def test_what_was_moved_away_can_be_used_again() -> None:
    one, other = mapping(4, fill=1), mapping(4)
    assert move_pages(address_of(one), address_of(other), 4 * PAGE)
    one[:] = b"\3" * len(one)
    assert other[:] == b"\1" * len(other)


def test_moved_pages_are_not_found_and_cleared_again() -> None:
    one, other = mapping(2000, fill=1), mapping(2000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert move_pages(address_of(one), address_of(other), len(one))
    for page in range(2000):
        other[page * PAGE] = 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 200


def test_what_cannot_be_moved_is_said_and_stays() -> None:
    one = mapping(4, fill=1)
    assert not move_pages(address_of(one) + 1, address_of(one) + 2 * PAGE, PAGE)
    assert one[:] == b"\1" * len(one)
