"""Which cached block is evicted first: the least recently used one of the lowest level that has any."""

from __future__ import annotations

from collections.abc import Callable

NUM_LEVELS = 4

Eviction = Callable[[int, int], int]
"""(priority of the request that filled the block, how often it was found since) -> level in 0 .. NUM_LEVELS - 1."""


def lru(priority: int, num_hits: int) -> int:  # noqa: ARG001
    """Only the time of last use counts."""
    return 0


def retention(priority: int, num_hits: int) -> int:
    """What was found before outlives what never was, and what an urgent request filled outlives the rest: a shared
    system prompt stays where a flood of one-off prompts passes through."""
    return min(NUM_LEVELS - 1, (2 if num_hits else 0) + (1 if priority < 0 else 0))
