"""The Head's loop: what frontends are told and what ranks are sent."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.cluster.engine.transport import GroupFailedError
from kvarto.protos.request import CancelRequest, DeltaBatch, Ping, Pong, Query, Reply
from kvarto.protos.step import StepResult

_spec = importlib.util.spec_from_file_location("engine_fake", Path(__file__).with_name("engine_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)
add = fake.add


def errors(world, request_id):
    return [delta.error.name for delta in world.deltas(request_id) if delta.error]


# -- deltas ----------------------------------------------------------------------------------------------------------


def test_a_step_is_one_message_per_frontend():
    world = fake.World()
    world.transport.inbox = [(b"a", add("1")), (b"a", add("2")), (b"b", add("3"))]
    world.loop.run_once()
    world.step()
    shape = [(owner, [delta.request_id for delta in message.deltas]) for owner, message in world.transport.sent]
    assert shape == [(b"a", ["1", "2"]), (b"b", ["3"])]


def test_the_ranks_have_their_next_plan_before_the_frontends_hear_of_the_last():
    world = fake.World()
    world.post(add("1", max_tokens=9))
    world.log.clear()
    world.step()
    assert world.log == ["StepPlan", "DeltaBatch"]


def test_two_plans_are_in_flight_when_scheduling_is_asynchronous():
    world = fake.World()
    world.post(add("1"))
    assert [plan.step_id for plan in world.links[0].plans] == [0, 1]


def test_a_request_has_the_tokens_that_it_would_have_had_alone():
    world = fake.World()
    world.post(add("1", max_tokens=9), add("2", prompt=(4, 5), max_tokens=5))
    while world.links[0].plans:
        world.step()
    tokens = [token for delta in world.deltas("1") for token in delta.token_ids]
    assert tokens == fake.memory_model.generate([1, 2, 3], 9, eos=-1)


def test_a_batch_names_the_step_that_brought_it():
    world = fake.World()
    world.post(add("1"))
    world.step()
    world.step()
    assert [batch.step_id for batch in world.of(DeltaBatch)] == [0, 1]


# -- admission -------------------------------------------------------------------------------------------------------


def test_a_request_that_cannot_be_served_is_answered_by_its_error():
    world = fake.World()
    world.post(add("1", prompt=range(1, 40), max_tokens=500))
    assert errors(world, "1") == ["PromptTooLongError"]


def test_a_request_that_cannot_be_served_takes_nothing():
    world = fake.World()
    world.post(add("1", prompt=[]))
    assert world.loop.num_unfinished == 0


def test_a_request_without_a_worker_group_is_unavailable():
    world = fake.World(num_groups=0)
    world.post(add("1"))
    assert errors(world, "1") == ["UnavailableError"]


def test_the_least_loaded_group_gets_the_next_request():
    world = fake.World(num_groups=2)
    world.post(add("1"), add("2"), add("3"))
    assert [engine.load for engine in world.engines] == [2, 1]


def test_a_request_id_that_is_in_use_is_refused():
    world = fake.World()
    world.post(add("1"), add("1"))
    assert errors(world, "1") == ["InvalidRequestError"]


def test_a_request_id_that_is_in_use_costs_nobody_else_anything():
    world = fake.World()
    world.post(add("1"), add("1"), add("2"))
    for _ in range(6):
        if world.links[0].plans:
            world.step()
    assert errors(world, "2") == []


# -- results that do not count ---------------------------------------------------------------------------------------


def test_a_result_of_another_epoch_is_dropped():
    world = fake.World()
    world.post(add("1"))
    world.links[0].results.append(StepResult(epoch=9, step_id=0))
    world.loop.run_once()
    assert len(world.links[0].plans) == 2


def test_a_result_of_an_unknown_step_is_dropped():
    world = fake.World()
    world.post(add("1"))
    world.links[0].results.append(StepResult(epoch=1, step_id=77))
    world.loop.run_once()
    assert not world.transport.sent


def test_a_repeated_result_is_dropped():
    world = fake.World()
    world.post(add("1"))
    world.links[0].step()
    world.links[0].results *= 2
    world.loop.run_once()
    assert [delta.first for delta in world.deltas("1")] == [0]


# -- frontends -------------------------------------------------------------------------------------------------------


def test_a_frontend_that_is_gone_has_its_requests_cancelled():
    world = fake.World()
    world.post(add("1", max_tokens=50), add("2", max_tokens=50))
    world.transport.gone.add(b"a")
    world.step()
    assert world.loop.num_unfinished == 0


def test_the_blocks_of_a_frontend_that_is_gone_are_free_once_no_plan_names_them():
    world = fake.World()
    world.post(add("1", max_tokens=50))
    world.transport.gone.add(b"a")
    world.step()
    while world.links[0].plans:
        world.step()
    assert world.engines[0].scheduler.space.num_free == world.num_blocks


def test_a_frontend_that_is_gone_costs_another_nothing():
    world = fake.World()
    world.post(add("1", max_tokens=50))
    world.post(add("1", max_tokens=50), owner=b"b")
    world.transport.gone.add(b"a")
    world.step()
    assert [group.owner for group in world.engines[0].scheduler.groups] == [b"b"]


def test_a_cancel_frees_the_request():
    world = fake.World()
    world.post(add("1"), CancelRequest(request_id="1"))
    assert world.loop.num_unfinished == 0


def test_a_cancel_of_one_sequence_leaves_the_others():
    world = fake.World()
    world.post(add("1", n=2), CancelRequest(request_id="1", seq_index=0))
    assert [sequence.index for group in world.engines[0].scheduler.groups for sequence in group.live] == [1]


def test_a_cancel_that_crosses_the_last_delta_is_no_error():
    world = fake.World()
    world.post(CancelRequest(request_id="never heard of"))
    assert not world.transport.sent


@pytest.mark.parametrize("what", ["info", "status", "blocks", "metrics"])
def test_a_query_is_answered_under_its_own_number(what):
    world = fake.World()
    world.post(Query(query_id=7, what=what))
    assert [reply.query_id for reply in world.of(Reply)] == [7]


# -- draining and leases ---------------------------------------------------------------------------------------------


def test_a_draining_head_refuses_new_requests():
    world = fake.World()
    world.loop.post(world.loop.drain)
    world.loop.run_once()
    world.post(add("1"))
    assert errors(world, "1") == ["UnavailableError"]


def test_a_draining_head_lets_running_requests_finish():
    world = fake.World()
    world.post(add("1"))
    world.loop.post(world.loop.drain)
    while world.links[0].plans:
        world.step()
    assert world.deltas("1")[-1].finish_reason == "length"


def test_who_asks_for_a_drain_is_told_what_is_left_and_that_the_head_is_not_ready():
    world = fake.World()
    world.post(add("1"), add("2"))
    world.post(Query(query_id=1, what="drain"))
    told = [message for _, message in world.transport.sent if isinstance(message, Pong | Reply)]
    assert [type(message) for message in told] == [Pong, Reply]
    assert (told[0].ready, told[1].body) == (False, {"num_unfinished": 2})
    while world.links[0].plans:
        world.step()
    world.post(Query(query_id=2, what="drain"), add("3"))
    assert world.of(Reply)[-1].body == {"num_unfinished": 0}
    assert errors(world, "3") == ["UnavailableError"]


def test_every_frontend_hears_of_a_drain_at_once():
    world = fake.World()
    world.post(Ping(), owner=b"a")
    world.post(Ping(), owner=b"b")
    world.transport.sent.clear()
    world.post(Query(query_id=1, what="drain"), owner=b"a")
    assert {owner for owner, message in world.transport.sent if isinstance(message, Pong) and not message.ready} == {
        b"a", b"b"}


def drain_groups(world, *indices):
    """How many requests these groups have left."""
    left = []
    world.loop.post(lambda: left.append(world.loop.drain_groups(indices)))
    world.loop.run_once()
    return left[0]


def test_a_group_that_is_drained_finishes_its_requests_while_the_others_take_new_ones():
    world = fake.World(num_groups=2)
    world.post(add("1"), add("2"))
    assert [engine.load for engine in world.engines] == [1, 1]
    assert drain_groups(world, 1) == 1
    world.post(add("3"), add("4"))
    assert [engine.load for engine in world.engines] == [3, 1]
    while world.links[1].plans:
        world.step(1)
    assert world.deltas("2")[-1].finish_reason == "length"
    assert drain_groups(world, 1) == 0
    world.post(Ping())
    assert world.of(Pong)[-1].ready


def test_with_its_only_group_drained_the_head_is_not_ready_until_that_one_was_started_again():
    world = fake.World()
    assert drain_groups(world, 0, 7) == 0
    world.post(add("1"), Ping())
    assert errors(world, "1") == ["UnavailableError"]
    assert (world.of(Pong)[-1].ready, world.of(Pong)[-1].reason) == (
        False, "every worker group that is ready is on a node that is being drained")
    world.loop.fail_group(0, "its node is gone", 1)
    world.join(0)
    world.loop.run_once()
    world.post(add("2"), Ping())
    assert errors(world, "2") == []
    assert world.of(Pong)[-1].ready


def test_leases_are_renewed_twice_a_second():
    world = fake.World()
    for _ in range(21):
        world.clock.now += 0.1
        world.loop.run_once()
    assert world.links[0].num_leases in (4, 5)


def test_a_rank_that_the_lease_does_not_reach_fails_its_group():
    world = fake.World()

    def renew():
        raise GroupFailedError("rank 0 is not connected")

    world.links[0].renew_lease = renew
    world.clock.now += 1
    world.loop.run_once()
    assert len(world.failed) == 1


def test_the_ranks_of_a_group_that_is_joining_have_their_leases_renewed():
    """One rank may be connected long before the others."""
    world = fake.World(num_groups=0)
    world.join(0, connected=False)
    for _ in range(3):
        world.clock.now += 1
        world.loop.run_once()
    assert world.links[0].num_leases > 0


# -- joining ---------------------------------------------------------------------------------------------------------


def test_a_group_does_not_join_before_its_link_is_connected():
    world = fake.World(num_groups=0)
    world.join(0, connected=False)
    world.loop.run_once()
    assert not world.loop.infos


def test_a_group_joins_once_its_link_is_connected():
    world = fake.World(num_groups=0)
    told = []
    world.join(0, connected=False, on_ready=lambda: told.append("ready"))
    world.links[0].connected = True
    world.loop.run_once()
    assert told == ["ready"]


def test_a_message_that_comes_with_a_group_finds_it_there():
    world = fake.World(num_groups=0)
    world.join(0)
    world.post(Query(query_id=1, what="info"))
    reply, = world.of(Reply)
    assert len(reply.body["info"]) == 1


def test_a_group_that_dies_while_joining_is_given_up():
    world = fake.World(num_groups=0)
    engine = world.join(0, connected=False)
    world.loop.fail_group(0, "rank 0 died", engine.info.epoch)
    world.links[0].connected = True
    world.loop.run_once()
    assert (world.loop.infos, len(world.failed)) == ([], 1)


def test_the_end_of_the_loop_ends_ranks_and_sockets():
    world = fake.World()
    world.loop.stop()
    world.loop.run()
    assert world.links[0].closed and world.transport.closed
