"""The KV groups of a model, and the cache that each needs on one rank."""

from __future__ import annotations

import math

import torch

from ..kernels.kv_layout import FP8, INT4, int4_head_bytes, row_elements
from ..protos.model import KVGroupSpec, ModelConfig
from .layout import TPLayout

_QUANTIZED = {"int8": torch.int8, "fp8": FP8, "int4": INT4}


def kv_groups(config: ModelConfig, max_model_len: int, kv_cache_dtype: str = "auto") -> list[KVGroupSpec]:
    """The layers of the model by cache policy, those that see everything first, and behind them the residual of an int4
    cache; the order is that of `caches` and of a batch's block tables. A window that no sequence of `max_model_len`
    tokens outgrows is none."""
    policies: dict[tuple[int | None, int], list[int]] = {}
    for layer in range(config.num_layers):
        window = config.layer_windows[layer] if config.layer_windows else None
        if window is None or window >= max_model_len:
            policy: tuple[int | None, int] = (None, 0)
        else:
            policy = (window, config.layer_sinks[layer] if config.layer_sinks else 0)
        policies.setdefault(policy, []).append(layer)
    groups = [KVGroupSpec(layer_ids=tuple(layers), window=window, num_sinks=num_sinks)
              for (window, num_sinks), layers in sorted(policies.items(), key=lambda item: item[0][0] is not None)]
    if kv_cache_dtype == "int4":
        groups.append(KVGroupSpec(layer_ids=tuple(range(config.num_layers)), residual=True))
    return groups


def kv_dtype(group: KVGroupSpec, dtype: torch.dtype, kv_cache_dtype: str) -> torch.dtype:
    """What the elements of the cache of `group` are, where the model computes in `dtype`."""
    return dtype if group.residual else _QUANTIZED.get(kv_cache_dtype, dtype)


def cache_shape(config: ModelConfig, layout: TPLayout, group: KVGroupSpec, num_blocks: int, block_size: int,
                dtype: torch.dtype, kv_cache_dtype: str = "auto") -> tuple[int, ...]:
    """Of the cache of `group` on the rank of `layout`, where the model computes in `dtype`:
    `[num_blocks, num_layers, 2, num_kv_heads, block_size, row]`, a row being head_dim elements and, where these are
    quantized, their scale; or of int4 `[num_blocks, num_layers, num_kv_heads, int4_head_bytes]`."""
    num_layers, num_heads = len(group.layer_ids), layout.num_kv_heads
    if kv_cache_dtype == "int4" and not group.residual:
        return num_blocks, num_layers, num_heads, int4_head_bytes(block_size, config.head_dim)
    row = row_elements(kv_dtype(group, dtype, kv_cache_dtype), config.head_dim)
    return num_blocks, num_layers, 2, num_heads, block_size, row


def block_bytes(config: ModelConfig, layout: TPLayout, group: KVGroupSpec, block_size: int, dtype: torch.dtype,
                kv_cache_dtype: str = "auto") -> int:
    """Bytes of one block of `group` on the rank of `layout`, everything that belongs to it included."""
    shape = cache_shape(config, layout, group, 1, block_size, dtype, kv_cache_dtype)
    return math.prod(shape) * kv_dtype(group, dtype, kv_cache_dtype).itemsize
