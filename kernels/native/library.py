"""Loads libkvarto_kernels.so and mirrors its C ABI (`abi.h`, `sparsity.h`) for ctypes, which releases Python's lock."""

from __future__ import annotations

import ctypes
import functools
import warnings
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

# First, so that our library binds to the OpenMP runtime that torch brings and both share its threads.
import torch

from .exchange import ExchangeFunctions

if TYPE_CHECKING:
    from ctypes import _Pointer

    from ..checks import CacheShape

ABI_VERSION = 13
LIBRARY_PATH = Path(__file__).resolve().with_name("libkvarto_kernels.so")
HOW_TO_BUILD = (
    "install a C++17 compiler with OpenMP (Debian: apt-get install g++) and run `pip install` of kvarto again, "
    "or `python -m kvarto.kernels.native.build` in a checkout"
)


class NativeCache(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("num_blocks", c_int64),
        ("num_layers", c_int64),
        ("num_kv_heads", c_int64),
        ("block_size", c_int64),
        ("head_dim", c_int64),
        ("dtype", c_int32),
    ]


def native_cache(cache: torch.Tensor, shape: CacheShape, dtype: int) -> NativeCache:
    """`dtype`: a number of `abi.h`."""
    sizes = shape._replace(num_blocks=cache.shape[0], num_layers=cache.shape[1])
    return NativeCache(cache.data_ptr(), *sizes, dtype)


