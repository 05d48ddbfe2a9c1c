"""What the native ops of a step take, by kind; measured only while somebody asks."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .native.exchange import NativeAllReduce
from .native.library import (
    NativeAttention,
    NativeBest,
    NativeCacheWrite,
    NativeGate,
    NativeLinear,
    NativeNorm,
    NativeQuantization,
    NativeRotation,
    NativeTake,
)

KINDS: dict[type[ctypes.Structure], int] = {
    NativeNorm: 0, NativeRotation: 1, NativeGate: 2, NativeLinear: 3, NativeCacheWrite: 4, NativeQuantization: 5,
    NativeAttention: 6, NativeAllReduce: 7, NativeTake: 8, NativeBest: 9}
"""Of replay.h."""
NAMES = ("norm", "rotation", "activation", "linear", "cache_write", "quantization", "attention", "all_reduce",
         "take_rows", "best_tokens")

Nanoseconds = ctypes.Array[ctypes.c_int64]
"""Per kind."""

_asked = threading.local()


@contextmanager
def op_times() -> Iterator[dict[str, int]]:
    """Nanoseconds of the native ops that this thread runs inside, by the names of `NAMES`; filled at the end."""
    nanoseconds = _asked.nanoseconds = (ctypes.c_int64 * len(NAMES))()
    found: dict[str, int] = {}
    try:
        yield found
    finally:
        del _asked.nanoseconds
        found.update((name, taken) for name, taken in zip(NAMES, nanoseconds, strict=True) if taken)


def asked() -> Nanoseconds | None:
    """Where this thread's ops add what they take; None: nobody asks."""
    return getattr(_asked, "nanoseconds", None)
