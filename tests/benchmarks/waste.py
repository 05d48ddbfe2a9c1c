"""Internal waste: KV slots that were allocated and held no token, summed over all steps, on both public traces. Lengths
alone decide it, so the rank answers at once. Prints a JSON line per trace and setting of the prefix cache.

Usage: python tests/benchmarks/waste.py [--block-size 16]        needs: kvarto installed; takes seconds
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from inline_engine import instant_engine, run

from kvarto.cluster.cli.bench.trace import read_trace
from kvarto.cluster.scheduler import Scheduler
from kvarto.protos.sampling import SamplingParams

TRACES = Path(__file__).parent / "traces"
BAR_PERCENT = 4.0
"""The paper: 96.3% of vLLM's KV memory holds tokens (PagedAttention, figure 2)."""


class TailCount:
    """What the engine's accounting must say, counted from the block tables: only its last block may leave a sequence
    slots that hold nothing, and nobody shares that one here."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.allocated = self.unused = 0

    def __call__(self, scheduler: Scheduler) -> None:
        held = [sequence for group in scheduler.groups for sequence in group.live if sequence.has_begun]
        blocks = {block_id for sequence in held for block_id in sequence.blocks.tables[0]}
        self.allocated += len(blocks) * self._block_size
        self.unused += sum(len(sequence.blocks.tables[0]) * self._block_size - sequence.num_computed_tokens
                           for sequence in held)


def measure(trace: Path, block_size: int, *, enable_prefix_caching: bool) -> dict[str, Any]:
    requests = [(request.prompt, SamplingParams(max_tokens=request.output_len, ignore_eos=True))
                for request in read_trace(trace)]
    engine = instant_engine(
        num_blocks=100_000, block_size=block_size, enable_prefix_caching=enable_prefix_caching)
    count = TailCount(block_size)
    run(engine, requests, count)
    status = engine.status(0.0)
    assert status["slots_allocated"] == count.allocated, "the accounting and the block tables disagree"
    assert status["slots_allocated"] - status["slots_used"] == count.unused
    return {
        "trace": trace.name, "block_size": block_size, "prefix_cache": enable_prefix_caching,
        "waste_percent": round(100 * status["kv_waste"], 3), "bar_percent": BAR_PERCENT, "paper_percent": 3.7,
        "steps": status["num_steps"], "requests": len(requests)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-size", type=int, default=16)
    args = parser.parse_args()
    for trace in sorted(TRACES.glob("*.json")):
        for enable_prefix_caching in (False, True):
            print(json.dumps(measure(trace, args.block_size, enable_prefix_caching=enable_prefix_caching)), flush=True)


if __name__ == "__main__":
    main()
