"""Attention of one layer on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import (
    FarSinks,
    Mask,
    PackedLinear,
    Residual,
    linear,
    paged_attention,
    quantize_blocks,
    rotate,
    write_kv,
)
from .batch import ForwardBatch
from .far_sinks import FarAngles
from .norms import Norm
from .observer import Observer
from .rope import Angles


@dataclass(frozen=True, slots=True)
class Attention:
    """The heads that this rank holds."""

    group: int
    """KV group whose cache the layer uses, and the layer's place in it."""
    layer_in_group: int
    layer_in_residual: int | None
    """Its place in the last KV group, where that is the residual of an int4 cache; None: there is none."""
    angles: int | None
    """Which of the model's rotary tables turns the heads; None: positions are learned."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    mask: Mask
    qkv: PackedLinear
    q_norm: Norm | None
    k_norm: Norm | None
    o: PackedLinear

    def __call__(self, x: torch.Tensor, angles: list[Angles], far: list[FarAngles | None], batch: ForwardBatch,
                 caches: list[torch.Tensor], observer: Observer | None) -> torch.Tensor:
        """Writes K and V of `x` into the cache; then `observer` looks. `far`: of every KV group. Returns what this rank
        adds to the sum over ranks."""
        # x: [num_tokens, hidden_size]; qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        qkv = linear(x, self.qkv).view(x.shape[0], num_heads + 2 * num_kv_heads, self.head_dim)
        qk, value = qkv[:, :num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads:]
        if self.q_norm is not None and self.k_norm is not None:
            for norm, heads in ((self.q_norm, qk[:, :num_heads]), (self.k_norm, qk[:, num_heads:])):
                norm(heads, out=heads)
        far_sinks = None
        if (far_angles := far[self.group]) is not None:
            far_query = qk[:, :num_heads].clone()
            rotate(far_query, *far_angles.query)
            far_sinks = FarSinks(far_query, *(far_angles.keys or (None, None)))
        if self.angles is not None:
            rotate(qk, *angles[self.angles])
        query, key = qk[:, :num_heads], qk[:, num_heads:]
        cache, place = caches[self.group], self.layer_in_group
        residual = None
        if self.layer_in_residual is None:
            write_kv(key, value, cache, place, batch.slot_mapping[self.group])
        else:
            residual = Residual(caches[-1], self.layer_in_residual, batch.block_tables[-1])
            write_kv(key, value, residual.cache, residual.layer, batch.slot_mapping[-1])
            quantize_blocks(residual.cache, residual.layer, batch.filled_blocks[-1], cache, place,
                            batch.filled_blocks[self.group])
        attended = paged_attention(query, cache, place, batch.block_tables[self.group], batch.query_start_loc,
                                   batch.kv_lens, self.scale, self.mask, far_sinks, residual)
        if observer is not None:
            observer.look(query, cache, place, self.scale, self.mask.soft_cap)
        return linear(attended.flatten(1), self.o)
