"""Starting worker groups, watching them and starting them again; groups and engine loop are fakes."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from kvarto.cluster import supervisor as module
from kvarto.cluster.supervisor import Supervisor
from kvarto.protos.errors import ResourcesError

LONG_S = 1.0


class FakeGroup:
    def __init__(self, epoch):
        self.engine = SimpleNamespace(info=SimpleNamespace(epoch=epoch))
        self.death: str | Exception | None = None
        self.ended = threading.Event()

    def dead_rank(self, timeout_s):
        death = self.death
        if isinstance(death, Exception):
            raise death
        if death is None:
            time.sleep(0.002)
        return death

    def end(self):
        self.ended.set()


class FakeHost:
    """An engine loop that does what is posted at once. `join`: a group is ready as soon as it is added."""

    def __init__(self, join=True):
        self.join, self.failed, self.added, self.supervisor = join, [], [], None

    def post(self, action):
        action()

    def add_group(self, index, engine, on_ready):
        self.added.append((index, engine.info.epoch))
        if self.join:
            on_ready()

    def fail_group(self, index, reason, epoch):
        self.failed.append((index, reason, epoch))
        self.supervisor.on_group_failed(index, reason)


class World:
    """`make(index, epoch)` may raise instead of returning a group."""

    def __init__(self, num_groups=1, make=lambda index, epoch: FakeGroup(epoch), join=True):
        self.groups, self.tries = {}, []
        self.host = FakeHost(join)

        def start(index, epoch):
            self.tries.append((index, epoch))
            group = self.groups[index] = make(index, epoch)
            return group

        self.supervisor = self.host.supervisor = Supervisor(start, self.host, num_groups)

    def stop(self):
        stopper = threading.Thread(target=self.supervisor.stop, daemon=True)
        stopper.start()
        stopper.join(LONG_S)
        assert not stopper.is_alive(), "stop does not return"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits between tries are recorded and take no time."""
    waits = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            if timeout is not None and timeout >= 0.5:
                waits.append(timeout)
                timeout = 0.001
            return super().wait(timeout)

    names = {name: getattr(threading, name) for name in ("Thread", "Lock", "Semaphore")}
    monkeypatch.setattr(module, "threading", SimpleNamespace(Event=Event, **names))
    return waits


def until(condition):
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.002)


def in_background(action):
    """A thread that runs `action`; its `error` is what that raised."""
    def run():
        try:
            action()
        except BaseException as error:
            thread.error = error

    thread = threading.Thread(target=run, daemon=True)
    thread.error = None
    thread.start()
    return thread


def test_start_returns_when_all_groups_are_ready():
    world = World(num_groups=3)
    world.supervisor.start()
    assert sorted(index for index, _ in world.host.added) == [0, 1, 2]
    world.stop()


def test_start_waits_for_a_group_that_is_not_ready():
    world = World(join=False)
    thread = in_background(world.supervisor.start)
    thread.join(0.1)
    assert thread.is_alive()
    world.stop()


def test_every_group_has_an_epoch_of_its_own():
    world = World(num_groups=3)
    world.supervisor.start()
    assert sorted(epoch for _, epoch in world.tries) == [1, 2, 3]
    world.stop()


def test_the_error_of_a_first_start_is_raised():
    def make(index, epoch):
        raise ResourcesError("no GPU is left")

    with pytest.raises(ResourcesError, match="no GPU is left"):
        World(make=make).supervisor.start()


def test_the_other_groups_are_ended_when_one_does_not_start():
    def make(index, epoch):
        if index == 1:
            raise ResourcesError("no GPU is left")
        return FakeGroup(epoch)

    world = World(num_groups=2, make=make)
    with pytest.raises(ResourcesError):
        world.supervisor.start()
    assert world.groups[0].ended.is_set()


def test_a_group_whose_first_start_failed_is_not_tried_again():
    def make(index, epoch):
        raise ResourcesError("no GPU is left")

    world = World(make=make)
    with pytest.raises(ResourcesError):
        world.supervisor.start()
    assert len(world.tries) == 1


