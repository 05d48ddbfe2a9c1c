"""A rank and its Head over real sockets of this machine; what the rank computes is a fake."""

from __future__ import annotations

import threading
import time

import pytest
import zmq

from kvarto.cluster.engine.zmq_hub import ZmqHub
from kvarto.protos.codec import decode_from_rank, encode
from kvarto.protos.step import BlockMoves, Lease, RankHello, Shutdown, StepPlan, StepResult
from kvarto.worker.rank_server import LeaseExpiredError, rank_identity, serve_rank

EPOCH = 3
WAIT_S = 3.0


class FakeExecutor:
    def __init__(self):
        self.steps, self.error, self.seconds, self.failed_loads = [], None, 0.0, []

    def execute(self, plan):
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        self.steps.append(plan.step_id)
        return StepResult(epoch=plan.epoch, step_id=plan.step_id, failed_loads=self.failed_loads, seconds=1.0)


class Rank:
    """`serve_rank` on a thread. `error` is what it raised."""

    def __init__(self, hub, rank=0, lease_s=60.0):
        self.hub, self.executor, self.error = hub, FakeExecutor(), None
        self.identity = rank_identity(EPOCH, rank)
        self.thread = threading.Thread(target=self._run, args=(rank, lease_s), daemon=True)
        self.thread.start()
        self.hello = self.receive()

    def _run(self, rank, lease_s):
        try:
            serve_rank(self.executor, self.hub.rank_endpoint, epoch=EPOCH, rank=rank, lease_s=lease_s)
        except BaseException as error:
            self.error = error

    def send(self, *messages):
        for message in messages:
            assert self.hub.send_to_rank(self.identity, encode(message))

    def receive(self, timeout_s=WAIT_S):
        """The rank's next message; None: there is none in time."""
        if not self.hub._ranks.poll(timeout_s * 1000):
            return None
        return decode_from_rank(self.hub._ranks.recv_multipart()[1])

    def end(self):
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive(), "the rank goes on"
        return self.error


@pytest.fixture
def hub():
    with ZmqHub("127.0.0.1") as hub:
        yield hub


@pytest.fixture
def start(hub):
    ranks = []

    def start(**options):
        ranks.append(Rank(hub, **options))
        return ranks[-1]

    yield start
    for rank in ranks:
        hub.send_to_rank(rank.identity, encode(Shutdown(epoch=EPOCH)))
        rank.thread.join(WAIT_S)


def plan(step_id, epoch=EPOCH, **fields):
    return StepPlan(epoch=epoch, step_id=step_id, **fields)


def test_a_rank_says_who_it_is(start):
    assert start(rank=1).hello == RankHello(epoch=EPOCH, rank=1)


def test_plans_are_executed_in_order(start):
    rank = start()
    rank.send(plan(0), plan(1), Shutdown(epoch=EPOCH))
    rank.end()
    assert rank.executor.steps == [0, 1]


def test_rank_0_answers_a_plan(start):
    rank = start()
    rank.send(plan(4))
    assert rank.receive().step_id == 4


def test_other_ranks_do_not_answer_a_plan(start):
    rank = start(rank=1)
    rank.send(plan(4), Shutdown(epoch=EPOCH))
    rank.end()
    assert rank.receive(0.05) is None


def test_other_ranks_answer_a_plan_with_disk_loads_with_those_that_failed(start):
    rank = start(rank=1)
    rank.executor.failed_loads = [(1, b"key")]
    rank.send(plan(4, moves=[BlockMoves(), BlockMoves(disk_loads=[(b"key", 3)])]))
    assert rank.receive() == StepResult(epoch=EPOCH, step_id=4, rank=1, failed_loads=[(1, b"key")])


def test_other_ranks_do_not_answer_a_plan_with_other_moves(start):
    rank = start(rank=1)
    rank.send(plan(4, moves=[BlockMoves(swap_ins=[(1, 1)], disk_stores=[(1, b"key")])]), Shutdown(epoch=EPOCH))
    rank.end()
    assert rank.receive(0.05) is None


@pytest.mark.parametrize("number", [0, 1])
def test_every_rank_tells_the_head_of_a_step_that_failed(start, number):
    rank = start(rank=number)
    rank.executor.error = RuntimeError("out of memory")
    rank.send(plan(4))
    result = rank.receive()
    assert (result.rank, result.step_id, result.error) == (number, 4, "RuntimeError: out of memory")


def test_a_step_that_failed_ends_the_rank(start):
    rank = start()
    rank.executor.error = RuntimeError("out of memory")
    rank.send(plan(4))
    assert rank.end() is rank.executor.error


def test_shutdown_ends_the_rank_well(start):
    rank = start()
    rank.send(Shutdown(epoch=EPOCH))
    assert rank.end() is None


def test_a_rank_whose_lease_is_not_renewed_ends_itself(start):
    assert isinstance(start(lease_s=0.1).end(), LeaseExpiredError)


def test_a_rank_whose_lease_is_renewed_goes_on(start):
    rank = start(lease_s=0.3)
    for _ in range(8):
        rank.send(Lease(epoch=EPOCH))
        time.sleep(0.1)
    assert rank.thread.is_alive()


def test_a_step_that_takes_longer_than_the_lease_does_not_end_the_rank(start):
    rank = start(lease_s=0.1)
    rank.executor.seconds = 0.3
    rank.send(plan(0), plan(1))
    rank.receive()
    assert rank.receive() is not None


def test_a_plan_of_another_epoch_is_dropped(start):
    rank = start()
    rank.send(plan(0, epoch=EPOCH - 1), plan(1), Shutdown(epoch=EPOCH))
    rank.end()
    assert rank.executor.steps == [1]


def test_a_shutdown_of_another_epoch_is_dropped(start):
    rank = start()
    rank.send(Shutdown(epoch=EPOCH - 1), plan(1))
    assert rank.receive().step_id == 1


def test_the_identity_names_epoch_and_rank():
    assert rank_identity(12, 3) != rank_identity(1, 23)


def test_the_sockets_of_a_rank_that_ended_are_closed(start, hub):
    rank = start()
    rank.send(Shutdown(epoch=EPOCH))
    rank.end()
    deadline = time.monotonic() + WAIT_S
    while hub.send_to_rank(rank.identity, b"") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not hub.send_to_rank(rank.identity, b"")


def test_a_head_is_heard_only_with_its_own_key(hub):
    """A rank must not execute what whoever took the Head's port sends it."""
    context = zmq.Context()
    impostor = context.socket(zmq.ROUTER)
    try:
        port = impostor.bind_to_random_port("tcp://127.0.0.1")
        import msgspec

        endpoint = msgspec.structs.replace(hub.rank_endpoint, address=f"tcp://127.0.0.1:{port}")
        executor = FakeExecutor()
        with pytest.raises(LeaseExpiredError):
            serve_rank(executor, endpoint, epoch=EPOCH, rank=0, lease_s=0.1)
        assert not impostor.poll(0)
    finally:
        context.destroy(linger=0)
