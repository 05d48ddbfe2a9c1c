"""An engine loop whose frontends, ranks and clock are fakes, for the tests of the Head's side."""

from __future__ import annotations

import importlib.util
from collections import deque
from pathlib import Path

from kvarto.cluster.block_space import BlockSpace
from kvarto.cluster.block_space.prefix_keys import PrefixKeys
from kvarto.cluster.engine.engine import Engine
from kvarto.cluster.engine.loop import EngineLoop
from kvarto.cluster.metrics import Metrics
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import AddRequest, DeltaBatch, EngineInfo, KVPool
from kvarto.protos.sampling import SamplingParams

_spec = importlib.util.spec_from_file_location("memory_model", Path(__file__).with_name("memory_model.py"))
assert _spec and _spec.loader
memory_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory_model)

BLOCK_SIZE = 8
BLOCK_BYTES = 1000
STEP_TIMEOUT_S = 120.0


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class FakeTransport:
    """`gone` frontends cannot be reached. `log`, shared with the links, is the order of all that was sent."""

    def __init__(self, log):
        self.inbox, self.sent, self.gone, self.log, self.closed = [], [], set(), log, False

    def wait(self, timeout_s):
        assert timeout_s >= 0

    def wake(self):
        pass

    def receive(self):
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, owner, message):
        self.log.append(type(message).__name__)
        if owner in self.gone:
            return False
        self.sent.append((owner, message))
        return True

    def close(self):
        self.closed = True


class FakeLink:
    """Ranks that execute a plan when `step` is called. `send_error` and `receive_error` are raised once set."""

    def __init__(self, log, num_blocks, num_host_blocks, disk_capacity=0):
        self.rank = memory_model.MemoryModelRank(
            BLOCK_SIZE, num_blocks, num_host_blocks, disk_capacity=disk_capacity)
        self.log, self.plans, self.results = log, deque(), []
        self.connected, self.has_result, self.closed, self.num_leases = True, False, False, 0
        self.send_error = self.receive_error = None

    def send(self, plan):
        if self.send_error:
            raise self.send_error
        self.log.append("StepPlan")
        self.plans.append(plan)

    def receive(self):
        if self.receive_error:
            raise self.receive_error
        results, self.results = self.results, []
        return results

    def renew_lease(self):
        self.num_leases += 1

    def close(self):
        self.closed = True

    def step(self):
        """Let the ranks end the oldest plan that they have. Returns the results on their way."""
        self.results.extend(self.rank.execute(self.plans.popleft()))
        return self.results


class World:
    """A loop with `num_groups` worker groups that have joined."""

    def __init__(self, num_groups=1, *, num_blocks=64, num_host_blocks=0, caching=False, max_num_seqs=8, budget=64,
                 max_in_flight=2, disk=()):
        """`disk`: a prompt whose full blocks are on disk."""
        self.clock, self.log, self.failed = Clock(), [], []
        self.transport = FakeTransport(self.log)
        self.metrics = Metrics()
        self.num_blocks, self.num_host_blocks, self.caching = num_blocks, num_host_blocks, caching
        self.disk = list(disk)
        self.limits, self.max_in_flight = SchedulerLimits(max_num_seqs, budget), max_in_flight
        self.loop = EngineLoop(
            self.transport, self.metrics, on_group_failed=lambda *args: self.failed.append(args), clock=self.clock)
        self.engines, self.links = [], []
        for index in range(num_groups):
            self.join(index)
        self.loop.run_once()

    def join(self, index, *, connected=True, on_ready=lambda: None):
        epoch = len(self.engines) + 1
        link = FakeLink(self.log, self.num_blocks, self.num_host_blocks, len(self.disk) // BLOCK_SIZE)
        link.connected, link.max_in_flight = connected, self.max_in_flight
        space = BlockSpace(
            [KVGroupSpec(layer_ids=(0,))], [self.num_blocks], BLOCK_SIZE, num_host_blocks=[self.num_host_blocks],
            enable_prefix_caching=self.caching, disk_capacity=len(self.disk) // BLOCK_SIZE,
            stored_keys=self._store(link))
        scheduler = Scheduler(space, self.limits, epoch=epoch, num_ranks=2)
        engine = Engine(
            scheduler, link, make_info(epoch=epoch, kv_pools=[KVPool(num_blocks=self.num_blocks)]), self.metrics,
            async_scheduling=True, step_timeout_s=STEP_TIMEOUT_S, check_integrity=True, block_bytes=[BLOCK_BYTES])
        self.engines.append(engine)
        self.links.append(link)
        self.loop.add_group(index, engine, on_ready)
        return engine

    def _store(self, link):
        """Write the prompt to the disk of the ranks. Returns its keys."""
        prefix_keys, keys = PrefixKeys(b"", BLOCK_SIZE), []
        prefix_keys.extend(keys, prefix_keys.root("shared/"), self.disk, len(self.disk))
        contents = memory_model.stand_in.chain(self.disk)
        link.rank.memory.disks[0] = {key: contents[BLOCK_SIZE * i: BLOCK_SIZE * (i + 1)] for i, key in enumerate(keys)}
        return keys

    def post(self, *messages, owner=b"a"):
        """Messages of a frontend, dealt with by one turn of the loop."""
        self.transport.inbox.extend((owner, message) for message in messages)
        self.loop.run_once()

    def step(self, link=0):
        """One plan ends and the loop turns once."""
        self.links[link].step()
        self.loop.run_once()

    def of(self, kind, owner=None):
        return [message for who, message in self.transport.sent if isinstance(message, kind) and owner in (None, who)]

    def deltas(self, request_id):
        return [delta for batch in self.of(DeltaBatch) for delta in batch.deltas if delta.request_id == request_id]


def make_info(**changes):
    fields = dict(
        epoch=1, max_model_len=200, vocab_size=memory_model.VOCAB, max_num_seqs=8, kv_capacity_tokens=64 * BLOCK_SIZE,
        block_size=BLOCK_SIZE, max_num_batched_tokens=64, kv_pools=[KVPool(num_blocks=64)], num_host_blocks=0,
        kernels="", dtype="float32", kv_cache_dtype="float32", tp_size=1, num_groups=1)
    return EngineInfo(**(fields | changes))


def add(request_id, prompt=(1, 2, 3), priority=0, **params):
    params = {"max_tokens": 4, "ignore_eos": True} | params
    return AddRequest(
        request_id=request_id, prompt_token_ids=list(prompt), params=SamplingParams(**params), priority=priority)
