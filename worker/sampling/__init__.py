"""Sampling over tensor-parallel vocabulary slices: ranks exchange candidates, not rows of logits."""

from .errors import NonFiniteLogitsError
from .gather import Gather
from .sampler import Sampled, Sampler
from .state import SamplingState

__all__ = ["Gather", "NonFiniteLogitsError", "Sampled", "Sampler", "SamplingState"]
