"""Collectives of ranks that share memory. Native only: `supported()` says whether a call made now could be served."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import backend, native_library
from .checks import DTYPE_NUMBERS, REFERENCE, TRITON, check_device, check_dtype, dense
from .native.exchange import ExchangeFunctions, NativeAllGather, NativeAllReduce, NativeBroadcast, NativeExchangeConfig
from .recording import submit

MAX_RANKS = 64
SLOT_BYTES = 1 << 18
"""Longer messages go in pieces. Two slots of each of a few ranks stay in the cache."""
SPIN_S = 100e-6
"""Longer than ranks are apart in a step of one sequence, and some times what sleeping and being woken takes. Others get
the core meanwhile, so that it costs nothing where ranks share one."""


def supported() -> bool:
    """Whether the backend in use has collectives."""
    return backend("cpu") not in (REFERENCE, TRITON)


def region_bytes(world_size: int) -> int:
    """Size of the memory that `world_size` ranks share."""
    return int(native_library().exchange.region_bytes(world_size, SLOT_BYTES))


class Exchange:
    """One rank's end of a shared region. Every rank makes the same calls in the same order, with tensors of the same
    shape and dtype, one at a time. Memory and descriptors live until the object is collected, so that a call or a
    recorded call never outlives them."""

    def __init__(self, region: mmap.mmap, rank: int, world_size: int, timeout_s: float,
                 peer_fds: Sequence[int] = ()) -> None:
        """
        Args:
            region: `region_bytes(world_size)`, shared by all ranks; zeros before the first of them comes.
            timeout_s: the deadline of every call.
            peer_fds: per rank a pidfd (or another descriptor that becomes readable when the rank dies), -1 for none;
                owned by the exchange from now on. Empty: the ranks are threads of one process.

        Raises:
            ValueError: a region that is too small, or a rank or descriptors that do not fit `world_size`.
        """
        if not 0 <= rank < world_size <= MAX_RANKS:
            raise ValueError(f"rank {rank} of {world_size} does not exist; an exchange has up to {MAX_RANKS}")
        if len(region) < region_bytes(world_size):
            raise ValueError(f"{world_size} ranks need {region_bytes(world_size)} bytes, the region has {len(region)}")
        if peer_fds and len(peer_fds) != world_size:
            raise ValueError(f"{len(peer_fds)} descriptors for {world_size} ranks")
        self.rank = rank
        self.world_size = world_size
        self._functions = native_library().exchange
        self._region = region
        fds = (ctypes.c_int32 * world_size)(*(peer_fds or [-1] * world_size))
        self._handle = self._functions.open(NativeExchangeConfig(
            ctypes.addressof(ctypes.c_char.from_buffer(region)), ctypes.addressof(fds), SLOT_BYTES,
            int(timeout_s * 1e9), int(SPIN_S * 1e9), rank, world_size))
        if self._handle is None:
            raise MemoryError("the native kernels could not get their working memory")
        # Not at exit: a thread may still be in a call then, and the process takes everything with it.
        weakref.finalize(self, _close, self._functions, self._handle, region, tuple(peer_fds)).atexit = False

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place: in float32, in rank order, rounded once. Returns it.

        Args:
            tensor: `[num_tokens, ...]`, float32, bfloat16 or float16, contiguous.

        Raises:
            TypeError: a wrong dtype.
            ValueError: a wrong layout or device.
            ExchangeError: another rank is gone, late or elsewhere.
        """
        submit(self._functions.all_reduce, self.all_reduce_call(tensor))
        return tensor

    def all_reduce_call(self, tensor: Tensor) -> NativeAllReduce:
        """What `all_reduce` hands to the library. It can be made again and again, with other `data` and `num_tokens`,
        as long as the exchange lives. Raises as `all_reduce` does."""
        name = backend("cpu")
        check_dtype("tensor", tensor)
        check_device("tensor", tensor, name)
        dense(tensor, "tensor")
        num_tokens = tensor.shape[0] if tensor.dim() else 1
        dim = tensor.shape[1:].numel()
        return NativeAllReduce(self._handle, tensor.data_ptr(), num_tokens, dim, DTYPE_NUMBERS[tensor.dtype],
                               native_library().isas[name], torch.get_num_threads())

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`[world_size, *tensor.shape]`: entry r is what rank r gave.

        Args:
            tensor: of any shape and dtype, contiguous, on the CPU.

        Raises:
            ValueError: a wrong layout or device.
            ExchangeError: another rank is gone, late or elsewhere.
        """
        _check_bytes(tensor)
        out = tensor.new_empty((self.world_size, *tensor.shape))
        call = NativeAllGather(self._handle, tensor.data_ptr(), out.data_ptr(), tensor.nbytes)
        submit(self._functions.all_gather, call)
        return out

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite `tensor` with that of rank `source`, in place; returns it. Arguments and errors as in `all_gather`,
        and `ValueError` for a rank that does not exist."""
        _check_bytes(tensor)
        if not 0 <= source < self.world_size:
            raise ValueError(f"rank {source} of {self.world_size} does not exist")
        submit(self._functions.broadcast, NativeBroadcast(self._handle, tensor.data_ptr(), tensor.nbytes, source))
        return tensor

    def abort(self) -> None:
        """Let the calls of every rank fail, those that wait too, unless all ranks have already given their part. May be
        called from any thread, more than once."""
        self._functions.abort(self._handle)


def _check_bytes(tensor: Tensor) -> None:
    check_device("tensor", tensor, backend("cpu"))
    dense(tensor, "tensor")


def _close(functions: ExchangeFunctions, handle: int, region: mmap.mmap, fds: Sequence[int]) -> None:  # noqa: ARG001
    # The region, held as long as this is to be called, outlives the handle.
    functions.close(handle)
    for fd in fds:
        if fd >= 0:
            os.close(fd)
