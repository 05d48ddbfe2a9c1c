"""Blocks that an admission leaves free, so that the running groups do not preempt the newcomer at once."""

from __future__ import annotations

from collections.abc import Callable

Watermark = Callable[[int, int], int]
"""(blocks of the smallest pool, running groups) -> blocks."""


def one_percent(num_blocks: int, num_running: int) -> int:
    """Nothing where nobody runs: a request that fills the pool must be able to start."""
    return num_blocks // 100 if num_running else 0


def none(num_blocks: int, num_running: int) -> int:  # noqa: ARG001
    return 0
