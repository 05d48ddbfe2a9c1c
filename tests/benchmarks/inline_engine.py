"""For the benchmarks of this folder: an engine in this process whose every step can be looked at, with the model or
with a rank that answers at once, so that lengths alone decide."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from kvarto.cluster.block_space import BlockSpace
from kvarto.cluster.engine.engine import Engine, News
from kvarto.cluster.engine.inline import InlineWorkerGroup
from kvarto.cluster.launcher.inline import start_inline
from kvarto.cluster.metrics import Metrics
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.config import EngineConfig
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import AddRequest, EngineInfo, KVPool
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import SampledToken, StepPlan, StepResult

VOCAB_SIZE = 50_000
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2048
MAX_MODEL_LEN = 8192
EPOCH = 1

Request = tuple[list[int], SamplingParams]


class InstantRank:
    """Knows of each sequence only how far it is from its next token. No two of one step draw the same token, as they
    hardly ever would out of so many."""

    def __init__(self) -> None:
        self._left: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for seq_id in plan.ends:
            del self._left[seq_id]
        for start in plan.starts:
            self._left[start.seq_id] = len(start.token_ids) - start.num_computed_tokens
        sampling = []
        for step in plan.steps:
            self._left[step.seq_id] -= step.num_tokens
            if not self._left[step.seq_id]:
                sampling.append(step.seq_id)
        sampling += [sibling.seq_id for sibling in plan.siblings]
        self._left.update(dict.fromkeys(sampling, 1))
        # 7919 and the size of the vocabulary have no common divisor: ids that are near each other draw apart.
        tokens = [SampledToken(seq_id=seq_id, token_id=(7919 * seq_id + 31 * plan.step_id) % VOCAB_SIZE)
                  for seq_id in sampling]
        return StepResult(epoch=plan.epoch, step_id=plan.step_id, tokens=tokens)

    def close(self) -> None:
        """Nobody waits for it."""


def instant_engine(*, num_blocks: int, block_size: int = 16, enable_prefix_caching: bool) -> Engine:
    """Scheduler, block space and accounting as they are, before an `InstantRank`."""
    space = BlockSpace([KVGroupSpec(layer_ids=(0,))], [num_blocks], block_size, hash_key=b"benchmark",
                       enable_prefix_caching=enable_prefix_caching)
    info = EngineInfo(
        epoch=EPOCH, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_seqs=MAX_NUM_SEQS,
        kv_capacity_tokens=space.capacity_tokens, block_size=block_size, num_host_blocks=0,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS, kv_pools=[KVPool(num_blocks=num_blocks)],
        kernels="none", dtype="none", kv_cache_dtype="none", tp_size=1, num_groups=1)
    scheduler = Scheduler(space, SchedulerLimits(MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS), epoch=EPOCH)
    return Engine(scheduler, InlineWorkerGroup([InstantRank()]), info, Metrics(), async_scheduling=True,
                  step_timeout_s=600, block_bytes=[1])


def model_engine(model: str, **options: Any) -> Engine:
    """With the model itself; `options` are the fields of `EngineConfig`."""
    return start_inline(EngineConfig.parse({"model": model, **options}), Metrics())


def run(
    engine: Engine, requests: Sequence[Request], after_plan: Callable[[Scheduler], None] = lambda _: None,
) -> dict[tuple[str, int], list[int]]:
    """All requests at once, to their end. `after_plan` is called with every plan made and none in flight before it:
    every token that it computes is known. Returns the output of each (request id, index of the sequence)."""
    outputs: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for number, (prompt, params) in enumerate(requests):
        engine.add(b"benchmark", AddRequest(request_id=str(number), prompt_token_ids=prompt, params=params),
                   time.monotonic())
    while engine.load:
        engine.pump(time.monotonic())
        after_plan(engine.scheduler)
        news: News = []
        engine.receive(time.monotonic(), news)
        for _, delta in news:
            if delta.error:
                raise RuntimeError(f"request {delta.request_id}: {delta.error.message}")
            outputs[delta.request_id, delta.seq_index] += delta.token_ids
    return dict(outputs)
