"""kvarto's kernels: one op set, several backends. Shapes, dtypes and errors are documented in `ops.py` (attention and
the KV cache), `int4_ops.py` and `linear_ops.py`, masks in `mask.py`, quantized caches in `kv_layout.py`."""

from .backends import available_backends, backend
from .int4_ops import quantize_blocks
from .linear_ops import PackedLinear, linear, pack_linear
from .mask import CAUSAL, FarSinks, Mask, Residual
from .ops import copy_blocks, paged_attention, write_kv

__all__ = ["CAUSAL", "FarSinks", "Mask", "PackedLinear", "Residual", "available_backends", "backend", "copy_blocks",
           "linear", "pack_linear", "paged_attention", "quantize_blocks", "write_kv"]
