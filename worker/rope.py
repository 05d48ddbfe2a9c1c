"""Rotary positions, in the rotate-half convention of Hugging Face: of the d elements of a head that turn, element j
turns with j + d / 2."""

from __future__ import annotations

import math

import torch

from ..protos.model import ModelConfig, RopeScaling

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of every token, each `[num_tokens, d / 2]` float32."""


def rotary_tables(config: ModelConfig, num_positions: int, device: torch.device, *, local: bool = False
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each `[num_positions, d / 2]` float32 on `device`. `local`: of layers that have a rotary base
    of their own.

    `num_positions` is max_model_len. Scaling of kinds `dynamic` and `longrope` follows it, where Transformers follows
    the length of the sequence at hand, which would change keys that are already in the cache: the results are those of
    Transformers for a sequence of max_model_len tokens. Set it no higher than needed with such models.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    frequencies = _frequencies(config.rotary_dim or config.head_dim, theta, scaling, num_positions)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    magnitude = 1.0 if scaling is None else scaling.attention_factor
    return (angles.cos() * magnitude).to(device), (angles.sin() * magnitude).to(device)


def _frequencies(dim: int, theta: float, scaling: RopeScaling | None, num_positions: int) -> torch.Tensor:
    # [dim / 2]
    if scaling is not None and scaling.kind == "dynamic":
        theta = _stretched(theta, dim, scaling, num_positions)
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "factors":
        return frequencies / torch.tensor(scaling.frequency_factors)
    if scaling.kind == "longrope":
        beyond = num_positions > scaling.original_max_position_embeddings
        return frequencies / torch.tensor(scaling.long_frequency_factors if beyond else scaling.frequency_factors)
    return _llama3(frequencies, scaling) if scaling.kind == "llama3" else _yarn(frequencies, theta, scaling)


def _stretched(theta: float, dim: int, scaling: RopeScaling, num_positions: int) -> float:
    """The base that lets the slowest frequency turn as far within `num_positions` as it did within the original."""
    stretch = max(1.0, num_positions / scaling.original_max_position_embeddings)
    power: float = (scaling.factor * stretch - (scaling.factor - 1)) ** (dim / (dim - 2))
    return theta * power


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Slow frequencies are divided by `factor`, fast ones stay, those between are blended."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return _blended(frequencies, scaling.factor, kept)


def _yarn(frequencies: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """The same, but blended by dimension between those that turn `beta_fast` and `beta_slow` times."""
    dim = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    divided = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
    return _blended(frequencies, scaling.factor, 1.0 - divided)


def _blended(frequencies: torch.Tensor, factor: float, kept: torch.Tensor) -> torch.Tensor:
    kept = kept.clamp(0.0, 1.0)
    return frequencies * kept + frequencies / factor * (1.0 - kept)
