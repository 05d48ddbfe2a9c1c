"""What a worker group's steps add up to: waste, sharing, cache hits, swaps and preemptions."""

from __future__ import annotations

from typing import Any

from ...protos.step import StepPlan, StepResult
from ..block_space.accounting import block_counts, space_map
from ..scheduler import Scheduler


class Accounting:
    """Sums over all steps of one worker group; `block_bytes` of each KV group, over all of its ranks."""

    def __init__(self, scheduler: Scheduler, block_bytes: list[int]) -> None:
        self._scheduler = scheduler
        self._block_bytes = block_bytes
        self.num_steps = 0
        # Their ratios are the internal waste (DESIGN invariant 4) and what sharing saves.
        self.slots_used = 0
        self.slots_allocated = 0
        self.blocks_used = 0
        self.table_entries = 0
        self.num_copied_blocks = 0
        self.swap_out_bytes = 0
        self.swap_in_bytes = 0
        self.swap_seconds = 0.0

    def on_plan(self, plan: StepPlan) -> None:
        space = self._scheduler.space
        used, allocated = space.slots
        self.slots_used += used
        self.slots_allocated += allocated
        self.blocks_used += space.num_used
        self.table_entries += sum(pool.num_references for pool in space.devices)
        self.num_steps += 1
        for moves in plan.moves:
            self.num_copied_blocks += len(moves.copies)
        for moves, size in zip(plan.moves, self._block_bytes, strict=False):
            self.swap_out_bytes += len(moves.swap_outs) * size
            self.swap_in_bytes += len(moves.swap_ins) * size

    def on_result(self, result: StepResult) -> None:
        self.swap_seconds += result.move_seconds

    def status(self) -> dict[str, Any]:
        """For `/v1/status`, the metrics and the benchmarks. Ratios are over all steps so far."""
        scheduler, preemptor = self._scheduler, self._scheduler.preemptor
        return {
            "blocks": block_counts(scheduler.space),
            "num_steps": self.num_steps,
            "slots_used": self.slots_used,
            "slots_allocated": self.slots_allocated,
            "kv_waste": _share(self.slots_allocated - self.slots_used, self.slots_allocated),
            "blocks_used": self.blocks_used,
            "table_entries": self.table_entries,
            "saved_by_sharing": _share(self.table_entries - self.blocks_used, self.table_entries),
            "prefix_queried_tokens": scheduler.admitter.num_queried_tokens,
            "prefix_hit_tokens": scheduler.admitter.num_hit_tokens,
            "prefix_hit_rate": _share(scheduler.admitter.num_hit_tokens, scheduler.admitter.num_queried_tokens),
            "num_copied_blocks": self.num_copied_blocks,
            "swap_out_bytes": self.swap_out_bytes,
            "swap_in_bytes": self.swap_in_bytes,
            "swap_seconds": self.swap_seconds,
            "num_preemptions": preemptor.num_swaps + preemptor.num_recomputes,
            "num_preemptions_by_swap": preemptor.num_swaps,
            "num_preemptions_by_recompute": preemptor.num_recomputes,
            "num_compactions": scheduler.space.num_compactions,
            "num_dropped_rows": scheduler.space.num_dropped_rows,
            "num_rechosen": preemptor.num_rechosen,
            "block_copy_s": preemptor.costs.block_copy_s,
            "prefill_token_s": preemptor.costs.prefill_token_s,
        }

    def block_map(self) -> dict[str, Any]:
        """Every block's state and every sequence's tables: what `kvarto status --blocks` draws."""
        space = self._scheduler.space
        counts, admitter = block_counts(space), self._scheduler.admitter
        used, allocated = space.slots
        totals = counts | {
            "saved_by_sharing": _share(counts["table_entries"] - counts["used"], counts["table_entries"]),
            "internal_waste": _share(allocated - used, allocated),
            "prefix_hit_rate": _share(admitter.num_hit_tokens, admitter.num_queried_tokens),
        }
        sequences = [
            {"request_id": group.request.request_id, "seq_index": sequence.index, "status": group.status.value,
             "num_tokens": sequence.num_tokens, "num_computed_tokens": sequence.num_computed_tokens,
             "num_dropped_tokens": sequence.blocks.num_dropped,
             "block_tables": [list(table) for table in sequence.blocks.tables]}
            for group in self._scheduler.groups for sequence in group.live if sequence.has_begun]
        return {"block_size": space.block_size, "kv_groups": space_map(space), "sequences": sequences,
                "totals": totals}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
