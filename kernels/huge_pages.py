"""Advice that memory be backed by huge pages: small ones cost TLB misses, and prefetching stops at their ends."""

from __future__ import annotations

import ctypes
import mmap

HUGE_PAGE = 2 * 2**20


def advise_huge_pages(address: int, num_bytes: int) -> None:
    """Advice that the system may not take: the memory works without, only slower. Before its first use."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    begin, end = whole_pages(address, num_bytes)
    if advice is not None and end > begin:
        madvise(begin, end - begin, advice)


def whole_pages(address: int, num_bytes: int) -> tuple[int, int]:
    """Addresses at which the huge pages that lie within begin and end; nothing lies within where they do not rise."""
    return -(-address // HUGE_PAGE) * HUGE_PAGE, (address + num_bytes) // HUGE_PAGE * HUGE_PAGE


def madvise(address: int, num_bytes: int, advice: int) -> int:
    """The system call; 0: it was taken."""
    result: int = ctypes.CDLL(None).madvise(
        ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(advice))
    return result
