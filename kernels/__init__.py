"""kvarto's kernels: one op set, several backends. Shapes, dtypes and errors are documented in `ops.py` (attention and
the KV cache), `int4_ops.py`, `linear_ops.py`, `row_ops.py` and `sparsity_ops.py`, masks in `mask.py`, quantized caches
in `kv_layout.py`, quantized weights in `quantized_weight.py`, ops recorded and replayed in
`recording.py`, timed in `timing.py`."""

from .backends import ExchangeError, available_backends, backend
from .int4_ops import quantize_blocks
from .linear_ops import PackedLinear, linear, pack_linear
from .mask import CAUSAL, FarSinks, Mask, Residual
from .ops import copy_blocks, paged_attention, write_kv
from .quantized_weight import QuantizedWeight, quantize_weight
from .recording import NotRecordableError, Recording
from .row_ops import activate, best_tokens, gated, rms_norm, rotate, take_rows
from .sparsity_ops import attention_scores, compact_rows
from .timing import op_times

__all__ = ["CAUSAL", "ExchangeError", "FarSinks", "Mask", "NotRecordableError", "PackedLinear", "QuantizedWeight",
           "Recording", "Residual", "activate", "attention_scores", "available_backends", "backend", "best_tokens",
           "compact_rows", "copy_blocks", "gated", "linear", "op_times", "pack_linear", "paged_attention",
           "quantize_blocks", "quantize_weight", "rms_norm", "rotate", "take_rows", "write_kv"]
