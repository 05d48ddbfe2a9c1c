"""One step's rows and their parameters as arrays, and which of the ways of sampling each of them goes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .philox import uniforms
from .state import NO_LIMIT, SamplingState

_LOG2_E = 1.4426950408889634
_MAX_SCALE = 1e30


class Batch:
    """The R rows of one step. Made of what every rank knows alike, so that all ranks take the same ways.

    `open`: drawn from the whole vocabulary. `truncated`: top-k, top-p or min-p. The rest is greedy. `weighed`: rows
    whose total mass over the vocabulary is needed, an ascending union of `open` and those truncated by top-p alone.
    """

    def __init__(self, states: list[SamplingState], positions: list[int]) -> None:
        # [R] each
        temperature = np.array([s.temperature for s in states])
        self.top_k = np.array([s.top_k for s in states], dtype=np.int64)
        self.top_p = np.array([s.top_p for s in states])
        self.min_p = np.array([s.min_p for s in states])
        drawn = temperature > 0.0
        narrow = (self.top_k < NO_LIMIT) | (self.min_p > 0.0)
        truncated = drawn & (narrow | (self.top_p < 1.0))
        self.open: NDArray[np.intp] = np.flatnonzero(drawn & ~truncated)
        self.truncated: NDArray[np.intp] = np.flatnonzero(truncated)
        self.weighed: NDArray[np.intp] = np.flatnonzero(drawn & ~narrow)
        # A temperature below 1e-30 acts as 1e-30: past that, 0 * scale would be NaN at the maximum.
        self.scales = np.full(len(states), _LOG2_E)
        self.scales[drawn] = np.minimum(_LOG2_E / temperature[drawn], _MAX_SCALE).astype(np.float32)
        """log2(e) / temperature, a float32 value: the likelihood of a logit l is 2 ** ((l - maximum) * scale)."""
        self.uniforms = np.zeros(len(states))
        if drawn.any():
            self.uniforms = uniforms([s.seed for s in states], [s.seq_index for s in states], positions)
