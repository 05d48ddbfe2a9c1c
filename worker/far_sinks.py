"""Where attention sinks behind the window seem to stand (StreamingLLM, LM-Infinite), as rotary angles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..protos.model import KVGroupSpec, ModelConfig
from .rope import Angles


@dataclass(frozen=True, slots=True)
class FarAngles:
    """By which one step scores the far sinks of a KV group."""

    query: Angles
    """Of every token, in the place of those of its position."""
    keys: Angles | None
    """`[num_sinks, d / 2]`, by which the keys of the sinks are turned back; None: they stay."""


@dataclass(frozen=True, slots=True)
class FarSinkRule:
    """Rotary positions are relative: to change how far a sink seems to be, another position is given to the query that
    meets it. The cache holds its key as it was written, however far the sequence goes."""

    window: int
    num_sinks: int
    from_zero: bool
    """LM-Infinite (Han et al. 2023, distance ceiling): every sink seems to be exactly `window` tokens away. Otherwise
    StreamingLLM (Xiao et al. 2023, positions within the cache): as if sinks and window were one text."""

    @classmethod
    def of(cls, config: ModelConfig, group: KVGroupSpec) -> FarSinkRule | None:
        """None where sinks are as far as they are, or there are none."""
        if group.window is None or not group.num_sinks or config.sink_distance == "true":
            return None
        return cls(group.window, group.num_sinks, config.sink_distance == "ceiling")

    def angles(self, table: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor) -> FarAngles:
        """`table`: cosines and sines of every position, each `[num_positions, d / 2]`; `positions`: `[num_tokens]`."""
        cos, sin = table
        if self.from_zero:
            far = torch.full_like(positions, self.window)
            keys = cos[:self.num_sinks], sin[:self.num_sinks]
        else:
            far, keys = positions.clamp(max=self.num_sinks + self.window - 1), None
        return FarAngles((cos[far], sin[far]), keys)
