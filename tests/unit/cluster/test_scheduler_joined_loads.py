"""The scheduler where several requests begin with the same blocks on disk: one load serves them all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.cluster.block_space import tiers

_spec = importlib.util.spec_from_file_location("disk_world", Path(__file__).with_name("disk_world.py"))
assert _spec and _spec.loader
disk_world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(disk_world)
moves_of = disk_world.moves_of
STORED, PROMPT, KEYS = disk_world.STORED, disk_world.PROMPT, disk_world.KEYS
restarted, status = disk_world.restarted, disk_world.status


OTHER = [*STORED, 7, 8]


def loads(world):
    """How many blocks each plan loads."""
    return [len(moves_of(plan).disk_loads) for plan in world.plans if moves_of(plan).disk_loads]


def joined():
    """A load in flight that `a` began and `b` waits for too."""
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    world.add("b", prompt=OTHER)
    assert world.schedule() is None
    assert [status(world, name) for name in "ab"] == ["loading"] * 2
    return world


def test_simultaneous_arrivals_wait_for_one_load():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.add("b", prompt=[*STORED, 7, 8])
    world.finish()
    assert sum(world.computed.values()) == 2 * (2 + 4)


def test_simultaneous_arrivals_have_their_tokens():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.add("b", prompt=[*STORED, 7, 8])
    world.finish()
    assert [world.tokens(name) for name in "ab"] == [world.alone(name) for name in "ab"]


def test_simultaneous_arrivals_load_every_block_once():
    world = restarted()
    for number in range(3):
        world.add(str(number), prompt=[*STORED, 7, number])
    world.finish()
    assert loads(world) == [5]


# -- a load in flight ------------------------------------------------------------------------------------------------


def test_one_that_comes_later_joins_a_load_in_flight():
    world = joined()
    world.result()
    assert world.schedule() == [("a", 2), ("b", 2)]
    world.finish()
    assert loads(world) == [5]
    assert [world.tokens(name) for name in "ab"] == [world.alone(name) for name in "ab"]


def test_one_that_has_joined_waits_for_every_rank():
    world = joined()
    first, second = world.rank.execute(world.in_flight.popleft())
    world.take(first)
    assert (status(world, "b"), world.schedule()) == ("loading", None)
    world.scheduler.answered(second)
    assert world.schedule() == [("a", 2), ("b", 2)]


def test_all_who_wait_for_a_load_go_on_in_their_order():
    world = restarted()
    world.add("a", prompt=PROMPT, priority=1)
    world.schedule()
    world.add("b", prompt=OTHER, priority=0)
    world.schedule()
    world.result()
    assert world.schedule() == [("b", 2), ("a", 2)]


@pytest.mark.parametrize(("gone", "left"), ["ab", "ba"])
def test_one_that_is_cancelled_leaves_the_load_to_the_other(gone, left):
    world = joined()
    world.cancel(gone)
    world.result()
    assert world.schedule() == [(left, 2)]
    world.finish()
    assert world.tokens(left) == world.alone(left)


def test_what_was_loaded_for_nobody_any_more_is_cached():
    world = joined()
    world.cancel("a")
    world.cancel("b")
    world.result()
    assert world.counts(world.space.hosts[0]) == {"cached": 5, "free": 3}
    assert not world.scheduler.awaits_loads


def test_what_failed_is_computed_once_for_all_who_waited():
    world = joined()
    world.result(corrupt=[KEYS[2]])
    assert world.schedule() == [("a", 26), ("b", 2)]
    world.finish()
    assert [world.tokens(name) for name in "ab"] == [world.alone(name) for name in "ab"]


def test_one_that_finds_its_beginning_joins_the_load_of_what_follows():
    """`b` finds the first block on the device, and asks for the second."""
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    world.add("short", prompt=STORED[:9], prompt_logprobs=0, max_tokens=1)
    world.schedule()
    world.add("b", prompt=OTHER)
    assert (world.schedule(), status(world, "b")) == (None, "loading")
    world.finish()
    assert (loads(world), world.tokens("b")) == ([5], world.alone("b"))


def test_one_that_needs_more_than_it_has_joined_loads_the_rest_itself():
    world = restarted()
    world.add("a", prompt=STORED[:25])
    world.schedule()
    world.add("b", prompt=OTHER)
    world.schedule()
    world.result()
    world.finish()
    assert loads(world) == [3, 2]
    assert [world.tokens(name) for name in "ab"] == [world.alone(name) for name in "ab"]


def test_one_whose_first_block_is_not_being_read_does_not_join():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.schedule()
    world.add("b", prompt=OTHER, salt="t")
    assert world.schedule() == [("b", 42)]


# -- loads in several plans ------------------------------------------------------------------------------------------


@pytest.fixture
def two_at_a_time(monkeypatch):
    monkeypatch.setattr(tiers, "MAX_LOADS", 2)


@pytest.mark.usefixtures("two_at_a_time")
def test_what_one_plan_may_not_read_is_read_by_the_next():
    world = restarted()
    world.add("a", prompt=PROMPT)
    world.finish()
    assert loads(world) == [2, 2, 1]
    assert (world.tokens("a"), world.cached("a")[0]) == (world.alone("a"), 40)


@pytest.mark.usefixtures("two_at_a_time")
def test_who_joins_the_first_of_several_loads_has_the_others_too():
    world = joined()
    world.finish()
    assert loads(world) == [2, 2, 1]
    assert [world.tokens(name) for name in "ab"] == [world.alone(name) for name in "ab"]


@pytest.mark.usefixtures("two_at_a_time")
def test_after_a_failure_no_more_is_read():
    world = joined()
    world.result(corrupt=[KEYS[1]])
    assert world.schedule() == [("a", 34), ("b", 2)]
    world.finish()
    assert loads(world) == [2]


@pytest.mark.usefixtures("two_at_a_time")
def test_for_nobody_no_more_is_read():
    world = joined()
    world.cancel("a")
    world.cancel("b")
    world.result()
    assert (world.schedule(), loads(world)) == (None, [2])


@pytest.mark.usefixtures("two_at_a_time")
def test_who_is_left_of_several_has_the_rest_read():
    world = joined()
    world.cancel("a")
    world.finish()
    assert (loads(world), world.tokens("b")) == ([2, 2, 1], world.alone("b"))
