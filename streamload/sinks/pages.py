"""Moving pages from one address to another, without copying what is in them.

Source: mremap(2), the flags MREMAP_FIXED and MREMAP_DONTUNMAP (Linux 5.7).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

__all__ = ["address_of", "move_pages"]

_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_MREMAP_DONTUNMAP = 4


def address_of(mapping: mmap.mmap) -> int:
    """Where a writable mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def move_pages(source: int, target: int, nbytes: int) -> bool:
    """Put the pages of one address range in the place of another one's; whether the system did it.

    Both are parts of private anonymous mappings, begin at a page and do not overlap. What was in the target is lost.
    The source stays mapped, and is filled with zeros when it is touched again. It takes microseconds for each megabyte;
    to have the kernel find and clear as many new pages takes a hundred times as long.

    Args:
        source: Address of the first page to move.
        target: Where it goes.
        nbytes: The length, a multiple of the page size.
    """
    mremap = _mremap()
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
    return mremap is not None and mremap(source, nbytes, nbytes, flags, target) == target


@functools.cache
def _mremap() -> Callable[[int, int, int, int, int], int | None] | None:
    """The C library's function, where it has one."""
    function = getattr(ctypes.CDLL(None), "mremap", None)
    if function is not None:
        function.restype = ctypes.c_void_p
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    return function
