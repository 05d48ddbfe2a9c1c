"""Rotary positions as `config.json` states them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...protos.errors import ModelLoadError
from ...protos.model import RopeScaling
from .family import Family
from .metadata import Metadata

_FULL, _LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Rope:
    """What of a `ModelConfig` belongs to rotary positions, and how far they reach."""

    theta: float
    local_theta: float | None
    rotary_dim: int | None
    scaling: RopeScaling | None
    max_positions: int


def read_rope(meta: Metadata, family: Family, head_dim: int, max_positions: int) -> Rope:
    """From `rope_parameters` (Transformers 5) or `rope_theta` and `rope_scaling` (before). `max_positions` is what the
    file states. Raises `ModelLoadError`."""
    section = meta.section("rope_parameters" if "rope_parameters" in meta else "rope_scaling")
    local_theta = family.local_rope_theta_default
    if local_theta is not None:
        local = section.section(_LOCAL)
        local_theta = local.number("rope_theta", meta.number("rope_local_base_freq", local_theta))
        local.require("rope_type", "default", f"for {_LOCAL}")
        section = section.section(_FULL) if _FULL in section else section
    rotary_dim = _rotary_dim(meta, section, family, head_dim)
    scaling = _scaling(meta, section, rotary_dim or head_dim, max_positions)
    if scaling is not None and scaling.kind in ("yarn", "dynamic"):
        # These files state the length before it is stretched.
        max_positions = max(max_positions, int(scaling.factor * scaling.original_max_position_embeddings))
    theta = section.number("rope_theta", meta.number("rope_theta", family.rope_theta_default))
    return Rope(theta, local_theta, rotary_dim, scaling, max_positions)


def _rotary_dim(meta: Metadata, section: Metadata, family: Family, head_dim: int) -> int | None:
    factor = section.number("partial_rotary_factor", meta.number("partial_rotary_factor", 1.0))
    if factor == 1.0:
        return None
    rotary_dim = int(head_dim * factor)
    if not family.partial_rotary or rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ModelLoadError(f"{meta.path}: 'partial_rotary_factor' {factor:g} is not supported for {family.name} with "
                             f"heads of {head_dim}")
    return rotary_dim


def _scaling(meta: Metadata, section: Metadata, rotary_dim: int, max_positions: int) -> RopeScaling | None:
    kind = section.text("rope_type" if "rope_type" in section else "type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=section.number("factor"))
    if kind == "dynamic":
        return RopeScaling(kind="dynamic", factor=section.number("factor"),
                           original_max_position_embeddings=max_positions)
    if kind == "llama3":
        return RopeScaling(
            kind="llama3", factor=section.number("factor"),
            low_freq_factor=section.number("low_freq_factor"), high_freq_factor=section.number("high_freq_factor"),
            original_max_position_embeddings=section.integer("original_max_position_embeddings"))
    key = "original_max_position_embeddings"
    original = meta.integer(key, section.integer(key, max_positions))
    factor = section.number("factor", max_positions / original)
    if kind == "yarn":
        return RopeScaling(
            kind="yarn", factor=factor, original_max_position_embeddings=original,
            attention_factor=section.number("attention_factor", _yarn_attention_factor(section, factor)),
            beta_fast=section.number("beta_fast", 32.0), beta_slow=section.number("beta_slow", 1.0),
            truncate=section.boolean("truncate", True))
    if kind in ("longrope", "su"):
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return RopeScaling(
            kind="longrope", original_max_position_embeddings=original,
            frequency_factors=section.numbers("short_factor", rotary_dim // 2),
            long_frequency_factors=section.numbers("long_factor", rotary_dim // 2),
            attention_factor=section.number("attention_factor", usual))
    raise ModelLoadError(f"{meta.path}: rope scaling '{kind}' is not supported; supported: default, linear, dynamic, "
                         "llama3, yarn, longrope")


def _yarn_attention_factor(section: Metadata, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "mscale" in section and "mscale_all_dim" in section:
        return magnitude(section.number("mscale")) / magnitude(section.number("mscale_all_dim"))
    return magnitude(1.0)
