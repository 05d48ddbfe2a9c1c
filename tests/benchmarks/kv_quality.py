"""What a smaller KV cache costs in quality: the perplexity of real text, token after token through the paged cache
(teacher-forced decode, all contexts in one batch), with each cache dtype against that of the model. Prints JSON lines.

With --sparsity, instead, that of the second half of each context, whose first half is the prompt: every policy at half
the rows of a full cache (snapkv: half of the prompt's; h2o and tova: half of the context's) against keeping all.

With --weights, instead, that of quantized weights beside a cache of the model's dtype.

Usage: python tests/benchmarks/kv_quality.py [--dtypes auto int8 fp8 int4] [--context N] [--contexts N] [--block-size N]
       python tests/benchmarks/kv_quality.py --sparsity h2o snapkv tova [--context N] [--contexts N] [--block-size N]
       python tests/benchmarks/kv_quality.py --weights none int8 int4 [--context N] [--contexts N] [--block-size N]
                                                            needs: kvarto installed, the model in the cache
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
from sparse_reader import SparseReader
from text import NAME, token_ids

from kvarto.cluster.launcher.model import load_model_config
from kvarto.protos.config import EngineConfig
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import SequenceStart, SequenceStep
from kvarto.worker.batch import SequenceTable, build, lay_out
from kvarto.worker.collectives import SingleRank
from kvarto.worker.decoder import Decoder
from kvarto.worker.kv_groups import block_bytes, cache_shape, kv_dtype
from kvarto.worker.layout import TPLayout
from kvarto.worker.weights import open_weights

MODEL, DTYPE = "smollm2-135m", torch.bfloat16
CPU = torch.device("cpu")
BARS = {"int8": 0.005, "fp8": 0.005, "int4": 0.03}
SPARSITY_BAR = 0.05


class Reader:
    """The model, and one sequence per context, each in blocks of its own."""

    def __init__(self, contexts: list[list[int]], block_size: int, kv_cache_dtype: str = "auto",
                 quantization: str = "none") -> None:
        config = load_model_config(MODEL)
        layout = TPLayout.of(config, 1, 0)
        length = len(contexts[0])
        self.decoder = Decoder.load(
            config, layout, open_weights(config), DTYPE, CPU, SingleRank(), length, kv_cache_dtype, quantization)
        per_sequence = -(-length // block_size)
        group, *residual = self.decoder.kv_groups
        self.token_bytes = block_bytes(config, layout, group, block_size, DTYPE, kv_cache_dtype) / block_size
        num_blocks = 1 + per_sequence * len(contexts)
        self.caches = [torch.zeros(cache_shape(config, layout, each, num_blocks, block_size, DTYPE, kv_cache_dtype),
                                   dtype=kv_dtype(each, DTYPE, kv_cache_dtype)) for each in (group, *residual)]
        self.table = SequenceTable(len(contexts), length, block_size, len(self.caches), has_residual=bool(residual))
        self.contexts = contexts
        self.blocks = [list(range(1 + per_sequence * number, 1 + per_sequence * (number + 1)))
                       for number in range(len(contexts))]

    @torch.inference_mode()
    def logprobs(self) -> torch.Tensor:
        """`[num_contexts, length - 1]`: of every token given those before it."""
        for number, tokens in enumerate(self.contexts):
            self.table.start(SequenceStart(
                seq_id=number, seq_index=0, token_ids=tokens, num_prompt_tokens=len(tokens), params=SamplingParams()))
        rows = []
        for place in range(len(self.contexts[0]) - 1):
            steps = [SequenceStep(seq_id=number, new_block_ids=[] if place else [blocks] * len(self.caches))
                     for number, blocks in enumerate(self.blocks)]
            layout = lay_out(steps, self.table)
            hidden, _ = self.decoder.forward(build(layout, self.table, CPU), self.caches)
            self.table.num_computed[layout.rows] = layout.ends
            wanted = torch.tensor([tokens[place + 1] for tokens in self.contexts])
            rows.append(self.decoder.logits(hidden).float().log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        return torch.stack(rows, 1)


def measure_sparsity(policies: list[str], contexts: list[list[int]], block_size: int) -> None:
    length = len(contexts[0])
    num_prompt = length // 2
    full = None
    for policy in ["none", *policies]:
        began = time.perf_counter()
        budget = {"none": None, "snapkv": num_prompt // 2}.get(policy, length // 2)
        spec = EngineConfig.parse({"model": MODEL, "kv_sparsity": policy, "kv_sparsity_budget": budget}).sparsity
        reader = SparseReader(MODEL, DTYPE, contexts, num_prompt, block_size, spec)
        perplexity = math.exp(-reader.logprobs().double().mean())
        full = full or perplexity
        print(json.dumps({
            "kv_sparsity": policy, "budget": budget, "prompt": num_prompt, "scored": length - num_prompt,
            "perplexity": round(perplexity, 4), "over_full": round(perplexity / full - 1, 5), "bar": SPARSITY_BAR,
            "rows_at_end": reader.num_rows, "seconds": round(time.perf_counter() - began, 1)}), flush=True)


def measure_weights(kinds: list[str], contexts: list[list[int]], block_size: int) -> None:
    first = None
    for kind in kinds:
        began = time.perf_counter()
        perplexity = math.exp(-Reader(contexts, block_size, quantization=kind).logprobs().double().mean())
        first = first or perplexity
        print(json.dumps({
            "quantization": kind, "perplexity": round(perplexity, 4), "over_first": round(perplexity / first - 1, 5),
            "seconds": round(time.perf_counter() - began, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["auto", "int8", "fp8", "int4"])
    parser.add_argument("--sparsity", nargs="+", choices=["h2o", "snapkv", "tova"])
    parser.add_argument("--weights", nargs="+", choices=["none", "int8", "int4"])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--contexts", type=int, default=10)
    parser.add_argument("--block-size", type=int, default=16)
    args = parser.parse_args()
    text = token_ids(MODEL, args.context * args.contexts)
    contexts = [text[begin: begin + args.context] for begin in range(0, len(text), args.context)]
    print(json.dumps({"text": NAME, "context": args.context, "stride": args.context, "tokens": len(text),
                      "block_size": args.block_size}))
    if args.weights:
        measure_weights(args.weights, contexts, args.block_size)
        return
    if args.sparsity:
        measure_sparsity(args.sparsity, contexts, args.block_size)
        return
    reference: tuple[float, float] | None = None
    for name in args.dtypes:
        began = time.perf_counter()
        reader = Reader(contexts, args.block_size, name)
        perplexity = math.exp(-reader.logprobs().double().mean())
        reference = reference or (perplexity, reader.token_bytes)
        print(json.dumps({
            "kv_cache_dtype": name, "perplexity": round(perplexity, 4),
            "over_first": round(perplexity / reference[0] - 1, 5), "bar": BARS.get(name),
            "bytes_per_token": reader.token_bytes, "capacity_ratio": round(reference[1] / reader.token_bytes, 3),
            "seconds": round(time.perf_counter() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
