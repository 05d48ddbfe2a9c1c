"""The trace of 64 requests, greedy in float32, in a pool of a quarter of the blocks that it needs: by swap, by
recompute and by AUTO, in alternation, against the tokens that it gives with plenty of blocks. What it needs is the most
blocks in use at once with plenty. Prints a JSON line per run and one with the medians; about half a minute per run.

Usage: python tests/benchmarks/pressure.py [--runs 5] [--prefix-cache]   needs: kvarto installed, the model in the cache
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from inline_engine import Request, model_engine, run

from kvarto.cluster.cli.bench.trace import read_trace
from kvarto.cluster.scheduler import Scheduler
from kvarto.protos.sampling import SamplingParams

TRACE = Path(__file__).parent / "traces" / "sharegpt_like_64.json"
MODES = ("swap", "recompute", "auto")
SHARE_OF_NEEDED = 0.25
BAR = 1.15
"""AUTO against the better of the other two."""
PLENTY = 3000
"""Blocks; more than all requests at their full length can hold."""
MIB = 2**20

Tokens = dict[tuple[str, int], list[int]]


def replay(requests: list[Request], **options: Any) -> tuple[dict[str, Any], Tokens]:
    """A fresh engine each time, so that nothing is left in the pools and every counter begins at zero."""
    engine = model_engine("smollm2-135m", dtype="float32", **options)
    # Threads, buffers and the allocator settle; no preemption yet, and no prompt of the trace.
    run(engine, [(prompt[::-1], SamplingParams(max_tokens=2, temperature=0)) for prompt, _ in requests[:4]])
    most_used = 0

    def after_plan(scheduler: Scheduler) -> None:
        nonlocal most_used
        most_used = max(most_used, scheduler.space.num_used)

    began, cpu_began = time.perf_counter(), time.process_time()
    tokens = run(engine, requests, after_plan)
    seconds, cpu_seconds, status = time.perf_counter() - began, time.process_time() - cpu_began, engine.status(0.0)
    engine.link.close()
    return {
        "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2),
        "out_tok_per_s": round(sum(map(len, tokens.values())) / seconds, 1), "blocks": status["blocks"]["total"],
        "most_used": most_used, "steps": status["num_steps"],
        "swaps": status["num_preemptions_by_swap"], "recomputes": status["num_preemptions_by_recompute"],
        "swap_mib": round((status["swap_out_bytes"] + status["swap_in_bytes"]) / MIB, 1),
        "swap_seconds": round(status["swap_seconds"], 4),
        "block_copy_ms": round(1e3 * status["block_copy_s"], 4),
        "prefill_token_ms": round(1e3 * status["prefill_token_s"], 4)}, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each mode")
    parser.add_argument("--prefix-cache", action="store_true", help="with enable_prefix_caching, off by default")
    args = parser.parse_args()
    requests: list[Request] = [
        (request.prompt, SamplingParams(temperature=0, max_tokens=request.output_len, ignore_eos=True))
        for request in read_trace(TRACE)]
    caching = {"enable_prefix_caching": args.prefix_cache}
    plenty, expected = replay(requests, num_blocks=PLENTY, **caching)
    print(json.dumps({"mode": "plenty"} | plenty), flush=True)
    num_blocks = int(plenty["most_used"] * SHARE_OF_NEEDED)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    cpu_seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(args.runs):
        for place in range(len(MODES)):
            mode = MODES[(number + place) % len(MODES)]
            found, tokens = replay(requests, num_blocks=num_blocks, preemption_mode=mode, **caching)
            different = [key for key, wanted in expected.items() if tokens[key] != wanted]
            print(json.dumps({"mode": mode, "run": number, "sequences_different": len(different)} | found), flush=True)
            assert not different and tokens.keys() == expected.keys(), f"{mode}: other tokens in {different}"
            assert found["swaps"] + found["recomputes"], "the pool is not small enough to preempt anybody"
            seconds[mode].append(found["seconds"])
            cpu_seconds[mode].append(found["cpu_seconds"])
    medians, cpu_medians = (
        {mode: round(statistics.median(values), 2) for mode, values in taken.items()}
        for taken in (seconds, cpu_seconds))
    of_better, cpu_of_better = (
        round(taken["auto"] / min(taken["swap"], taken["recompute"]), 3) for taken in (medians, cpu_medians))
    print(json.dumps({
        "median_seconds": medians, "auto_against_better": of_better, "bar": BAR, "median_cpu_seconds": cpu_medians,
        "auto_against_better_in_cpu_seconds": cpu_of_better, "plenty_seconds": plenty["seconds"],
        "blocks": num_blocks, "needed": plenty["most_used"], "runs": args.runs,
        "tokens_compared_per_run": sum(map(len, expected.values())), "prefix_cache": args.prefix_cache}))


if __name__ == "__main__":
    main()
