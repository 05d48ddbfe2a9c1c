"""What this machine allows for SmolLM2-135M in bfloat16: read bandwidth, matrix multiplication, a pass over all linear
layers at several numbers of rows; and the floor of a trace: its run time if all requests came at once and nothing cost
anything but linear layers, reading the KV cache (at the read bandwidth) and prefill (at the rate of a large product).

A pass is timed with kvarto's kernels and with oneDNN's on prepacked weights; the faster counts. Prints one JSON line.

Usage: python tests/benchmarks/limits.py TRACE.json [--threads N]
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kvarto.cluster.cli.bench.trace import TraceRequest, read_trace
from kvarto.kernels import linear, pack_linear

LAYERS = 30
LAYER_SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
"""[out_features, in_features] of qkv, o, gate and up, down."""
SHAPES = [*LAYER_SHAPES * LAYERS, (49152, 576)]
WEIGHT_BYTES = sum(2 * n * k for n, k in SHAPES)
PREFILL_FLOPS = sum(2 * n * k for n, k in SHAPES[:-1])
"""Per token; the LM head runs once a sequence."""
KV_BYTES = LAYERS * 2 * 3 * 64 * 2
"""Per token."""
ROWS = (1, 4, 16, 32, 64, 128, 256)
SQUARE = 2048
READ_BYTES = 800 * 2**20
STREAM_CONTEXT = 128 + 128 // 2
"""Tokens that a step of the single stream (128 in, 128 out) reads on average."""
PREFILL_LEN = 1024
REPEATS, LEAST_S = 3, 0.25


def best_s(work: Callable[[], object]) -> float:
    """The best of several runs: a limit is what the machine does when nothing disturbs it."""
    work()
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < LEAST_S:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def passes() -> dict[int, float]:
    """Seconds of all linear layers, by number of rows."""
    weights = [torch.randn(n, k).bfloat16() for n, k in SHAPES]
    ours = [pack_linear(weight) for weight in weights]
    found = {}
    for rows in ROWS:
        inputs = {k: torch.randn(rows, k).bfloat16() for _, k in SHAPES}
        theirs = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]

        def ours_pass(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for (_, k), packed in zip(SHAPES, ours, strict=True):
                linear(inputs[k], packed)

        def theirs_pass(inputs: dict[int, torch.Tensor] = inputs, theirs: list[torch.Tensor] = theirs) -> None:
            for (_, k), packed in zip(SHAPES, theirs, strict=True):
                torch.ops.mkldnn._linear_pointwise(inputs[k], packed, None, "none", [], "")

        found[rows] = min(best_s(ours_pass), best_s(theirs_pass))
    return found


def seconds_of_pass(passes: dict[int, float], rows: int) -> float:
    """Between the measured numbers of rows on a straight line; beyond the largest in proportion to it."""
    sizes = sorted(passes)
    if rows >= sizes[-1]:
        return passes[sizes[-1]] * rows / sizes[-1]
    high = sizes[bisect.bisect_left(sizes, rows)]
    low = max((size for size in sizes if size <= rows), default=high)
    if low == high:
        return passes[high]
    return passes[low] + (passes[high] - passes[low]) * (rows - low) / (high - low)


def trace_floor_s(
    requests: Sequence[TraceRequest], passes: dict[int, float], read_bytes_per_s: float, flops_per_s: float,
) -> float:
    """Seconds that a trace takes at least. A request's prefill yields its first token."""
    seconds = sum(len(request.prompt) for request in requests) * PREFILL_FLOPS / flops_per_s
    for step in range(1, max(request.output_len for request in requests)):
        live = [request for request in requests if request.output_len > step]
        kv_bytes = sum(len(request.prompt) + step for request in live) * KV_BYTES
        seconds += seconds_of_pass(passes, len(live)) + kv_bytes / read_bytes_per_s
    return seconds


def measure(requests: Sequence[TraceRequest]) -> dict[str, float]:
    """The limits, under the names of the figures that are held against them."""
    flat = torch.ones(READ_BYTES // 4)
    read = READ_BYTES / best_s(flat.sum)
    square = torch.randn(SQUARE, SQUARE).bfloat16()
    packed = pack_linear(square)
    flops = 2 * SQUARE**3 / min(best_s(lambda: square @ square), best_s(lambda: linear(square, packed)))
    linear_s = passes()
    # Decode reads weights at this rate at best: a stream of products may outrun the sum above.
    read = max(read, WEIGHT_BYTES / linear_s[1])
    floor_s = trace_floor_s(requests, linear_s, read, flops)
    return {
        "read_gb_per_s": read / 1e9, "gemm_tflops": flops / 1e12,
        "out_tok_per_s": sum(request.output_len for request in requests) / floor_s,
        "decode_step_ms": 1e3 * (WEIGHT_BYTES + KV_BYTES * STREAM_CONTEXT) / read,
        "prefill_ms": 1e3 * PREFILL_LEN * PREFILL_FLOPS / flops,
        **{f"pass_{rows}_ms": 1e3 * seconds for rows, seconds in linear_s.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(read_trace(args.trace))
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))


if __name__ == "__main__":
    main()
