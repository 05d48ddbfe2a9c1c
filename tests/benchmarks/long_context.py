"""Going on for ever: the perplexity of one sequence of real text, token after token through the whole engine, with each
attention pattern, as it grows far beyond the positions that the model was made for; and the blocks that it holds.
Prints JSON lines.

Usage: python tests/benchmarks/long_context.py [--patterns NAME ...] [--tokens N] [--window N]
                                                            needs: kvarto installed, the model in the cache
"""

from __future__ import annotations

import argparse
import json
import math
import time

from inline_engine import model_engine
from text import NAME, token_ids

from kvarto.cluster.engine.engine import News
from kvarto.protos.request import AddRequest
from kvarto.protos.sampling import SamplingParams

MODEL, BLOCK_SIZE = "smollm2-135m", 16
FIRST = 4_000
BAR = 1.15
SINKS = {"streaming_llm": 4, "lm_infinite": 10}


def measure(pattern: str, text: list[int], window: int) -> dict[str, object]:
    """Steps of one token: every token is decoded, and scored by the one before it."""
    num_sinks = SINKS.get(pattern, 0)
    engine = model_engine(
        MODEL, dtype="bfloat16", block_size=BLOCK_SIZE, attention_pattern=pattern, attention_window=window,
        attention_sinks=num_sinks or None, max_model_len=len(text) + 1, max_num_seqs=1, max_num_batched_tokens=1,
        enable_prefix_caching=False, async_scheduling=False)
    bound = -(-window // BLOCK_SIZE) + -(-num_sinks // BLOCK_SIZE) + 2
    began, most = time.perf_counter(), 0
    logprobs: list[float] = []
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    engine.add(b"benchmark", AddRequest(request_id="text", prompt_token_ids=text, params=params), time.monotonic())
    while engine.load:
        engine.pump(time.monotonic())
        most = max(most, engine.scheduler.space.num_used)
        news: News = []
        engine.receive(time.monotonic(), news)
        logprobs += [entry.logprob for _, delta in news for entry in delta.prompt_logprobs]
    marks = {f"perplexity_{end}": round(math.exp(-sum(logprobs[:end]) / end), 3)
             for end in (FIRST, 8_000, 12_000, 16_000, len(logprobs)) if end <= len(logprobs)}
    tail = logprobs[-FIRST:]
    return {"pattern": pattern, "window": window, "sinks": num_sinks, **marks,
            "perplexity_last_4000": round(math.exp(-sum(tail) / len(tail)), 3), "most_blocks": most,
            "bound": bound, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["streaming_llm", "lm_infinite", "sliding_window"])
    parser.add_argument("--tokens", type=int, default=20_001)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()
    text = token_ids(MODEL, args.tokens)
    print(json.dumps({"text": NAME, "tokens": len(text), "block_size": BLOCK_SIZE, "bar": BAR}))
    for pattern in args.patterns:
        print(json.dumps(measure(pattern, text, args.window)), flush=True)


if __name__ == "__main__":
    main()
