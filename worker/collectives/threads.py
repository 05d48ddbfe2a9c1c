"""Ranks that are threads of one process: debugging and tests of tensor parallelism without Ray."""

from __future__ import annotations

import mmap
import threading

import torch

from ...kernels.exchange_ops import MAX_RANKS, Exchange, region_bytes, supported
from ...protos.errors import UnavailableError
from .communicator import Communicator, sum_in_order
from .shared_memory import SharedMemoryCommunicator


def thread_group(world_size: int, device_type: str, timeout_s: float) -> list[Communicator]:
    """The communicators of `world_size` threads: on CPUs with native kernels the one that processes use. `timeout_s` is
    the deadline of every collective."""
    if device_type == "cpu" and supported() and world_size <= MAX_RANKS:
        region = mmap.mmap(-1, region_bytes(world_size))
        return [SharedMemoryCommunicator(Exchange(region, rank, world_size, timeout_s), timeout_s)
                for rank in range(world_size)]
    return [*ThreadCommunicator.group(world_size, timeout_s)]


class ThreadCommunicator(Communicator):
    """On any device, and without native kernels. Made by `group`."""

    name = "threads"

    def __init__(self, rank: int, slots: list[torch.Tensor | None], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.world_size = len(slots)
        self._slots = slots
        self._barrier = barrier

    @classmethod
    def group(cls, world_size: int, timeout_s: float) -> list[ThreadCommunicator]:
        """The communicators of `world_size` threads; `timeout_s` is the deadline of every collective."""
        slots: list[torch.Tensor | None] = [None] * world_size
        barrier = threading.Barrier(world_size, timeout=timeout_s)
        return [cls(rank, slots, barrier) for rank in range(world_size)]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum_in_order(self.all_gather_rows(tensor)))

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        self._slots[self.rank] = tensor
        self._wait()
        gathered = torch.stack([part for part in self._slots if part is not None])
        # Nobody may overwrite a slot, or change its tensor in place, before all have read it.
        self._wait()
        return gathered

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        return tensor.copy_(self.all_gather_rows(tensor)[src])

    def close(self) -> None:
        """The others' collectives fail from now on instead of waiting for this rank."""
        self._barrier.abort()

    def _wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError as error:
            raise UnavailableError(f"a collective on rank {self.rank} of {self.world_size} lost a peer") from error
