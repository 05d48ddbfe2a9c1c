"""The blocks that a plan in flight has to do with, of every KV group: what the plans after it must leave alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("held_sequences", Path(__file__).with_name("held_sequences.py"))
assert _spec and _spec.loader
held_sequences = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(held_sequences)


class PlanInFlight:
    """A plan, and the blocks that it names."""

    def __init__(self, plan, held):
        self.plan = plan
        moves = held_sequences.moves_by_group(plan, len(held.kv_groups))
        self.swaps_out = any(each.swap_outs for each in moves)

        def sources(kind):
            return held_sequences.blocks_of(moves, kind, 0)

        def destinations(kind):
            return held_sequences.blocks_of(moves, kind, 1)

        self.emptied = sources("swap_outs")
        self.emptied_host = sources("disk_stores")
        self.to_host = destinations("swap_outs") | destinations("disk_loads")
        self.swapped_in = destinations("swap_ins")
        to_device = self.swapped_in | destinations("copies")
        self.most_held = len(held.tables) + len(plan.forks)
        before = {seq_id: held.blocks(seq_id) for seq_id in held.tables}
        self.survivors = held.change(plan)
        writes = held.grant(plan)
        # What sequences that start have computed before.
        self.found = {(group, block) for start in plan.starts for group, table in enumerate(held.tables[start.seq_id])
                      for block in table[: -(-start.num_computed_tokens // held.block_size)]}
        self.written = to_device.union(*writes.values()) if writes else to_device
        gained = [blocks - before.get(seq_id, set()) for seq_id, blocks in writes.items()]
        self.gained = to_device.union(*gained) if gained else to_device
        compacted = set(held.compacted(plan))
        self.written, self.gained = self.written | compacted, self.gained | compacted
        self.named = self.emptied | sources("copies") | to_device | compacted
        for step in plan.steps:
            self.named |= held.blocks(step.seq_id)
        self.named_host = self.to_host | self.emptied_host | sources("swap_ins")
        self.filled = set().union(*(self._whole(held, step) & writes[step.seq_id] for step in plan.steps))
        held.finish(plan)
        self.most_held = max(self.most_held, len(held.tables))

    @staticmethod
    def _whole(held, step):
        num_full = (held.rows(step.seq_id) + step.num_tokens) // held.block_size
        return {(group, block) for group, table in enumerate(held.tables[step.seq_id]) for block in table[:num_full]}

    def check_against(self, earlier):
        """What an earlier plan in flight names and nobody owns any more is left alone. A sequence of a group that it
        swapped in may start later than the others."""
        orphaned = earlier.named - self.survivors - (earlier.swapped_in & self.found)
        assert not self.written & orphaned - self.emptied, "writes a block of a plan in flight"
        assert not self.to_host & earlier.named_host - self.emptied_host, "writes a host block of a plan in flight"
