"""Which backend serves a call, and how to reach it.

The environment variable KVARTO_KERNELS, read at each call, chooses: `auto` (the default: on a GPU Triton, on a
processor the best native kernels; else torch), `reference`, or the name of a backend in `available_backends()`.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

from .checks import REFERENCE, TRITON
from .native.library import NativeLibrary, load_library
from .triton import available as triton_available

# Keyed by the status of abi.h; {} is the offending sequence or token, or the rank.
STATUS_MESSAGES = {
    2: "query_start_loc must start at 0, never decrease and end at num_tokens; wrong at sequence {}",
    3: "kv_lens: sequence {} holds fewer rows than it has queries, or more than its block table names",
    4: "block_tables: sequence {} names a block outside the cache",
    5: "slot_mapping: the slot of token {} is outside the cache",
    6: "pairs: pair {} names a block outside its tensor",
    7: "num_scored: sequence {} has fewer queries, or the count is negative",
    8: "num_kept: sequence {} names fewer rows, its target table has no room, or the count is negative",
    9: "rows: sequence {} keeps a row outside its source table",
    10: "source_tables: sequence {} names a block outside the cache",
    11: "target_tables: sequence {} names a block outside the cache",
    12: "residual.block_tables: sequence {} names a block outside the cache",
    13: "blocks: entry {} names a block outside its cache",
    14: "rank {} died",
    15: "rank {} did not come in time",
    16: "rank {} is in another collective",
    17: "another rank left or gave up",
    18: "index: entry {} names no row of the table",
}
_OF_EXCHANGES = range(14, 18)


class ExchangeError(RuntimeError):
    """A collective failed because of another rank; all later ones of the exchange fail too."""


def available_backends(device_type: str = "cpu") -> tuple[str, ...]:
    """Every backend that runs on such devices, slowest first; a missing native library is warned about once."""
    if device_type != "cpu":
        return (REFERENCE, *([TRITON] if triton_available.runs_on(device_type) else ()))
    library = load_library()
    return (REFERENCE, *(library.isas if library else ()))


def backend(device_type: str = "cpu") -> str:
    """The backend that a call made now would use, on tensors of such a device ("cpu", "cuda").

    Returns:
        One of `triton`, `native-avx512-bf16`, `native-avx512`, `native-avx2`, `native-portable`, `torch-reference`.

    Raises:
        ValueError: KVARTO_KERNELS names a backend that is unknown or does not run here.
    """
    chosen = os.environ.get("KVARTO_KERNELS", "auto")
    if chosen in ("reference", REFERENCE):
        return REFERENCE
    if chosen == TRITON and triton_available.runs_on(device_type):
        return TRITON  # on a processor this is the interpreter, for tests
    if chosen == "auto" and device_type != "cpu":
        return available_backends(device_type)[-1]
    return _resolve(chosen, load_library())


@functools.cache
def _resolve(chosen: str, library: NativeLibrary | None) -> str:
    available: tuple[str, ...] = (REFERENCE, *(library.isas if library else ()))
    if chosen == "auto":
        return available[-1]
    if chosen not in available:
        raise ValueError(f"KVARTO_KERNELS={chosen!r}; here it can be auto, {', '.join(available)}")
    return chosen


def triton_launch(module: str = "launch") -> ModuleType:
    """What launches the Triton kernels; not imported before it is needed, since Triton may not be there."""
    return importlib.import_module(f".triton.{module}", __package__)


def native_library() -> NativeLibrary:
    library = load_library()
    if library is None:
        raise RuntimeError("the native kernels disappeared after a backend was chosen")
    return library


def raise_for(status: int, detail: int) -> None:
    if status == 1:
        raise MemoryError("the native kernels could not get their working memory")
    if status in _OF_EXCHANGES:
        raise ExchangeError(STATUS_MESSAGES[status].format(detail))
    if status != 0:
        raise ValueError(STATUS_MESSAGES[status].format(detail))
