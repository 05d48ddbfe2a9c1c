"""Memory of a process and its descendants: pages shared by several processes count for each in part (PSS)."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Self

import psutil

INTERVAL_S = 0.5
TOLERANCE_BYTES = 4 * 2**20
"""A pool is advised to huge pages from its first whole one to its last."""


def tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def pss_bytes(pid: int) -> int:
    total = 0
    for process in tree(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += sum(_kib(line) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return total


def resident_pool_bytes(pid: int, pool_bytes: int) -> int:
    """What is resident of the one mapping advised to huge pages that is as large as the KV pool. Raises `RuntimeError`
    unless there is exactly one."""
    found, size, resident = [], 0, 0
    for process in tree(pid):
        for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
            if line.startswith("Size:"):
                size = _kib(line) * 1024
            elif line.startswith("Pss:"):
                resident = _kib(line) * 1024
            elif line.startswith("VmFlags:") and "hg" in line.split() and abs(size - pool_bytes) <= TOLERANCE_BYTES:
                found.append(resident)
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} mappings are as large as the KV pool of {pool_bytes:,} bytes, not one")
    return found[0]


class PeakPss:
    """Watches a tree of processes while the context is open; `peak` in bytes."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self.peak = 0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.peak = max(self.peak, pss_bytes(self._pid))

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self.peak = max(self.peak, pss_bytes(self._pid))


def _kib(line: str) -> int:
    return int(line.split()[1])
