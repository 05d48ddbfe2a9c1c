"""What one sequence holds of the block space."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class SequenceBlocks:
    """Block tables of a sequence, empty while it holds nothing. Only the block space changes one."""

    seq_id: int
    tables: list[list[int]]
    """Per KV group: a positive entry is a device block, a negative one the host block of that number, and 0 the null
    block: none is needed there any more. A last block that is not full is never 0."""
    num_tokens: int = 0
    """Slots filled, by the plans sent so far and the one being made: rows."""
    num_dropped: int = 0
    """Tokens computed whose rows compactions have dropped: token p is in slot p - num_dropped."""
    capacity: int = 0
    """Slots of the blocks held."""
    may_share_tail: bool = False
    """A fork has made another sequence point at the last, partly filled block."""
    root: bytes | None = None
    """What the keys are chained to; None: its blocks are not shared by content."""
    keys: list[bytes] = field(default_factory=list)
    """Of the full blocks of the tokens known, as far as they were needed."""
    num_keyed: int = 0
    """Leading blocks that were found by their key or offered under it; none once rows are dropped."""
    priority: int = 0
    """Of the request: eviction may heed it."""
    num_behind: list[int] = field(init=False)
    """Per KV group the leading entries, sinks apart, that are 0 because its window has passed them."""

    def __post_init__(self) -> None:
        self.num_behind = [0] * len(self.tables)

    @property
    def holds_device_blocks(self) -> bool:
        return any(entry > 0 for table in self.tables for entry in table)
