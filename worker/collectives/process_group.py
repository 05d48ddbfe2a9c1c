"""Ranks on any hosts, through `torch.distributed`."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but missing in the stubs

from ...protos.errors import UnavailableError
from .communicator import Communicator, sum_in_order


class TorchCommunicator(Communicator):
    """`torch.distributed`'s default group of this process: NCCL for ranks on GPUs, else Gloo."""

    def __init__(self, store: TCPStore, rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
        """Returns once all `world_size` ranks have come to `store`. Raises `RuntimeError` when they have not after
        `timeout_s`, which is also the deadline of every collective."""
        self.name = "nccl" if device.type == "cuda" else "gloo"
        self.rank = rank
        self.world_size = world_size
        self._timeout_s = timeout_s
        self._sums_in_order = self.name == "gloo"
        dist.init_process_group(self.name, store=store, rank=rank, world_size=world_size,
                                timeout=timedelta(seconds=timeout_s), device_id=device if self.name == "nccl" else None)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._sums_in_order:
            self._finish("all_reduce", dist.all_reduce(tensor, async_op=True))
            return tensor
        # Gloo would add half-precision numbers in half precision, in an order that depends on the size of the
        # message, so that a row's bits would depend on the batch it is in. Rank order in float32 depends on neither.
        return tensor.copy_(sum_in_order(self.all_gather_rows(tensor)))

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
