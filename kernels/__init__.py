"""kvarto's kernels: one op set, several backends. Shapes, dtypes and errors are documented in `ops.py`."""

from .ops import (
    PackedLinear,
    available_backends,
    backend,
    copy_blocks,
    linear,
    pack_linear,
    paged_attention,
    write_kv,
)

__all__ = ["PackedLinear", "available_backends", "backend", "copy_blocks", "linear", "pack_linear", "paged_attention",
           "write_kv"]
