"""What the scheduler and the block space leave to choice, as pure functions: one file each, and one line here.

`pick` finds a policy by the name that the configuration gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from ...protos.errors import ConfigError
from .eviction import Eviction, lru, retention
from .preemption import Choice, Costs, Preemption, auto, recompute, swap
from .victim import Victim, latest, least_computed
from .watermark import Watermark, none, one_percent

PREEMPTION: dict[str, Preemption] = {"auto": auto, "swap": swap, "recompute": recompute}
VICTIM: dict[str, Victim] = {"latest": latest, "least_computed": least_computed}
EVICTION: dict[str, Eviction] = {"lru": lru, "retention": retention}
WATERMARK: dict[str, Watermark] = {"one_percent": one_percent, "none": none}

T = TypeVar("T", bound=Callable[..., object])


def pick(registry: Mapping[str, T], key: str, name: str) -> T:
    """The policy of that `name`. Raises `ConfigError` that names the configuration's `key` and what there is."""
    if name not in registry:
        raise ConfigError(f"{key}: there is no policy {name!r}; known: {', '.join(registry)}")
    return registry[name]


__all__ = ["EVICTION", "PREEMPTION", "VICTIM", "WATERMARK", "Choice", "Costs", "Eviction", "Preemption", "Victim",
           "Watermark", "pick"]
