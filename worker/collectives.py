"""Tensors between the ranks of one worker group."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but missing in the stubs

from ..protos.errors import ResourcesError, UnavailableError


class Communicator(ABC):
    """Every rank makes the same calls in the same order, with tensors of the same shape and dtype. A call that does
    not end before its deadline, or whose peer is gone, raises `UnavailableError`; the communicator is dead then."""

    rank: int
    world_size: int

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks, in place; returns it. The same bits on every rank."""

    @abstractmethod
    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[world_size, *tensor.shape]`: entry r is what rank r gave."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrite `tensor` with that of rank `src`, in place; returns it."""

    @abstractmethod
    def close(self) -> None:
        """Release sockets and threads. No collective may follow."""


class SingleRank(Communicator):
    """A group of one: nothing moves."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:  # noqa: ARG002
        return tensor

    def close(self) -> None:
        return None


class ThreadCommunicator(Communicator):
    """Ranks that are threads of one process: debugging and tests of tensor parallelism without Ray. Made by `group`."""

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
        return tensor.copy_(_sum_in_order(self.all_gather_rows(tensor)))

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


class TorchCommunicator(Communicator):
    """`torch.distributed`'s default group of this process, gloo or nccl. Made by `connect`."""

    def __init__(self, rank: int, world_size: int, backend: str, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._timeout_s = timeout_s
        self._sums_in_order = backend == "gloo"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._sums_in_order:
            self._finish("all_reduce", dist.all_reduce(tensor, async_op=True))
            return tensor
        # Gloo would add half-precision numbers in half precision, in an order that depends on the size of the
        # message, so that a row's bits would depend on the batch it is in. Rank order in float32 depends on neither.
        return tensor.copy_(_sum_in_order(self.all_gather_rows(tensor)))

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty((self.world_size, *tensor.shape))
        work = dist.all_gather_into_tensor(gathered.view(-1), tensor.contiguous().view(-1), async_op=True)
        self._finish("all_gather_rows", work)
        return gathered

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        self._finish("broadcast", dist.broadcast(tensor, src, async_op=True))
        return tensor

    def close(self) -> None:
        dist.destroy_process_group()

    def _finish(self, name: str, work: dist.Work | None) -> None:
        try:
            if work is not None:
                work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise UnavailableError(
                f"{name} on rank {self.rank} of {self.world_size} did not end within {self._timeout_s:g} s or lost "
                f"a peer ({error}); the worker group must be started again") from error


def _sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    # parts: [world_size, ...] -> float32 [...]
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return total


def serve_store(host: str, port: int = 0) -> tuple[TCPStore, int]:
    """Bind the rendezvous of a group on rank 0's `host`; port 0 takes a free one. Returns the store, to be kept as
    long as the group lives, and its port. Raises `ResourcesError` when the port cannot be bound."""
    try:
        store = TCPStore(host, port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise ResourcesError(f"cannot bind the rendezvous of a worker group to {host}:{port}: {error}") from error
    return store, store.port


def connect(rank: int, world_size: int, host: str, port: int, device: torch.device,
            timeout_s: float) -> TorchCommunicator:
    """Join the group whose store listens on `host:port`; returns once all `world_size` ranks have. `timeout_s` is the
    deadline of this and of every collective. Raises `UnavailableError`."""
    deadline = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store = TCPStore(host, port, is_master=False, timeout=deadline)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=deadline,
                                device_id=device if backend == "nccl" else None)
    except RuntimeError as error:
        raise UnavailableError(
            f"rank {rank} of {world_size} could not join its worker group at {host}:{port} within {timeout_s:g} s: "
            f"{error}") from error
    return TorchCommunicator(rank, world_size, backend, timeout_s)
