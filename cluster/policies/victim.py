"""Which of the running groups gives its blocks up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Preemptible(Protocol):
    @property
    def key(self) -> tuple[int, int]:
        """(priority, order of arrival): smaller goes first."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose keys and values it holds, over all its sequences."""


Victim = Callable[[Sequence[Preemptible]], int]
"""Index of the victim among the candidates: running groups in the order of their keys, all behind the one that needs
blocks, so that whoever is first in line always makes progress."""


def latest(candidates: Sequence[Preemptible]) -> int:
    """Lowest priority, then latest arrival."""
    return len(candidates) - 1


def least_computed(candidates: Sequence[Preemptible]) -> int:
    """Lowest priority, then least to lose."""
    lowest = candidates[-1].key[0]
    return min((i for i, group in enumerate(candidates) if group.key[0] == lowest),
               key=lambda i: (candidates[i].num_computed_tokens, -i))