def test_a_group_that_dies_before_it_was_ever_ready_is_an_error_of_the_first_start():
    def make(index, epoch):
        group = FakeGroup(epoch)
        group.death = "rank 0 died: out of memory"
        return group

    world = World(make=make, join=False)
    thread = in_background(world.supervisor.start)
    thread.join(1.0)
    world.stop()
    assert "out of memory" in str(thread.error)


def test_a_dead_rank_is_reported_to_the_loop():
    world = World()
    world.supervisor.start()
    world.groups[0].death = "rank 1 died: killed"
    until(lambda: world.host.failed)
    assert world.host.failed[0] == (0, "rank 1 died: killed", 1)
    world.stop()


def test_a_group_with_a_dead_rank_is_ended():
    world = World()
    world.supervisor.start()
    group = world.groups[0]
    group.death = "rank 1 died: killed"
    until(group.ended.is_set)
    world.stop()


def test_a_group_with_a_dead_rank_starts_again_under_a_new_epoch():
    world = World()
    world.supervisor.start()
    world.groups[0].death = "rank 1 died: killed"
    until(lambda: len(world.host.added) == 2)
    assert world.host.added[1] == (0, 2)
    world.stop()


def test_a_group_that_the_loop_gave_up_starts_again():
    world = World()
    world.supervisor.start()
    world.supervisor.on_group_failed(0, "no result of step 3")
    until(lambda: len(world.host.added) == 2)
    assert world.host.added[1] == (0, 2)
    world.stop()


def test_the_other_groups_run_on_when_one_dies():
    world = World(num_groups=2)
    world.supervisor.start()
    other = world.groups[1]
    world.groups[0].death = "rank 0 died"
    until(lambda: len(world.host.added) == 3)
    assert not other.ended.is_set()
    world.stop()


def test_restarts_that_fail_are_tried_again_after_longer_and_longer_waits(quick):
    def make(index, epoch):
        if 2 <= epoch <= 9:
            raise ResourcesError("the node is gone")
        return FakeGroup(epoch)

    world = World(make=make)
    world.supervisor.start()
    world.groups[0].death = "its node died"
    until(lambda: len(world.host.added) == 2)
    world.stop()
    assert quick[:8] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_restarts_that_die_before_they_are_ready_are_not_tried_in_a_tight_loop(quick):
    def make(index, epoch):
        group = FakeGroup(epoch)
        if epoch > 1:
            group.death = "rank 0 died: out of memory"
        return group

    world = World(make=make)
    world.supervisor.start()
    world.host.join = False
    world.groups[0].death = "rank 0 died"
    until(lambda: len(world.tries) > 6)
    world.stop()
    assert quick[:4] == [0.5, 1, 2, 4]


def test_a_group_that_cannot_be_watched_is_started_again():
    """Ray's control service may be away for a while: that must not be the end of the group."""
    world = World()
    world.supervisor.start()
    world.groups[0].death = ConnectionError("the GCS does not answer")
    until(lambda: len(world.host.added) == 2)
    world.stop()


def test_stop_ends_every_group():
    world = World(num_groups=3)
    world.supervisor.start()
    world.stop()
    assert all(group.ended.is_set() for group in world.groups.values())


def test_stop_starts_nothing_again():
    world = World()
    world.supervisor.start()
    world.stop()
    assert len(world.tries) == 1


def test_stop_is_not_held_up_by_a_wait_between_tries(quick):
    def make(index, epoch):
        if epoch > 1:
            raise ResourcesError("the node is gone")
        return FakeGroup(epoch)

    world = World(make=make)
    world.supervisor.start()
    world.groups[0].death = "its node died"
    until(lambda: len(world.tries) > 3)
    world.stop()


def test_stop_returns_although_the_loop_no_longer_does_what_is_posted():
    world = World()
    world.supervisor.start()
    world.host.post = lambda action: None
    world.groups[0].death = "rank 0 died"
    time.sleep(0.05)
    world.stop()


def test_a_start_that_is_stopped_returns():
    world = World(join=False)
    thread = in_background(world.supervisor.start)
    until(lambda: world.host.added)
    world.stop()
    thread.join(1.0)
    assert not thread.is_alive()
