"""How fast blocks are swapped. `copies`: the op that moves them, against plain memcpy of one run of as many bytes
between the same two pools with as many threads. `sequences`: what it takes the model's rank to swap a sequence out and
in and to compute it again, over block sizes (figure 19 of PagedAttention); drawn into `docs/`. Prints JSON lines.

Usage: python tests/benchmarks/swap.py [copies | sequences] [--svg docs/swap_or_recompute.svg]
                                                            needs: kvarto installed, the model in the cache
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chart import Line, log_chart

if TYPE_CHECKING:
    from kvarto.worker.rank import Rank

MODEL, DTYPE = "smollm2-135m", "bfloat16"
BLOCK_SIZES = (16, 32, 64, 128)
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, ITEM_BYTES = 30, 3, 64, 2
TOKEN_BYTES = NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * ITEM_BYTES
POOL_BYTES = 256 * 2**20
"""Of each pool: far more than any cache."""
COPY_ROUNDS = 9
BAR = 0.8
SEQUENCE_LENS = (256, 1024)
SWAP_ROUNDS, PREFILL_ROUNDS = 15, 5
SVG = Path(__file__).parents[2] / "docs" / "swap_or_recompute.svg"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def shuffled_pairs(count: int, rng: random.Random) -> list[tuple[int, int]]:
    return list(zip(rng.sample(range(count), count), rng.sample(range(count), count), strict=True))


def measure_copies(block_size: int, num_threads: int) -> dict[str, Any]:
    """All blocks of a pool to the other one and back, in random places; memcpy takes the same bytes from end to end."""
    import torch

    from kvarto.kernels import backend, copy_blocks

    torch.set_num_threads(num_threads)
    count = POOL_BYTES // (TOKEN_BYTES * block_size)
    shape = (count, NUM_LAYERS, 2, NUM_KV_HEADS, block_size, HEAD_DIM)
    # Written once, so that every page is there.
    device, host = (torch.full(shape, value, dtype=torch.bfloat16) for value in (1, 2))
    out, back = (shuffled_pairs(count, random.Random(seed)) for seed in (1, 2))
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes, memcpy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
    part = -(-device.nbytes // num_threads)

    def plain(to: torch.Tensor, source: torch.Tensor) -> None:
        def copy(begin: int) -> None:
            memcpy(to.data_ptr() + begin, source.data_ptr() + begin, min(part, device.nbytes - begin))

        # The interpreter's lock is not held in `memcpy`.
        list(threads.map(copy, range(0, device.nbytes, part)))

    taken: dict[str, list[float]] = {"swap_out": [], "swap_in": [], "memcpy_out": [], "memcpy_in": []}
    began, cpu_began = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(num_threads) as threads:
        for number in range(COPY_ROUNDS + 1):
            found = {
                "swap_out": seconds(lambda: copy_blocks(device, host, out)),
                "memcpy_out": seconds(lambda: plain(host, device)),
                "swap_in": seconds(lambda: copy_blocks(host, device, back)),
                "memcpy_in": seconds(lambda: plain(device, host))}
            for name, value in found.items() if number else ():  # the first round settles threads
                taken[name].append(value)
    cores = (time.process_time() - cpu_began) / (time.perf_counter() - began)
    gb_per_s = {f"{name}_gb_per_s": round(device.nbytes / statistics.median(values) / 1e9, 2)
                for name, values in taken.items()}
    of_memcpy = [(a + b) / (c + d) for a, b, c, d in zip(
        taken["memcpy_out"], taken["memcpy_in"], taken["swap_out"], taken["swap_in"], strict=True)]
    return {"block_size": block_size, "threads": num_threads, "block_kib": TOKEN_BYTES * block_size / 1024,
            "blocks": count, **gb_per_s, "of_memcpy": round(statistics.median(of_memcpy), 3),
            "of_memcpy_worst_round": round(min(of_memcpy), 3), "bar": BAR,
            "cores_had": round(cores, 2), "kernels": backend()}


def start_rank(block_size: int) -> tuple[Rank, int, dict[str, float]]:
    """The model's rank, its blocks in each pool, and the costs that AUTO is given."""
    from kvarto.cluster.launcher.model import load_model_config
    from kvarto.cluster.resolve import resolve
    from kvarto.protos.config import EngineConfig
    from kvarto.worker.collectives import SingleRank
    from kvarto.worker.rank import Rank

    config = EngineConfig.parse({"model": MODEL, "dtype": DTYPE, "block_size": block_size})
    rank = Rank(resolve(config, load_model_config(MODEL), has_cuda=False).rank_config(0, epoch=1), SingleRank())
    costs = rank.measure()
    ready = rank.ready(costs)
    assert ready.block_bytes == [TOKEN_BYTES * block_size], "the model is not the one of these constants"
    num_blocks = POOL_BYTES // ready.block_bytes[0]
    rank.allocate([num_blocks], [num_blocks])
    return rank, num_blocks, {"block_copy_s": ready.block_bytes[0] / costs.copy_bytes_per_s,
                              "prefill_token_s": 1 / costs.prefill_tokens_per_s}


