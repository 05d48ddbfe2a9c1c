"""What a decode step costs beside its forward pass: Head and ranks on Ray, real scheduler, sockets and frontend, ranks
that answer at once. Prints one JSON line: milliseconds per step, from `schedule()` to the deltas at the frontend.

Usage: python tests/benchmarks/step_overhead.py [--ranks 2] [--sequences 32] [--tokens 2000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
import time
from typing import Any

import ray

from kvarto.cluster.application import start_ray
from kvarto.cluster.block_space import BlockSpace
from kvarto.cluster.engine.engine import Engine
from kvarto.cluster.engine.loop import EngineLoop
from kvarto.cluster.engine.zmq_hub import ZmqHub
from kvarto.cluster.frontend.client import EngineClient
from kvarto.cluster.frontend.zmq_connection import ZmqConnection
from kvarto.cluster.metrics import Metrics
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import AddRequest, DeltaBatch, EngineInfo, KVPool
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import SampledToken, StepPlan, StepResult
from kvarto.worker.rank_server import rank_identity, serve_rank

PROMPT_TOKENS = 16
EPOCH = 1


class NullRank:
    """Keeps the sequences as a rank does and answers each with token 0, without touching a tensor."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for seq_id in plan.ends:
            del self.left[seq_id]
        for start in plan.starts:
            self.left[start.seq_id] = len(start.token_ids)
        tokens = []
        for step in plan.steps:
            self.left[step.seq_id] -= step.num_tokens
            if self.left[step.seq_id] == 0:
                self.left[step.seq_id] = 1
                tokens.append(SampledToken(seq_id=step.seq_id, token_id=0))
        return StepResult(epoch=plan.epoch, step_id=plan.step_id, tokens=tokens)


class BenchRank:
    def run(self, endpoint: Any, rank: int) -> None:
        serve_rank(NullRank(), endpoint, epoch=EPOCH, rank=rank, lease_s=10)


class BenchHead:
    def __init__(self, num_ranks: int, num_sequences: int, async_scheduling: bool) -> None:
        self.hub = ZmqHub("127.0.0.1")
        self.loop = EngineLoop(self.hub, Metrics(), on_group_failed=print)
        num_blocks = 100_000
        space = BlockSpace([KVGroupSpec(layer_ids=(0,))], [num_blocks], 16)
        info = EngineInfo(
            epoch=EPOCH, max_model_len=8192, vocab_size=100, max_num_seqs=num_sequences, block_size=16,
            kv_capacity_tokens=num_blocks * 16, max_num_batched_tokens=2048, kv_pools=[KVPool(num_blocks=num_blocks)],
            num_host_blocks=0, kernels="none", dtype="none", kv_cache_dtype="none", tp_size=num_ranks, num_groups=1)
        scheduler = Scheduler(space, SchedulerLimits(num_sequences, 2048), epoch=EPOCH)
        link = self.hub.link(EPOCH, [rank_identity(EPOCH, rank) for rank in range(num_ranks)])
        engine = Engine(
            scheduler, link, info, Metrics(), async_scheduling=async_scheduling, step_timeout_s=60)
        self.ready = threading.Event()
        self.loop.post(lambda: self.loop.add_group(0, engine, self.ready.set))
        threading.Thread(target=self.loop.run, daemon=True).start()

    def endpoints(self) -> tuple[Any, Any]:
        return self.hub.frontend_endpoint, self.hub.rank_endpoint

    def wait_ready(self) -> None:
        self.ready.wait()


async def measure(num_ranks: int, num_sequences: int, num_tokens: int, async_scheduling: bool) -> list[float]:
    """Milliseconds between one step's deltas and the next one's, at the frontend. Results of two steps that reached
    the Head together come in one message: each counts for half of the gap."""
    head = ray.remote(BenchHead).options(num_cpus=0, max_concurrency=4).remote(
        num_ranks, num_sequences, async_scheduling)
    frontend_endpoint, rank_endpoint = await head.endpoints.remote()
    ranks = [ray.remote(BenchRank).options(num_cpus=0).remote() for _ in range(num_ranks)]
    for rank, actor in enumerate(ranks):
        actor.run.remote(rank_endpoint, rank)
    await head.wait_ready.remote()
    gaps: list[float] = []
    last_s: float | None = None
    done = asyncio.Event()
    finished = 0

    def on_deltas(batch: DeltaBatch) -> None:
        nonlocal finished, last_s
        now, steps = time.perf_counter(), len(batch.deltas) // num_sequences
        if last_s is not None and steps:
            gaps.extend([(now - last_s) * 1e3 / steps] * steps)
        last_s = now
        finished += sum(delta.finish_reason is not None for delta in batch.deltas)
        if finished == num_sequences:
            done.set()

    async def locate() -> Any:
        return frontend_endpoint

    client = EngineClient()
    client.on_deltas, client.on_lost = on_deltas, print
    client.connection = await ZmqConnection.start(client, locate)
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    for index in range(num_sequences):
        client.connection.send(
            AddRequest(request_id=str(index), prompt_token_ids=[1] * PROMPT_TOKENS, params=params))
    await done.wait()
    await client.connection.close()
    for actor in [head, *ranks]:
        ray.kill(actor)
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()
    start_ray()
    result: dict[str, Any] = {"ranks": args.ranks, "sequences": args.sequences}
    for name, async_scheduling in (("one_step_at_a_time", False), ("one_step_ahead", True)):
        gaps = asyncio.run(measure(args.ranks, args.sequences, args.tokens, async_scheduling))
        result[f"{name}_ms"] = {
            "steps": len(gaps), "mean": round(statistics.mean(gaps), 3), "median": round(statistics.median(gaps), 3),
            "p99": round(statistics.quantiles(gaps, n=100)[98], 3)}
    ray.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
