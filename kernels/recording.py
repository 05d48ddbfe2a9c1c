"""Native ops called at once, or recorded once and replayed with the tokens of every step: the pattern of CUDA graphs,
where what is saved is Python's time between ops."""

from __future__ import annotations

import ctypes
import math
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .backends import native_library, raise_for
from .native.library import (
    NativeAttention,
    NativeCacheWrite,
    NativeOp,
    NativeQuantization,
    NativeStep,
    NativeStepGroup,
    NativeTake,
)
from .timing import KINDS, asked

_ALIGNMENT = 64
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.slice.Tensor, torch.ops.aten.select.int,
          torch.ops.aten.alias.default, torch.ops.aten.unsqueeze.default, torch.ops.aten.detach.default}
"""Operators of torch that only name memory: what they did once holds in every replay."""

# Of replay.h.
_SAMPLED_ROWS, _NUM_INDICES = 2, 3

_current = threading.local()


class NotRecordableError(Exception):
    """Something was computed that is no native op; the message names it."""


class Step(Protocol):
    """What differs between replays, all contiguous, as in `paged_attention` and `write_kv`; `take_rows` goes by one of
    the first three. Lists: per KV group, in which a residual is the last."""

    @property
    def token_ids(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def sampled_rows(self) -> Tensor: ...

    @property
    def query_start_loc(self) -> Tensor: ...

    @property
    def kv_lens(self) -> Tensor: ...

    @property
    def block_tables(self) -> list[Tensor]: ...

    @property
    def slot_mapping(self) -> list[Tensor]: ...

    @property
    def filled_blocks(self) -> list[Tensor]: ...


def submit(function: Callable[..., int], call: ctypes.Structure) -> None:
    """Run a native op, or have it recorded. Raises what `raise_for` raises."""
    recording: Recording | None = getattr(_current, "recording", None)
    if recording is not None:
        recording.append(call)
        return
    detail, nanoseconds = ctypes.c_int64(), asked()
    if nanoseconds is None or (kind := KINDS.get(type(call))) is None:
        raise_for(function(call, detail), detail.value)
        return
    started = time.perf_counter_ns()
    raise_for(function(call, detail), detail.value)
    nanoseconds[kind] += time.perf_counter_ns() - started


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for the output of a native op."""
    recording: Recording | None = getattr(_current, "recording", None)
    return torch.empty(shape, dtype=dtype) if recording is None else recording.empty(shape, dtype)


class Recording:
    """Ops in order, with memory of their own: an output stays until the next replay overwrites it.

    Record with as many tokens, and rows to sample from, as there may ever be; what is recorded after the latter are
    taken has a row for each of them. The tensors that recorded ops read or write beside their own
    outputs and what a `Step` has must stay where they are; the caller keeps them.
    """

    def __init__(self) -> None:
        self._calls: list[ctypes.Structure] = []
        self._sources: list[int] = []
        self._of_sampled: list[bool] = []
        self._indices: list[int] = []
        self._ops: Any = None
        self._slot_mappings: list[int] = []
        self._block_tables: list[int] = []
        self._filled_blocks: list[int] = []
        self._free: defaultdict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)
        self._regions: list[np.ndarray[Any, Any]] = []

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def num_bytes(self) -> int:
        """Of the outputs' memory."""
        return sum(region.nbytes for region in self._regions)

    @contextmanager
    def record(self, step: Step) -> Iterator[None]:
        """Record the native ops of this thread instead of running them. `step`: the one that they are called with.
        Raises `NotRecordableError` for anything else that computes."""
        self._indices, self._slot_mappings, self._block_tables, self._filled_blocks = (
            [tensor.data_ptr() for tensor in tensors]
            for tensors in (_indices(step), step.slot_mapping, step.block_tables, step.filled_blocks))
        _current.recording = self
        try:
            with _OnlyViews():  # type: ignore[no-untyped-call]
                yield
        finally:
            del _current.recording
        self._ops = (NativeOp * len(self._calls))(*(
            NativeOp(ctypes.addressof(call), KINDS[type(call)], source, of_sampled)
            for call, source, of_sampled in zip(self._calls, self._sources, self._of_sampled, strict=True)))

    def append(self, call: ctypes.Structure) -> None:
        source, of_sampled = 0, bool(self._of_sampled and self._of_sampled[-1])
        if isinstance(call, NativeTake):
            source = self._indices.index(call.index)
            of_sampled |= source == _SAMPLED_ROWS
        elif isinstance(call, NativeCacheWrite):
            source = self._slot_mappings.index(call.slot_mapping)
        elif isinstance(call, NativeAttention):
            source = self._block_tables.index(call.block_tables)
        elif isinstance(call, NativeQuantization):
            source = self._filled_blocks.index(call.blocks)
        elif type(call) not in KINDS:
            raise NotRecordableError(type(call).__name__)
        self._calls.append(call)
        self._sources.append(source)
        self._of_sampled.append(of_sampled)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that no tensor which lives now has. Ops run in the order in which they are recorded, so that what is
        given back while recording may be given out again, as within one run."""
        size = -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if not self._free[size]:
            self._regions.append(np.empty(size + _ALIGNMENT, np.uint8))
            self._free[size].append(self._regions[-1])
        region = self._free[size].pop()
        # A tensor and its views keep the buffer that they are made from.
        address = -(-region.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        buffer = (ctypes.c_char * size).from_address(address)
        weakref.finalize(buffer, self._free[size].append, region)
        return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape)).view(shape)

    def replay(self, step: Step) -> None:
        """Run the ops for the tokens and sampled rows of `step`. Raises what the ops raise."""
        groups = (NativeStepGroup * len(step.block_tables))()
        for number, group in enumerate(groups):
            block_tables = step.block_tables[number]
            group.block_tables, group.max_blocks = block_tables.data_ptr(), block_tables.shape[1]
            group.slot_mapping = step.slot_mapping[number].data_ptr()
            if step.filled_blocks:
                group.filled_blocks = step.filled_blocks[number].data_ptr()
        native_step = NativeStep(
            groups,
            step.query_start_loc.data_ptr(),
            step.kv_lens.data_ptr(),
            (ctypes.c_void_p * _NUM_INDICES)(*(tensor.data_ptr() for tensor in _indices(step))),
            len(groups),
            step.token_ids.numel(),
            step.sampled_rows.numel(),
            step.kv_lens.numel(),
            step.filled_blocks[-1].numel() if step.filled_blocks else 0,
            torch.get_num_threads(),
            asked(),
        )
        detail = ctypes.c_int64()
        raise_for(native_library().replay(self._ops, len(self._calls), native_step, detail), detail.value)


def _indices(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """In the order of replay.h."""
    return step.token_ids, step.positions, step.sampled_rows


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _VIEWS:
            return func(*args, **kwargs or {})
        with self:
            # In inference mode some arrive here before they are told in operators that are basic.
            result = func.decompose(*args, **kwargs or {})
        if result is NotImplemented:
            raise NotRecordableError(f"{func} is no native op")
        return result
