"""What a step costs the Head in pure Python: `schedule()` and `update()` without any worker.

    python tests/benchmarks/scheduling_cost.py

Prints a JSON line per setting: microseconds per step (medians), and per block for allocate, free, fork and hit.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable

from kvarto.cluster.block_space import BlockSpace, SequenceBlocks
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import AddRequest
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import SampledToken, StepPlan, StepResult

BLOCK_SIZE = 16
PROMPT_LEN = 33
STEPS = 64


def space(num_blocks: int, *, caching: bool = True) -> BlockSpace:
    return BlockSpace([KVGroupSpec(layer_ids=(0,))], [num_blocks], BLOCK_SIZE, num_host_blocks=[0],
                      enable_prefix_caching=caching, hash_key=b"benchmark")


def answer(plan: StepPlan) -> StepResult:
    tokens = [SampledToken(seq_id=step.seq_id, token_id=11) for step in plan.steps]
    return StepResult(epoch=1, step_id=plan.step_id, tokens=tokens)


def decode_steps(num_running: int, num_waiting: int) -> dict[str, float]:
    """Microseconds of a decode step with this many sequences, one plan ahead of the results."""
    scheduler = Scheduler(
        space(num_running * 16), SchedulerLimits(num_running, num_running * (PROMPT_LEN + 1)), epoch=1)
    params = SamplingParams(max_tokens=10_000, ignore_eos=True)
    for index in range(num_running + num_waiting):
        prompt = [index % 50_000, *range(PROMPT_LEN - 1)]
        scheduler.add(AddRequest(request_id=str(index), prompt_token_ids=prompt, params=params), b"f", 10_000)
    plan = scheduler.schedule()
    assert plan is not None and len(plan.steps) == num_running
    schedule_s, update_s = [], []
    # As a serving process does: what lives long is not looked through again and again.
    gc.collect()
    gc.freeze()
    for _ in range(STEPS):
        result = answer(plan)
        began = time.perf_counter()
        plan = scheduler.schedule()
        between = time.perf_counter()
        scheduler.update(result)
        schedule_s.append(between - began)
        update_s.append(time.perf_counter() - between)
        assert plan is not None and len(plan.steps) == num_running
    gc.unfreeze()
    return {"schedule_us": statistics.median(schedule_s) * 1e6, "update_us": statistics.median(update_s) * 1e6,
            "schedule_worst_us": max(schedule_s) * 1e6, "update_worst_us": max(update_s) * 1e6}


def per_block(action: Callable[[], object], num_blocks: int) -> float:
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) / num_blocks * 1e9


def block_operations(num_blocks: int) -> dict[str, float]:
    """Nanoseconds per block of a sequence that takes `num_blocks` of a pool of four times as many."""
    pool = space(4 * num_blocks)
    tokens = list(range(num_blocks * BLOCK_SIZE))
    root = pool.prefix_keys.root("")

    def begin() -> SequenceBlocks:
        begin.count += 1  # type: ignore[attr-defined]
        return pool.open(begin.count, root=root)  # type: ignore[attr-defined]

    begin.count = 0  # type: ignore[attr-defined]
    first, child, second = begin(), begin(), begin()
    found = {"allocate_ns": per_block(lambda: pool.grow(first, len(tokens)), num_blocks)}
    found["offer_ns"] = per_block(lambda: pool.offer(first, tokens), num_blocks)
    found["fork_ns"] = per_block(lambda: pool.fork(first, child), num_blocks)
    found["free_shared_ns"] = per_block(lambda: pool.free(child, busy_until=-1), num_blocks)
    found["free_ns"] = per_block(lambda: pool.free(first, busy_until=-1), num_blocks)
    match = pool.match(second, [*tokens, 1])
    assert len(match) == num_blocks
    found["hit_ns"] = per_block(lambda: pool.attach(second, match), num_blocks)
    pool.free(second, busy_until=-1)
    rest = begin()
    found["allocate_evicting_ns"] = per_block(lambda: pool.grow(rest, 4 * num_blocks * BLOCK_SIZE), 4 * num_blocks)
    pool.check_integrity()
    return found


def main() -> None:
    for num_running, num_waiting in ((64, 0), (256, 0), (1024, 0), (4096, 0), (256, 100_000), (4096, 100_000)):
        found = decode_steps(num_running, num_waiting)
        print(json.dumps({"running": num_running, "waiting": num_waiting} | {k: round(v) for k, v in found.items()}))
    for num_blocks in (100, 1_000, 10_000, 100_000):
        best = [block_operations(num_blocks) for _ in range(3)]
        print(json.dumps({"blocks": num_blocks} | {k: round(min(b[k] for b in best)) for k in best[0]}))


if __name__ == "__main__":
    main()
