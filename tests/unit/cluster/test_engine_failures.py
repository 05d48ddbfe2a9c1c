"""The Head's loop when a worker group fails: what that may cost, and what health says of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.cluster.engine.transport import GroupFailedError
from kvarto.protos.request import CancelRequest, Ping, Pong

_spec = importlib.util.spec_from_file_location("engine_fake", Path(__file__).with_name("engine_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)
add = fake.add


FAILURES = pytest.mark.parametrize("how", ["receive", "send", "silence", "rank_died", "defect"])


def fail(world, how, index=0):
    """Let a worker group fail in one of the ways that it can."""
    link, engine = world.links[index], world.engines[index]
    if how == "receive":
        link.receive_error = GroupFailedError("rank 1 failed")
    elif how == "send":
        link.send_error = GroupFailedError("rank 1 is not connected")
        link.step()
    elif how == "silence":
        world.clock.now += fake.STEP_TIMEOUT_S + 1
    elif how == "rank_died":
        world.loop.post(lambda: world.loop.fail_group(index, "rank 1 died", engine.info.epoch))
    else:
        engine.scheduler.schedule = lambda: 1 / 0
        link.step()
    world.loop.run_once()


def errors(world, request_id):
    return [delta.error.name for delta in world.deltas(request_id) if delta.error]


def ready(world):
    world.post(Ping(), owner=b"probe")
    return world.of(Pong, b"probe")[-1].ready


# -- a worker group that fails ---------------------------------------------------------------------------------------


@FAILURES
def test_every_request_of_a_failed_group_ends_once(how):
    world = fake.World()
    world.post(add("1", max_tokens=50), add("2", max_tokens=50))
    fail(world, how)
    world.loop.run_once()
    assert errors(world, "1") + errors(world, "2") == ["UnavailableError"] * 2


@FAILURES
def test_the_supervisor_is_told_of_a_failed_group_once(how):
    world = fake.World()
    world.post(add("1", max_tokens=50))
    fail(world, how)
    world.loop.run_once()
    assert [index for index, _ in world.failed] == [0]


@FAILURES
def test_a_failed_group_costs_the_other_group_nothing(how):
    world = fake.World(num_groups=2)
    world.post(add("1", max_tokens=50), add("2", max_tokens=2))
    if how == "silence":
        world.step(1)
        world.step(1)
    fail(world, how)
    while world.links[1].plans:
        world.step(1)
    assert world.deltas("2")[-1].finish_reason == "length"


@FAILURES
def test_the_ranks_of_a_failed_group_are_told_to_end(how):
    world = fake.World()
    world.post(add("1", max_tokens=50))
    fail(world, how)
    assert world.links[0].closed


def test_requests_are_unavailable_until_a_new_group_joins():
    world = fake.World()
    world.post(add("1"))
    fail(world, "receive")
    world.post(add("2"))
    world.join(0)
    world.loop.run_once()
    world.post(add("3"))
    assert (errors(world, "2"), errors(world, "3")) == (["UnavailableError"], [])


def test_whoever_is_told_to_try_again_is_told_that_the_group_is_not_ready():
    world = fake.World()
    world.post(add("1"))
    fail(world, "receive")
    assert [pong.ready for pong in world.of(Pong, b"a")] == [False]


def test_a_report_about_a_former_epoch_is_dropped():
    world = fake.World()
    world.loop.fail_group(0, "rank 0 died", epoch=77)
    assert not world.failed


@pytest.mark.parametrize("how", ["send", "silence_after_result"])
def test_the_last_delta_of_a_request_is_not_lost_with_its_group(how):
    """It has left the scheduler: nobody would end it otherwise."""
    world = fake.World()
    world.post(add("1", max_tokens=1), add("2", max_tokens=50))
    if how == "send":
        fail(world, "send")
    else:
        world.links[0].step()
        world.clock.now += fake.STEP_TIMEOUT_S + 1
        world.loop.run_once()
    assert [delta.finish_reason for delta in world.deltas("1")] == ["length"]


def test_a_scheduler_that_cannot_even_cancel_costs_only_its_group():
    world = fake.World(num_groups=2)
    world.post(add("1", max_tokens=50), add("2", max_tokens=1))
    world.engines[0].scheduler.cancel = lambda *_: 1 / 0
    fail(world, "defect")
    world.step(1)
    assert world.deltas("2")[-1].finish_reason == "length"


def test_a_defect_in_the_answer_to_one_message_leaves_the_loop_alive():
    world = fake.World(num_groups=2)
    world.engines[0].add = lambda *_: 1 / 0
    world.post(add("1"))
    assert [type(delta.error).__name__ for delta in world.deltas("1")] == ["RequestError"]


# -- silence is measured fairly --------------------------------------------------------------------------------------


def test_a_group_within_the_timeout_goes_on():
    world = fake.World()
    world.post(add("1"))
    world.clock.now += fake.STEP_TIMEOUT_S - 1
    world.loop.run_once()
    assert not world.failed


def test_a_plan_that_had_to_wait_for_the_one_before_has_its_whole_time():
    world = fake.World()
    world.post(add("1"))
    world.clock.now += 0.8 * fake.STEP_TIMEOUT_S
    world.step()
    world.clock.now += 0.8 * fake.STEP_TIMEOUT_S
    world.loop.run_once()
    assert not world.failed


def test_clients_that_give_up_do_not_keep_a_silent_group_ready():
    world = fake.World()
    for number in range(5):
        world.post(add(str(number)))
        world.clock.now += 20
        if number < 4:
            world.post(CancelRequest(request_id=str(number)))
    assert not ready(world)


# -- a rank that owes the answer to a disk load ----------------------------------------------------------------------

STORED = range(1, 17)


def loading():
    """Rank 0 has answered for the blocks of a request, which nothing else is in flight for; rank 1 has not."""
    world = fake.World(num_host_blocks=4, caching=True, disk=STORED)
    world.post(add("1", prompt=[*STORED, 20]))
    answer = world.links[0].step().pop()
    assert answer.rank == 1
    world.loop.run_once()
    assert not world.links[0].plans and world.engines[0].scheduler.awaits_loads
    return world, answer


def test_a_rank_that_does_not_answer_for_a_disk_load_fails_its_group():
    world, _ = loading()
    world.clock.now += fake.STEP_TIMEOUT_S + 1
    with pytest.raises(GroupFailedError, match="disk loads within 120 s"):
        world.engines[0].receive(world.clock.now, [])


def test_the_request_that_waits_for_a_disk_load_ends_with_its_group():
    world, _ = loading()
    world.clock.now += fake.STEP_TIMEOUT_S + 1
    world.loop.run_once()
    assert (errors(world, "1"), [index for index, _ in world.failed]) == (["UnavailableError"], [0])


def test_a_rank_that_answers_for_a_disk_load_in_time_costs_nothing():
    world, answer = loading()
    world.clock.now += fake.STEP_TIMEOUT_S - 1
    world.loop.run_once()
    world.links[0].results.append(answer)
    world.loop.run_once()
    while world.links[0].plans:
        world.step()
    assert ([delta.finish_reason for delta in world.deltas("1")][-1], world.failed) == ("length", [])


def test_an_answer_for_a_disk_load_that_comes_with_the_timeout_counts():
    world, answer = loading()
    world.links[0].results.append(answer)
    world.clock.now += fake.STEP_TIMEOUT_S + 1
    world.loop.run_once()
    assert not world.failed and world.links[0].plans


def test_while_steps_end_a_disk_load_may_take_longer():
    world, _ = loading()
    world.post(add("2", max_tokens=9))
    for _ in range(4):
        world.clock.now += 0.5 * fake.STEP_TIMEOUT_S
        world.step()
    assert not world.failed


def test_a_disk_load_that_nobody_waits_for_any_more_still_fails_the_group():
    """Its host blocks would never be free again."""
    world, _ = loading()
    world.post(CancelRequest(request_id="1"))
    world.clock.now += fake.STEP_TIMEOUT_S + 1
    world.loop.run_once()
    assert [index for index, _ in world.failed] == [0]


# -- readiness -------------------------------------------------------------------------------------------------------


def test_a_head_with_a_group_is_ready():
    assert ready(fake.World())


def test_a_head_without_a_group_is_not_ready():
    assert not ready(fake.World(num_groups=0))


def test_a_draining_head_is_not_ready():
    world = fake.World()
    world.loop.post(world.loop.drain)
    assert not ready(world)


def test_a_group_that_has_work_and_ends_no_step_is_not_ready():
    world = fake.World()
    world.post(add("1"))
    world.clock.now += 31
    assert not ready(world)


def test_a_long_idle_time_does_not_count_as_being_stuck():
    world = fake.World()
    world.clock.now += 3600
    world.post(add("1"))
    assert ready(world)


def test_load_alone_never_makes_it_unready():
    world = fake.World(max_num_seqs=1)
    world.post(*(add(str(number), max_tokens=40) for number in range(60)))
    for _ in range(5):
        world.clock.now += 29
        world.step()
    assert ready(world)
