"""KV memory saved by sharing inside a request: parallel sampling (n) and beam search (width), on requests whose lengths
are those of the Alpaca and ShareGPT data sets on average. Over all steps, blocks in use against table entries, which is
what there would be without sharing. A trie over the tokens of the same sequences says how much can be shared at the
granularity of blocks: both must agree to the block. Prints a JSON line per setting.

Parallel sampling has a rank that answers at once (forks and lengths decide); beams come from the model, in bfloat16.

Usage: python tests/benchmarks/sharing.py [parallel | beams]        needs: kvarto installed, the model in the cache
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

from inline_engine import VOCAB_SIZE, Request, instant_engine, model_engine, run

from kvarto.cluster.cli.bench.trace import read_trace
from kvarto.cluster.scheduler import Scheduler
from kvarto.protos.sampling import SamplingParams

TRACE = Path(__file__).parent / "traces" / "sharegpt_like_256.json"
BLOCK_SIZE = 16
WIDTHS = (2, 4, 6)
MEAN_LENGTHS = {"alpaca_like": (19, 58), "sharegpt_like": (161, 338)}
"""Tokens of the prompt and of the output (PagedAttention, figure 11)."""
PAPER_PERCENT = {
    ("parallel", "alpaca_like"): [6.1, 9.8], ("parallel", "sharegpt_like"): [16.2, 30.5],
    ("beams", "alpaca_like"): [37.6, 55.2], ("beams", "sharegpt_like"): [44.3, 66.3]}
"""From the narrowest width to the widest (PagedAttention, figure 15 and section 6.3)."""
NUM_REQUESTS = {
    ("parallel", "alpaca_like"): 512, ("parallel", "sharegpt_like"): 256,
    ("beams", "alpaca_like"): 32, ("beams", "sharegpt_like"): 10}
"""The model sets the pace of the beams: there the quantiles are coarser."""


def lengths(mean: int, count: int, rng: random.Random) -> list[int]:
    """Quantiles of an exponential distribution in random order: their mean is `mean` however few there are."""
    quantiles = [-math.log(1 - (index + 0.5) / count) for index in range(count)]
    found = [max(1, round(mean * count * quantile / sum(quantiles))) for quantile in quantiles]
    rng.shuffle(found)
    return found


class Trie:
    """Blocks that the live sequences of each request would take if equal prefixes were held once. A node stands for a
    prefix that ends with a block, full or not; it knows tokens, and nothing of block tables."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, tuple[int, ...]], int] = {}
        self._paths: dict[int, list[int]] = {}
        self.distinct = self.total = 0
        """Sums over all steps: prefixes that differ, and blocks without any sharing."""

    def count(self, scheduler: Scheduler) -> None:
        for group in scheduler.groups:
            paths = [self._path(sequence.seq_id, sequence.token_ids, sequence.num_computed_tokens)
                     for sequence in group.live if sequence.num_computed_tokens]
            self.total += sum(map(len, paths))
            self.distinct += len(set().union(*paths))

    def _path(self, seq_id: int, token_ids: list[int], num_computed: int) -> list[int]:
        path = self._paths.setdefault(seq_id, [])
        while (len(path) + 1) * BLOCK_SIZE <= num_computed:
            begin = len(path) * BLOCK_SIZE
            path.append(self._node(path, token_ids[begin: begin + BLOCK_SIZE]))
        rest = token_ids[len(path) * BLOCK_SIZE: num_computed]
        return [*path, self._node(path, rest)] if rest else path

    def _node(self, path: list[int], token_ids: list[int]) -> int:
        return self._nodes.setdefault((path[-1] if path else -1, tuple(token_ids)), len(self._nodes))


def requests(kind: str, data: str, params: dict[str, Any]) -> list[Request]:
    """Prompts are random tokens for the rank that answers at once, and pieces of real ones for the model."""
    count, rng = NUM_REQUESTS[kind, data], random.Random(data)
    text = [token_id for request in read_trace(TRACE) for token_id in request.prompt]
    prompt_lens, output_lens = (lengths(mean, count, rng) for mean in MEAN_LENGTHS[data])
    found: list[Request] = []
    for prompt_len, output_len in zip(prompt_lens, output_lens, strict=True):
        begin = rng.randrange(len(text) - prompt_len)
        prompt = (rng.choices(range(VOCAB_SIZE), k=prompt_len) if kind == "parallel"
                  else text[begin: begin + prompt_len])
        found.append((prompt, SamplingParams(max_tokens=output_len, ignore_eos=True, **params)))
    return found


def measure(kind: str, data: str, width: int) -> dict[str, Any]:
    params = {"n": width, "seed": 0} if kind == "parallel" else {"beam_width": width}
    trace = requests(kind, data, params)
    # Only what the sequences of one request share counts: no prefix cache.
    engine = (
        instant_engine(num_blocks=100_000, block_size=BLOCK_SIZE, enable_prefix_caching=False) if kind == "parallel"
        else model_engine("smollm2-135m", dtype="bfloat16", block_size=BLOCK_SIZE, enable_prefix_caching=False))
    trie, blocks_used, table_entries, began = Trie(), 0, 0, time.perf_counter()

    def after_plan(scheduler: Scheduler) -> None:
        nonlocal blocks_used, table_entries
        blocks_used += scheduler.space.num_used
        table_entries += sum(pool.num_references for pool in scheduler.space.devices)
        trie.count(scheduler)

    run(engine, trace, after_plan)
    seconds, status = time.perf_counter() - began, engine.status(0.0)
    engine.link.close()
    assert not status["num_preemptions"], "the pool is too small for a count over steps"
    assert status["saved_by_sharing"] == (table_entries - blocks_used) / table_entries, "of the engine's own accounting"
    found = {
        "kind": kind, "data": data, "width": width, "requests": len(trace),
        "mean_prompt_len": round(sum(len(prompt) for prompt, _ in trace) / len(trace), 1),
        "mean_output_len": round(sum(params.max_tokens or 0 for _, params in trace) / len(trace), 1),
        "saved_percent": round(100 * status["saved_by_sharing"], 2),
        "trie_percent": round(100 * (1 - trie.distinct / trie.total), 2),
        "paper_percent_narrowest_to_widest": PAPER_PERCENT[kind, data],
        "blocks": blocks_used, "trie_blocks": trie.distinct, "table_entries": table_entries,
        "trie_table_entries": trie.total, "steps": status["num_steps"], "seconds": round(seconds, 1)}
    assert (blocks_used, table_entries) == (trie.distinct, trie.total), found
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=("parallel", "beams"), help="default: both")
    args = parser.parse_args()
    for kind, data in PAPER_PERCENT:
        if args.kind in (None, kind):
            for width in WIDTHS:
                print(json.dumps(measure(kind, data, width)), flush=True)


if __name__ == "__main__":
    main()
