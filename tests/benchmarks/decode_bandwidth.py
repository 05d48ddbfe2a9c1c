"""How near decode attention comes to the memory it reads: bytes of K and V per second over the read bandwidth measured
in the same round, at several block sizes, and against vLLM's op where its environment is given. Prints JSON lines.

Usage: python tests/benchmarks/decode_bandwidth.py [--vllm-python PATH] [--rounds N] [--dtype bfloat16 | int8 | fp8]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

import torch

from kvarto.kernels import backend, paged_attention
from kvarto.kernels.kv_layout import FP8, codes_and_scales, row_elements
from kvarto.worker.pool_memory import empty_pool

BATCH, CONTEXT, LAYERS = 16, 4096, 8
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
BLOCK_SIZES = (16, 32, 128)
READ_BYTES = 800 * 2**20
REPEATS = 9
BAR = 0.8
DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": FP8}
PEER = Path(__file__).with_name("peers") / "vllm_attention.py"


def median_s(work: Callable[[], object], repeats: int = REPEATS) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Ours:
    """All layers of a pool of shuffled blocks, one decode step of every sequence."""

    def __init__(self, block_size: int, dtype: torch.dtype) -> None:
        num_blocks = BATCH * CONTEXT // block_size
        shape = (num_blocks, LAYERS, 2, NUM_KV_HEADS, block_size, row_elements(dtype, HEAD_DIM))
        if dtype == torch.bfloat16:
            self.cache = empty_pool(shape, dtype, torch.device("cpu")).copy_(torch.randn(shape))
        else:
            self.cache = empty_pool(shape, dtype, torch.device("cpu"))
            codes, scales = codes_and_scales(self.cache)
            codes.view(torch.uint8).random_()
            scales.fill_(0.02)
        self.tables = torch.randperm(num_blocks).int().view(BATCH, -1)
        self.query = torch.randn(BATCH, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16)
        self.starts = torch.arange(BATCH + 1, dtype=torch.int32)
        self.lens = torch.full((BATCH,), CONTEXT, dtype=torch.int32)

    def run(self) -> None:
        for layer in range(LAYERS):
            paged_attention(self.query, self.cache, layer, self.tables, self.starts, self.lens, HEAD_DIM**-0.5)


class Peer:
    """vLLM in its own process, asked for one block size at a time."""

    def __init__(self, python: str, threads: int) -> None:
        shape = dict(batch=BATCH, context=CONTEXT, layers=LAYERS, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS,
                     head_dim=HEAD_DIM, threads=threads, repeats=REPEATS)
        self._process = subprocess.Popen(
            [python, str(PEER), json.dumps(shape)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        self._answer()

    def ask(self, block_size: int) -> dict[str, Any]:
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        stdin.write(f"{block_size}\n")
        stdin.flush()
        return self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit("the peer ended without an answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    row_bytes = row_elements(dtype, HEAD_DIM) * dtype.itemsize
    kv_bytes = {"ours": 2 * LAYERS * BATCH * CONTEXT * NUM_KV_HEADS * row_bytes,
                "peer": 2 * LAYERS * BATCH * CONTEXT * NUM_KV_HEADS * HEAD_DIM * 2}
    flat = torch.ones(READ_BYTES // 4)
    peer = Peer(args.vllm_python, args.threads) if args.vllm_python else None
    seen: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        reads = READ_BYTES / median_s(flat.sum)
        seen["read"].append(reads)
        for block_size in BLOCK_SIZES:
            ours = Ours(block_size, dtype)
            rate = kv_bytes["ours"] / median_s(ours.run)
            seen[f"ours {block_size}"].append(rate)
            seen[f"share {block_size}"].append(rate / reads)
            del ours
            if peer:
                seen[f"peer {block_size}"].append(kv_bytes["peer"] / peer.ask(block_size)["seconds"])
    middle = {name: statistics.median(values) for name, values in seen.items()}
    print(json.dumps({"kernels": backend(), "threads": args.threads, "dtype": args.dtype,
                      "read_gb_per_s": round(middle["read"] / 1e9, 1), "context": CONTEXT, "batch": BATCH}))
    best = max((middle[f"peer {size}"] for size in BLOCK_SIZES), default=0.0) if peer else None
    for size in BLOCK_SIZES:
        row = {"block_size": size, "gb_per_s": round(middle[f"ours {size}"] / 1e9, 1),
               "of_read": round(middle[f"share {size}"], 2), "bar": BAR}
        if best is not None:
            row["vllm_gb_per_s"] = round(middle[f"peer {size}"] / 1e9, 1)
            row["over_vllm_best"] = round(middle[f"ours {size}"] / best, 2)
        print(json.dumps(row))
    if peer:
        peer.__exit__()


if __name__ == "__main__":
    main()
