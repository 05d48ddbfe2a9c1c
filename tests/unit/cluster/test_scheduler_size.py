"""How the work of a step grows with the number of requests: questions to the block space are counted, not seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.cluster.block_space import BlockSpace
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import AddRequest
from kvarto.protos.sampling import SamplingParams

_spec = importlib.util.spec_from_file_location("memory_model", Path(__file__).with_name("memory_model.py"))
assert _spec and _spec.loader
memory_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory_model)


class CountingSpace(BlockSpace):
    """Counts the questions of the scheduler: what grows when its work does."""

    num_questions = 0

    def has_room(self, *args, **kwargs):
        self.num_questions += 1
        return super().has_room(*args, **kwargs)

    def num_missing(self, *args, **kwargs):
        self.num_questions += 1
        return super().num_missing(*args, **kwargs)

    def match(self, *args, **kwargs):
        self.num_questions += 1
        return super().match(*args, **kwargs)

    def extend_in_place(self, *args, **kwargs):
        self.num_questions += 1
        return super().extend_in_place(*args, **kwargs)


@pytest.fixture(scope="module")
def crowd():
    """4,096 running sequences and 100,000 waiting ones; a step that gives everybody a token."""
    space = CountingSpace([KVGroupSpec(layer_ids=(0,))], [100_000], 8, enable_prefix_caching=True)
    scheduler = Scheduler(space, SchedulerLimits(4096, 16_384), epoch=1)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    prompt = [1, 2, 3]
    for number in range(104_096):
        scheduler.add(AddRequest(request_id=str(number), prompt_token_ids=prompt, params=params), b"o", 50)
    rank = memory_model.MemoryModelRank(8, 100_000)

    def step():
        result, = rank.execute(scheduler.schedule())
        scheduler.update(result)

    step()
    return scheduler, step


def test_a_step_asks_the_block_space_once_for_each_running_sequence(crowd):
    scheduler, step = crowd
    scheduler.space.num_questions = 0
    step()
    assert scheduler.num_running == 4096
    assert scheduler.space.num_questions < 4096 + 10


def test_a_step_does_not_walk_over_the_waiting(crowd, monkeypatch):
    scheduler, step = crowd
    seen = []
    group_type = type(scheduler.groups[0])
    live = group_type.live
    monkeypatch.setattr(group_type, "live", property(lambda group: seen.append(group) or live.__get__(group)))
    step()
    assert 4096 <= len(seen) < 3 * 4096


def test_cancelling_everyone_asks_nothing_of_the_block_space(crowd):
    scheduler, _ = crowd
    scheduler.space.num_questions = 0
    for group in scheduler.groups[::-1]:
        scheduler.cancel(group.owner, group.request.request_id)
    assert (scheduler.num_unfinished, scheduler.space.num_questions) == (0, 0)
