"""Finds out whether the ranks of a group can share memory, and shares it."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ...kernels.exchange_ops import MAX_RANKS, Exchange, region_bytes, supported


class Store(Protocol):
    """Of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        """Waits until it is set."""
        ...


class NotSharedError(Exception):
    """The ranks cannot share memory; the message says why. Every rank of the group gets the same."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a rank tells the others."""

    place: str
    pid: int
    problem: str
    fd: int
    """Of the region, in rank 0's process."""


def open_exchange(store: Store, rank: int, world_size: int, timeout_s: float) -> Exchange:
    """Meet the other ranks at `store`, and open an exchange if all of them can map the same memory. `timeout_s`: the
    deadline of every collective.

    Raises:
        NotSharedError: they cannot; all ranks can go on together by another way.
        RuntimeError: of the store, when a rank does not come.
    """
    # Memory without a name, which the others open through rank 0's descriptor: however a rank ends, none is left.
    fd = os.memfd_create("kvarto-exchange") if rank == 0 else -1
    fds: list[int] = []
    try:
        own = _Offer(_place(), os.getpid(), _problem(world_size), fd)
        if fd >= 0 and not own.problem:
            os.ftruncate(fd, region_bytes(world_size))
        offers = [_Offer(**offer) for offer in _told(store, "offer", rank, world_size, asdict(own))]
        _raise_first([offer.problem for offer in offers])
        if len({offer.place for offer in offers}) > 1:
            raise NotSharedError("the ranks are not on one host, or do not see each other's processes")
        problem, region = "", None
        try:
            region = _map(offers[0], world_size)
            fds.extend(-1 if peer == rank else os.pidfd_open(offer.pid) for peer, offer in enumerate(offers))
        except OSError as error:
            problem = f"rank {rank}: {error}"
        _raise_first(_told(store, "mapped", rank, world_size, problem))
        assert region is not None, "or there would be a problem"
        peer_fds, fds = fds, []
        return Exchange(region, rank, world_size, timeout_s, peer_fds)
    finally:
        for open_fd in (fd, *fds):
            if open_fd >= 0:
                os.close(open_fd)


def _place() -> str:
    """The same in two processes that can name each other by process id."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"


def _problem(world_size: int) -> str:
    if not supported():
        return "the native kernels are not in use"
    return "" if world_size <= MAX_RANKS else f"more than {MAX_RANKS} ranks"


def _map(offer: _Offer, world_size: int) -> mmap.mmap:
    fd = os.open(f"/proc/{offer.pid}/fd/{offer.fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, region_bytes(world_size))
    finally:
        os.close(fd)


def _told(store: Store, key: str, rank: int, world_size: int, value: object) -> list[Any]:
    """What every rank says, in rank order."""
    store.set(f"{key}/{rank}", json.dumps(value))
    return [json.loads(store.get(f"{key}/{peer}")) for peer in range(world_size)]


def _raise_first(problems: list[str]) -> None:
    for problem in problems:
        if problem:
            raise NotSharedError(problem)