def measure_sequences(block_size: int) -> list[dict[str, Any]]:
    from kvarto.protos.sampling import SamplingParams
    from kvarto.protos.step import BlockMoves, SequenceStart, SequenceStep, StepPlan

    rank, num_blocks, costs = start_rank(block_size)
    rng, all_blocks, step_id = random.Random(0), range(1, num_blocks + 1), 0

    def execute(**parts: Any) -> float:
        nonlocal step_id
        step_id += 1
        plan = StepPlan(epoch=1, step_id=step_id, **parts)
        return seconds(lambda: rank.execute(plan))

    def swap(count: int) -> tuple[float, float]:
        """Out and in, of other blocks: between the two a sequence's blocks do not stay in a cache."""
        moved = [list(zip(rng.sample(all_blocks, count), rng.sample(all_blocks, count), strict=True)) for _ in range(2)]
        return execute(moves=[BlockMoves(swap_outs=moved[0])]), execute(moves=[BlockMoves(swap_ins=moved[1])])

    def prefill(num_tokens: int, count: int) -> float:
        start = SequenceStart(
            seq_id=step_id, seq_index=0, token_ids=rng.choices(range(1000, 40_000), k=num_tokens),
            num_prompt_tokens=num_tokens, params=SamplingParams(temperature=0))
        step = SequenceStep(
            seq_id=step_id, num_tokens=num_tokens, new_block_ids=[rng.sample(all_blocks, count)])
        taken = execute(starts=[start], steps=[step])
        execute(ends=[start.seq_id])
        return taken

    swap(num_blocks)  # every page is there from now on
    found = []
    for num_tokens in SEQUENCE_LENS:
        count = num_tokens // block_size
        swaps = [swap(count) for _ in range(SWAP_ROUNDS)]
        prefills = [prefill(num_tokens, count) for _ in range(PREFILL_ROUNDS + 1)][1:]
        swap_out_s, swap_in_s = (statistics.median(column) for column in zip(*swaps, strict=True))
        recompute_s = statistics.median(prefills)
        found.append({
            "block_size": block_size, "tokens": num_tokens, "blocks": count,
            "swap_out_ms": round(1e3 * swap_out_s, 3), "swap_in_ms": round(1e3 * swap_in_s, 3),
            "swap_ms": round(1e3 * (swap_out_s + swap_in_s), 3), "recompute_ms": round(1e3 * recompute_s, 1),
            "recompute_against_swap": round(recompute_s / (swap_out_s + swap_in_s), 1),
            "auto_estimates_swap_ms": round(2e3 * count * costs["block_copy_s"], 3),
            "auto_estimates_recompute_ms": round(1e3 * num_tokens * costs["prefill_token_s"], 1)})
    return found


def draw(found: list[dict[str, Any]]) -> str:
    lines, cores = [], len(os.sched_getaffinity(0))
    for num_tokens in SEQUENCE_LENS:
        rows = [row for row in found if row["tokens"] == num_tokens]
        dashed = num_tokens != max(SEQUENCE_LENS)
        lines.append(Line(f"recompute {num_tokens} tokens", [row["recompute_ms"] for row in rows], "b", dashed))
        lines.append(Line(f"swap {num_tokens} tokens", [row["swap_ms"] for row in rows], "a", dashed))
    return log_chart(
        lines, BLOCK_SIZES, title="Swap a sequence out and in, or compute it again",
        note=f"SmolLM2-135M, {DTYPE}, {cores} cores", x_label="block size (tokens)", y_label="time (ms)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("copies", "sequences"), help="default: both")
    parser.add_argument("--svg", type=Path, default=SVG)
    args = parser.parse_args()
    from kvarto.worker.threads import limit_spinning

    limit_spinning()  # as in the engine, before torch is imported
    if args.part != "sequences":
        for num_threads in (1, 2):
            for block_size in BLOCK_SIZES:
                print(json.dumps(measure_copies(block_size, num_threads)), flush=True)
    if args.part != "copies":
        found = []
        for block_size in BLOCK_SIZES:
            for row in measure_sequences(block_size):
                print(json.dumps(row), flush=True)
                found.append(row)
        args.svg.write_text(draw(found))


if __name__ == "__main__":
    main()
