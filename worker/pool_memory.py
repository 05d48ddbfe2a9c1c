"""Memory for pools of blocks: on a processor in huge pages, since shuffled blocks of small pages wait for the TLB."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

import torch

_HUGE_PAGE = 2 * 2**20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python does not name
POPULATED_BYTES = 2**30
"""Of the beginning of a pool, where blocks are given out first; the rest is had as it is used."""


def empty_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pinned: bool = False
               ) -> torch.Tensor:
    """Uninitialised. `pinned`: host memory that a GPU copies from and to at once."""
    pool = torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
    if device.type == "cpu" and not pinned:
        _advise_huge_pages(pool.data_ptr(), pool.nbytes)
    return pool


def _advise_huge_pages(address: int, num_bytes: int) -> None:
    """Advice that the kernel may not take: the pool works without, only slower. Before its pages are first touched."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    begin, end = _whole_pages(address, num_bytes)
    if advice is not None and end > begin:
        _madvise(begin, end - begin, advice)


def populate(pool: torch.Tensor) -> threading.Thread:
    """Have the first pages of a pool before the first requests need them, in the background and only with time that
    nobody wants: a first touch costs a millisecond and more a page in a virtual machine. Returns the thread."""
    def run() -> None:
        # Of this thread alone.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        begin, end = _whole_pages(pool.data_ptr(), min(pool.nbytes, POPULATED_BYTES))
        for page in range(begin, end, _HUGE_PAGE):
            if _madvise(page, _HUGE_PAGE, _POPULATE_WRITE):
                return

    thread = threading.Thread(target=run, name="populate-pool", daemon=True)
    thread.start()
    return thread


def _whole_pages(address: int, num_bytes: int) -> tuple[int, int]:
    return -(-address // _HUGE_PAGE) * _HUGE_PAGE, (address + num_bytes) // _HUGE_PAGE * _HUGE_PAGE


def _madvise(address: int, num_bytes: int, advice: int) -> int:
    result: int = ctypes.CDLL(None).madvise(
        ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(advice))
    return result
