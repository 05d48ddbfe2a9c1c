"""Memory for pools of blocks: on a processor in huge pages, since shuffled blocks of small pages wait for the TLB."""

from __future__ import annotations

import os
import threading

import torch

from ..kernels.huge_pages import HUGE_PAGE, advise_huge_pages, madvise, whole_pages

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python does not name
POPULATED_BYTES = 2**30
"""Of the beginning of a pool, where blocks are given out first; the rest is had as it is used."""


def empty_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pinned: bool = False
               ) -> torch.Tensor:
    """Uninitialised. `pinned`: host memory that a GPU copies from and to at once."""
    pool = torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
    if device.type == "cpu" and not pinned:
        advise_huge_pages(pool.data_ptr(), pool.nbytes)
    return pool


def populate(pool: torch.Tensor) -> threading.Thread:
    """Have the first pages of a pool before the first requests need them, in the background and only with time that
    nobody wants: a first touch costs a millisecond and more a page in a virtual machine. Returns the thread."""
    def run() -> None:
        # Of this thread alone.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        begin, end = whole_pages(pool.data_ptr(), min(pool.nbytes, POPULATED_BYTES))
        for page in range(begin, end, HUGE_PAGE):
            if madvise(page, HUGE_PAGE, _POPULATE_WRITE):
                return

    thread = threading.Thread(target=run, name="populate-pool", daemon=True)
    thread.start()
    return thread
