"""A needle in a haystack: a pass key hidden at some depths in filler text, and asked for at its end. With each policy
of KV sparsity, how often the greedy answer names it, against keeping the whole cache. Prints JSON lines.

Usage: python tests/benchmarks/needle.py [--policies NAME ...] [--lengths N ...] [--depths N] [--keys N]
                                          [--budget SHARE]
                                                            needs: kvarto installed, the model in the cache
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

from text import NAME, token_ids

from kvarto import LLM, SamplingParams

MODEL = "smollm2-135m"
QUESTION = "\n\nWhat is the pass key? The pass key is"
NUM_ANSWER = 8


def haystacks(tokenizer: Any, filler: list[int], length: int, num_depths: int, keys: list[str]) -> list[list[int]]:
    """Prompts of `length` tokens: each key at each depth, from the beginning to just before the question."""

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return found

    question = encode(QUESTION)
    prompts = []
    for key in keys:
        needle = encode(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
        num_filler = length - len(needle) - len(question)
        for depth in range(num_depths):
            place = num_filler * depth // max(1, num_depths - 1)
            prompts.append(filler[:place] + needle + filler[place: num_filler] + question)
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["h2o", "snapkv", "tova"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1500, 3000])
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--keys", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the prompt's rows that are kept")
    args = parser.parse_args()
    draw = random.Random(0)
    keys = [str(draw.randrange(10_000, 100_000)) for _ in range(args.keys)]
    print(json.dumps({"filler": NAME, "model": MODEL, "depths": args.depths, "keys": keys}))
    filler = token_ids(MODEL, max(args.lengths))
    params = SamplingParams(temperature=0.0, max_tokens=NUM_ANSWER)
    for length in args.lengths:
        for policy in ["none", *args.policies]:
            options: dict[str, Any] = {}
            if policy != "none":
                options = {"kv_sparsity": policy, "kv_sparsity_budget": int(length * args.budget)}
            began = time.perf_counter()
            with LLM(MODEL, max_model_len=length + NUM_ANSWER, **options) as llm:
                prompts = haystacks(llm.tokenizer, filler, length, args.depths, keys)
                outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
                num_compactions = llm.status()["groups"]["0"]["num_compactions"]
            wanted = [key for key in keys for _ in range(args.depths)]
            found = [key in output.outputs[0].text for key, output in zip(wanted, outputs, strict=True)]
            print(json.dumps({
                "length": length, "kv_sparsity": policy, "budget": options.get("kv_sparsity_budget"),
                "recalled": round(sum(found) / len(found), 3), "prompts": len(found),
                "by_depth": [sum(found[depth:: args.depths]) for depth in range(args.depths)],
                "compactions": num_compactions, "seconds": round(time.perf_counter() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