class NativeAttention(ctypes.Structure):
    _fields_ = [
        ("cache", NativeCache),
        ("query", c_void_p),
        ("far_query", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("out", c_void_p),
        ("block_tables", c_void_p),
        ("query_start_loc", c_void_p),
        ("kv_lens", c_void_p),
        ("residual", NativeCache),
        ("residual_tables", c_void_p),
        ("residual_layer", c_int64),
        ("num_tokens", c_int64),
        ("num_seqs", c_int64),
        ("max_blocks", c_int64),
        ("num_heads", c_int64),
        ("query_stride", c_int64),
        ("far_query_stride", c_int64),
        ("num_angles", c_int64),
        ("layer", c_int64),
        ("window", c_int64),
        ("num_sinks", c_int64),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("dtype", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class NativeCacheWrite(ctypes.Structure):
    _fields_ = [
        ("cache", NativeCache),
        ("key", c_void_p),
        ("value", c_void_p),
        ("slot_mapping", c_void_p),
        ("num_tokens", c_int64),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("layer", c_int64),
        ("dtype", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class NativeQuantization(ctypes.Structure):
    _fields_ = [
        ("residual", NativeCache),
        ("cache", NativeCache),
        ("residual_blocks", c_void_p),
        ("blocks", c_void_p),
        ("num_blocks", c_int64),
        ("residual_layer", c_int64),
        ("layer", c_int64),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class NativeScores(ctypes.Structure):
    _fields_ = [
        ("attention", NativeAttention),
        ("num_scored", c_void_p),
        ("out", c_void_p),
    ]


class NativeCompaction(ctypes.Structure):
    _fields_ = [
        ("cache", NativeCache),
        ("rows", c_void_p),
        ("source_tables", c_void_p),
        ("target_tables", c_void_p),
        ("num_kept", c_void_p),
        ("num_seqs", c_int64),
        ("max_kept", c_int64),
        ("max_source_blocks", c_int64),
        ("max_target_blocks", c_int64),
        ("layer", c_int64),
        ("num_threads", c_int32),
    ]


class NativeLinear(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p),
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("x_stride", c_int64),
        ("x_dtype", c_int32),
        ("weight_dtype", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class NativeBlockCopy(ctypes.Structure):
    _fields_ = [
        ("source", c_void_p),
        ("destination", c_void_p),
        ("pairs", c_void_p),
        ("num_pairs", c_int64),
        ("block_bytes", c_int64),
        ("num_source_blocks", c_int64),
        ("num_destination_blocks", c_int64),
        ("source_stride", c_int64),
        ("destination_stride", c_int64),
        ("num_threads", c_int32),
    ]


class NativeNorm(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p),
        ("addend", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("num_tokens", c_int64),
        ("heads", c_int64),
        ("dim", c_int64),
        ("x_stride", c_int64),
        ("out_stride", c_int64),
        ("eps", c_float),
        ("plus_one", c_int32),
        ("dtype", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class NativeRotation(ctypes.Structure):
    _fields_ = [
        ("heads", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("num_tokens", c_int64),
        ("num_heads", c_int64),
        ("head_dim", c_int64),
        ("num_angles", c_int64),
        ("stride", c_int64),
        ("dtype", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class NativeGate(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p),
        ("out", c_void_p),
        ("num_tokens", c_int64),
        ("dim", c_int64),
        ("activation", c_int32),
        ("dtype", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class NativeBest(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p),
        ("values", c_void_p),
        ("ids", c_void_p),
        ("num_tokens", c_int64),
        ("dim", c_int64),
        ("x_stride", c_int64),
        ("dtype", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class NativeTake(ctypes.Structure):
    _fields_ = [
        ("table", c_void_p),
        ("index", c_void_p),
        ("out", c_void_p),
        ("num_tokens", c_int64),
        ("num_rows", c_int64),
        ("dim", c_int64),
        ("first", c_int64),
        ("scale", c_float),
        ("partial", c_int32),
        ("dtype", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]


class NativeOp(ctypes.Structure):
    _fields_ = [
        ("call", c_void_p),
        ("kind", c_int32),
        ("source", c_int32),
        ("of_sampled", c_int32),
    ]


class NativeStepGroup(ctypes.Structure):
    _fields_ = [
        ("block_tables", c_void_p),
        ("slot_mapping", c_void_p),
        ("filled_blocks", c_void_p),
        ("max_blocks", c_int64),
    ]


class NativeStep(ctypes.Structure):
    _fields_ = [
        ("groups", POINTER(NativeStepGroup)),
        ("query_start_loc", c_void_p),
        ("kv_lens", c_void_p),
        ("indices", c_void_p * 3),  # as many as _NUM_INDICES of recording.py
        ("num_groups", c_int64),
        ("num_tokens", c_int64),
        ("num_sampled", c_int64),
        ("num_seqs", c_int64),
        ("num_filled", c_int64),
        ("num_threads", c_int32),
        ("nanoseconds", POINTER(c_int64)),
    ]


class NativeLibrary:
    """The library's functions, typed, and the instruction sets that it and this processor share.

    Functions that check their input return a status of `abi.h` and leave the offending index in `detail`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        detail: type[_Pointer[c_int64]] = POINTER(c_int64)
        ops: list[tuple[str, type[ctypes.Structure]]] = [
            ("write_kv", NativeCacheWrite), ("quantize_blocks", NativeQuantization), ("copy_blocks", NativeBlockCopy),
            ("paged_attention", NativeAttention), ("attention_scores", NativeScores),
            ("compact_rows", NativeCompaction), ("linear", NativeLinear), ("norm", NativeNorm),
            ("rotate", NativeRotation), ("gate", NativeGate), ("best", NativeBest), ("take", NativeTake)]
        for name, call in ops:
            getattr(library, f"kvarto_{name}").argtypes = [POINTER(call), detail]
        self.write_kv = library.kvarto_write_kv
        self.quantize_blocks = library.kvarto_quantize_blocks
        self.copy_blocks = library.kvarto_copy_blocks
        self.paged_attention = library.kvarto_paged_attention
        self.attention_scores = library.kvarto_attention_scores
        self.compact_rows = library.kvarto_compact_rows
        self.linear = library.kvarto_linear
        self.norm = library.kvarto_norm
        self.rotate = library.kvarto_rotate
        self.gate = library.kvarto_gate
        self.best = library.kvarto_best
        self.take = library.kvarto_take
        self.replay = library.kvarto_replay
        self.replay.argtypes = [POINTER(NativeOp), c_int64, POINTER(NativeStep), detail]
        self.pack_linear = library.kvarto_pack_linear
        self.pack_linear.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_int32, c_int32, c_void_p]
        self.pack_linear.restype = None
        self.packed_elements = library.kvarto_packed_elements
        self.packed_elements.argtypes = [c_int64, c_int64]
        self.packed_elements.restype = c_int64
        self.exchange = ExchangeFunctions(library)
        self.isas = _runnable_isas(library)


def _runnable_isas(library: ctypes.CDLL) -> dict[str, int]:
    """Name of the backend ("native-avx2") -> number in the library, best last."""
    library.kvarto_isa_name.restype = c_char_p
    isas = {}
    for number in range(library.kvarto_num_isas()):
        if name := library.kvarto_isa_name(number):
            isas["native-" + name.decode().replace("_", "-")] = number
    return isas


@functools.cache
def load_library() -> NativeLibrary | None:
    """The native kernels, or None, after one warning that says what to do, where they cannot be used."""
    problem = f"{LIBRARY_PATH} does not exist"
    if LIBRARY_PATH.exists():
        try:
            library = ctypes.CDLL(str(LIBRARY_PATH))
            found = library.kvarto_abi_version()
        except (OSError, AttributeError) as error:
            problem = f"{LIBRARY_PATH} cannot be loaded ({error})"
        else:
            if found == ABI_VERSION:
                return NativeLibrary(library)
            problem = f"{LIBRARY_PATH} has ABI version {found}, this kvarto needs {ABI_VERSION}"
    warnings.warn(
        f"kvarto runs WITHOUT its native CPU kernels, many times slower: {problem}. To get them, {HOW_TO_BUILD}.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None
