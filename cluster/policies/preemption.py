"""Whether a victim's blocks are moved to host memory or freed and computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, measured when the ranks start: the slowest rank counts."""

    block_copy_s: float
    """One block of every KV group between device and host, one way."""
    prefill_token_s: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The two estimates and what follows from them."""

    swap: bool
    swap_s: float
    recompute_s: float


Preemption = Callable[[Costs, int, int], Choice]
"""(costs, blocks to move, tokens to compute again) -> choice. Where the host has no room, every choice is to
recompute."""


def auto(costs: Costs, num_blocks: int, num_tokens: int) -> Choice:
    """The cheaper one. A swap pays for the way out and for the way back."""
    swap_s, recompute_s = _estimates(costs, num_blocks, num_tokens)
    return Choice(swap_s < recompute_s, swap_s, recompute_s)


def swap(costs: Costs, num_blocks: int, num_tokens: int) -> Choice:
    return Choice(True, *_estimates(costs, num_blocks, num_tokens))


def recompute(costs: Costs, num_blocks: int, num_tokens: int) -> Choice:
    return Choice(False, *_estimates(costs, num_blocks, num_tokens))


def _estimates(costs: Costs, num_blocks: int, num_tokens: int) -> tuple[float, float]:
    return 2 * num_blocks * costs.block_copy_s, num_tokens * costs.prefill_token_s
