"""Advice that memory be backed by huge pages: small ones cost TLB misses, and prefetching stops at their ends."""

from __future__ import annotations

import ctypes
import mmap

HUGE_PAGE = 2 * 2**20


def advise_huge_pages(address: int, num_bytes: int) -> None:
    """Advice that the system may not take: the memory works without, only slower. Before its first use."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    begin = -(-address // HUGE_PAGE) * HUGE_PAGE
    end = (address + num_bytes) // HUGE_PAGE * HUGE_PAGE
    if advice is not None and end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice))
