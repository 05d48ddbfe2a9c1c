"""Which rows of the cache a query sees and where they lie, and how its scores are bent: what attention ops take
besides tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mask:
    """A query at row p sees the rows up to p: all of them, or the last `window` (p - window + 1 .. p, its own
    included) and the first `num_sinks`, if it comes after them.

    Sliding windows (Longformer, Beltagy et al. 2020; Mistral), attention sinks (StreamingLLM, Xiao et al. 2023) and the
    lambda-shaped mask of LM-Infinite (Han et al. 2023) are all of this form.
    """

    window: int | None = None
    """None: no window; `num_sinks` then means nothing."""
    num_sinks: int = 0
    soft_cap: float | None = None
    """Scaled scores s become `cap * tanh(s / cap)` before the softmax (Gemma 2)."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.num_sinks < 0:
            raise ValueError(f"num_sinks must not be negative, got {self.num_sinks}")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap must be above 0, got {self.soft_cap}")


CAUSAL = Mask()


@dataclass(frozen=True, slots=True)
class FarSinks:
    """How a query scores *far* sinks: rows j < num_sinks that it sees though they lie behind its window
    (j <= p - window). Their keys meet `query` in the place of the query proper; rows inside the window never do.

    With rotary positions this gives sinks a distance of choice. StreamingLLM (positions inside the cache): `query` is
    turned as at position min(p, num_sinks + window - 1). LM-Infinite (the distance ceiling): `query` is turned as at
    position `window`, and the keys are turned back to position 0 by `cos` and `sin`.
    """

    query: Tensor
    """`[num_tokens, num_heads, head_dim]`, of query's dtype; tokens may be any stride apart."""
    cos: Tensor | None = None
    """`[num_sinks, d / 2]` float32, contiguous: angles of sink rows, by whose opposite the first d elements of their
    keys are turned (rotate-half convention: element i with i + d / 2) before they are scored. None: they stay."""
    sin: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Residual:
    """Beside an int4 cache, the dense cache of the blocks that queries stand in.

    A query at row p reads the rows from `p // block_size * block_size` on here, and those before in the int4 cache:
    what it reads does not depend on how many of its sequence's blocks have been quantized so far.
    """

    cache: Tensor
    """`[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` of query's dtype, as in `write_kv`."""
    layer: int
    """Index into its layers."""
    block_tables: Tensor
    """`[num_seqs, max_blocks]` int32, of the shape of the int4 cache's; only the entries of blocks that the step's
    queries stand in are looked at."""
