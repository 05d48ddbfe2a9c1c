"""Rotary positions as a GGUF file states them."""

from __future__ import annotations

import math
import os
import struct

from gguf.constants import GGMLQuantizationType

from ...protos.errors import ModelLoadError
from ...protos.model import RopeScaling
from .family import Family
from .gguf_header import GGUFHeader
from .metadata import Metadata

_FREQUENCIES, _SHORT, _LONG = (f"{name}.weight" for name in ("rope_freqs", "rope_factors_short", "rope_factors_long"))


def read_rotary_dim(meta: Metadata, family: Family, architecture: str, head_dim: int) -> int | None:
    """How much of a head turns; None: all. Raises `ModelLoadError`."""
    rotary_dim = meta.integer(f"{architecture}.rope.dimension_count", head_dim)
    if rotary_dim == head_dim:
        return None
    if not family.partial_rotary or rotary_dim % 2 or rotary_dim > head_dim:
        raise ModelLoadError(f"{meta.path}: rotary positions on {rotary_dim} of {head_dim} dimensions are not "
                             "supported")
    return rotary_dim


def read_scaling(header: GGUFHeader, meta: Metadata, architecture: str, rotary_dim: int) -> RopeScaling | None:
    """From the keys and from the tensors of divisors, if there are any. Raises `ModelLoadError`."""
    prefix = f"{architecture}.rope.scaling"
    if _FREQUENCIES in header.tensors:
        return RopeScaling(kind="factors", frequency_factors=_divisors(header, _FREQUENCIES, rotary_dim // 2))
    if _LONG in header.tensors:
        return RopeScaling(
            kind="longrope", original_max_position_embeddings=meta.integer(f"{prefix}.original_context_length"),
            frequency_factors=_divisors(header, _SHORT, rotary_dim // 2),
            long_frequency_factors=_divisors(header, _LONG, rotary_dim // 2),
            attention_factor=meta.number(f"{prefix}.attn_factor", 1.0))
    kind = meta.text(f"{prefix}.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=meta.number(f"{prefix}.factor"))
    raise ModelLoadError(f"{header.path}: rope scaling '{kind}' is not supported; supported: none, linear")


def _divisors(header: GGUFHeader, name: str, count: int) -> tuple[float, ...]:
    tensor = header.tensors.get(name)
    if tensor is None or tensor.shape != (count,) or tensor.kind != GGMLQuantizationType.F32:
        raise ModelLoadError(f"{header.path}: tensor {name} must be float32 [{count}]")
    with open(header.path, "rb") as file:
        data = os.pread(file.fileno(), tensor.num_bytes, tensor.offset)
    divisors = struct.unpack(f"<{count}f", data)
    if not all(math.isfinite(divisor) and divisor > 0 for divisor in divisors):
        raise ModelLoadError(f"{header.path}: tensor {name} holds a divisor that is not a positive, finite number; "
                             "fetch the file again")
    return divisors
