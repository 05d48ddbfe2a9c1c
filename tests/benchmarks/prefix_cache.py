"""Throughput with the prefix cache against without: 64 requests at once of 341 shared and 30 own prompt tokens, 30
tokens out, greedy. Both run in alternation in this process, each time with a prefix never seen before, and must give
the same tokens (asserted in float32; in bfloat16 differences are counted). Prints one JSON line.

Usage: python tests/benchmarks/prefix_cache.py [--dtype float32] [--runs 5]   needs: kvarto installed, the model cached
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

from kvarto import LLM, SamplingParams

NUM_REQUESTS, SHARED_LEN, OWN_LEN, OUTPUT_LEN = 64, 341, 30, 30
BLOCK_SIZE = 16
NUM_BLOCKS = 4096
"""Enough for three runs of all requests, so that nothing is preempted and the default sizes do not matter."""
BAR = 2.0


def prompts(seed: str, vocab_size: int, count: int = NUM_REQUESTS) -> list[list[int]]:
    rng = random.Random(seed)
    shared = rng.choices(range(vocab_size), k=SHARED_LEN)
    return [shared + rng.choices(range(vocab_size), k=OWN_LEN) for _ in range(count)]


def run(llm: LLM, requests: list[list[int]]) -> tuple[float, list[list[int]], list[int]]:
    """Seconds, tokens, and the prompt tokens of each request that were found in the cache."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    outputs = llm.generate(requests, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = [output.outputs[0].token_ids for output in outputs]
    return seconds, tokens, [output.num_cached_tokens for output in outputs]


def measure(model: str, dtype: str, num_runs: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    num_cached = num_different = 0
    with (LLM(model, dtype=dtype, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, enable_prefix_caching=True) as on,
          LLM(model, dtype=dtype, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, enable_prefix_caching=False) as off):
        vocab_size = on.status()["info"]["vocab_size"]
        for llm in (on, off):
            run(llm, prompts("warm-up", vocab_size, count=4))
        for number in range(num_runs):
            requests, tokens = prompts(f"run {number}", vocab_size), {}
            for name, llm in (("on", on), ("off", off)) if number % 2 else (("off", off), ("on", on)):
                taken, tokens[name], cached = run(llm, requests)
                seconds[name].append(taken)
                num_cached += sum(cached)
            different = sum(one != other for a, b in zip(tokens["on"], tokens["off"], strict=True)
                            for one, other in zip(a, b, strict=True))
            assert not (different and dtype == "float32"), f"run {number}: {different} tokens differ"
            num_different += different
        group = off.status()["groups"]["0"]
        assert not group["prefix_hit_tokens"] and not group["num_preemptions"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    num_out, num_prompt = NUM_REQUESTS * OUTPUT_LEN, NUM_REQUESTS * (SHARED_LEN + OWN_LEN)
    # The first computes the prefix for the others, which share its full blocks.
    most_cached = (NUM_REQUESTS - 1) * (SHARED_LEN // BLOCK_SIZE * BLOCK_SIZE)
    return {
        "dtype": dtype, "runs": num_runs,
        "out_tok_per_s_on": round(num_out / medians["on"], 1), "out_tok_per_s_off": round(num_out / medians["off"], 1),
        "ratio": round(medians["off"] / medians["on"], 2), "bar": BAR,
        "ratios_of_runs": [round(b / a, 2) for a, b in zip(seconds["on"], seconds["off"], strict=True)],
        "seconds_on": [round(value, 2) for value in seconds["on"]],
        "seconds_off": [round(value, 2) for value in seconds["off"]],
        "hit_rate_percent": round(100 * num_cached / (num_runs * num_prompt), 2),
        "hit_rate_at_best_percent": round(100 * most_cached / num_prompt, 2),
        "tokens_compared": num_runs * num_out, "tokens_different": num_different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps(measure(args.model, args.dtype, args.runs)))


if __name__ == "__main__":
    main()
