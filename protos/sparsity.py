"""How a KV cache is kept small by dropping the tokens that matter least."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

MIN_BUDGET = 32
COMPACTION_INTERVAL = 64
OBSERVATION_WINDOW = 32
"""Last queries of a prompt by which SnapKV scores it."""


class KVSparsity(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Every layer and head keeps the same number of tokens (*rows*), each its own choice.

    A sequence is *compacted* to `budget` rows at the end of its prompt, if it holds more then; with h2o and tova also
    when it decodes and a step leaves `budget + interval` rows.
    """

    policy: Literal["h2o", "snapkv", "tova"]
    """Which rows stay. `h2o`: those with the most attention from all queries so far, and the latest; `snapkv`: from the
    last `window` queries of the prompt, and these; `tova`: from the last query."""
    budget: int
    interval: int
    window: int = 1
    """Queries that one step computes together where the end of a prompt is compacted, because they score it."""

    @property
    def compacts_output(self) -> bool:
        return self.policy != "snapkv"

    @property
    def keeps_scores(self) -> bool:
        """Whether a rank keeps something of a sequence beside its tokens and blocks, which depends on every query."""
        return self.policy == "h2o"
