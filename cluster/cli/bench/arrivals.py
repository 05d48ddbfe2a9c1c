"""When the requests of a benchmark arrive."""

from __future__ import annotations

import math
import random
from itertools import accumulate

from ....protos.errors import ConfigError


def check_rate(rate: float) -> float:
    """`rate` itself. Raises `ConfigError` unless it is above zero; infinity is a rate."""
    if not rate > 0:  # nan too
        raise ConfigError(f"a rate must be a number of requests per second above 0, or inf (all at once), got {rate:g}")
    return rate


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests arrive: the first at once, the gaps exponential with a mean of
    `1 / rate` s. An infinite rate means all at once. The same seed gives the same gaps, scaled, at every rate."""
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    return list(accumulate((rng.expovariate(1.0) / rate for _ in range(count - 1)), initial=0.0))
