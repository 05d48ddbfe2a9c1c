"""Tensors that a GGUF file stores in the kernels' own kinds of weight: their codes, not the numbers they stand for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ...kernels import QuantizedWeight

KINDS = {GGMLQuantizationType.Q8_0: "int8", GGMLQuantizationType.Q4_0: "int4", GGMLQuantizationType.Q4_1: "int4"}


def quantized_weight(blocks: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> QuantizedWeight:
    """The weight of rows of whole blocks, `[R, row_bytes]`, whose kind is one of KINDS. It reads back as GGML's does,
    bit for bit."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    # A copy: the file is mapped, and not writable.
    rows = torch.from_numpy(np.array(blocks)).view(len(blocks), -1, block_bytes)
    num_scales = 2 if kind == GGMLQuantizationType.Q4_1 else 1
    scales = rows[..., : 2 * num_scales].contiguous().view(torch.float16)
    codes, scale = rows[..., 2 * num_scales :], scales[..., 0].contiguous()
    in_features = rows.shape[1] * block_size
    if KINDS[kind] == "int8":
        return QuantizedWeight(codes ^ 0x80, scale, None, in_features)
    # Q4_0: (code - 8) * scale.
    minimum = scales[..., 1].contiguous() if num_scales == 2 else -8 * scale
    return QuantizedWeight(torch.cat((codes & 15, codes >> 4), -1), scale, minimum, in_features)
