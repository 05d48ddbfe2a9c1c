"""What is left to choice: each policy alone, and how one is found by its name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvarto.cluster.block_space import BlockSpace
from kvarto.cluster.policies import EVICTION, PREEMPTION, VICTIM, WATERMARK, Choice, Costs, pick
from kvarto.cluster.policies.eviction import NUM_LEVELS
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.config import EngineConfig
from kvarto.protos.errors import ConfigError
from kvarto.protos.model import KVGroupSpec

COSTS = Costs(block_copy_s=0.010, prefill_token_s=0.001)
"""A block takes 20 ms to go and come back, as long as 20 tokens take to be computed."""


@dataclass
class Group:
    key: tuple[int, int]
    num_computed_tokens: int = 0


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "registry"), [
    ("preemption_mode", PREEMPTION), ("victim_policy", VICTIM), ("eviction_policy", EVICTION),
    ("watermark_policy", WATERMARK)])
def test_an_unknown_name_is_refused_by_its_key_with_those_that_are_known(key, registry):
    with pytest.raises(ConfigError) as caught:
        pick(registry, key, "nonsense")
    assert caught.value.message == f"{key}: there is no policy 'nonsense'; known: {', '.join(registry)}"


@pytest.mark.parametrize(("key", "registry"), [
    ("preemption_mode", PREEMPTION), ("victim_policy", VICTIM), ("eviction_policy", EVICTION),
    ("watermark_policy", WATERMARK)])
def test_every_policy_is_named_where_the_key_is_documented(key, registry):
    field = EngineConfig.model_fields[key]
    assert field.default in registry
    assert all(name in f"{field.annotation} {field.description}" for name in registry)


@pytest.mark.parametrize("key", ["preemption_mode", "victim_policy", "watermark_policy"])
def test_a_scheduler_refuses_an_unknown_policy(key):
    space = BlockSpace([KVGroupSpec(layer_ids=(0,))], [4], 8)
    with pytest.raises(ConfigError, match=f"^{key}: "):
        Scheduler(space, SchedulerLimits(1, 1), epoch=1, **{key: "nonsense"})


# -- swap or recompute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "swap"), [(19, False), (20, False), (21, True)])
def test_auto_takes_the_cheaper_on_both_sides_of_the_crossover(num_tokens, swap):
    assert PREEMPTION["auto"](COSTS, 1, num_tokens).swap is swap


@pytest.mark.parametrize(("block_copy_s", "swap"), [(0.1, True), (0.3, False)])
def test_auto_follows_the_measured_costs(block_copy_s, swap):
    assert PREEMPTION["auto"](Costs(block_copy_s, 0.001), 1, 400).swap is swap


def test_auto_swaps_what_has_no_block_to_move():
    assert PREEMPTION["auto"](COSTS, 0, 1).swap


@pytest.mark.parametrize(("mode", "swap"), [("swap", True), ("recompute", False)])
@pytest.mark.parametrize("num_tokens", [1, 1000])
def test_a_fixed_mode_heeds_no_costs(mode, swap, num_tokens):
    assert PREEMPTION[mode](COSTS, 3, num_tokens).swap is swap


@pytest.mark.parametrize("mode", PREEMPTION)
def test_every_choice_carries_both_estimates(mode):
    choice = PREEMPTION[mode](COSTS, 3, 50)
    assert isinstance(choice, Choice)
    assert (choice.swap_s, choice.recompute_s) == (pytest.approx(0.060), pytest.approx(0.050))


# -- victims ---------------------------------------------------------------------------------------------------------

BEHIND = [Group((0, 1), 9), Group((0, 4), 2), Group((1, 2), 30), Group((1, 3), 10), Group((1, 5), 10)]


def test_latest_takes_the_last_in_line():
    assert VICTIM["latest"](BEHIND) == 4


def test_least_computed_stays_within_the_lowest_priority():
    assert VICTIM["least_computed"]([*BEHIND[:2], Group((1, 2), 30), Group((1, 3), 20)]) == 3


def test_least_computed_takes_the_later_of_equals():
    assert VICTIM["least_computed"](BEHIND) == 4


@pytest.mark.parametrize("name", VICTIM)
def test_one_candidate_is_the_victim(name):
    assert VICTIM[name](BEHIND[:1]) == 0


# -- eviction and watermark ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVICTION)
@pytest.mark.parametrize("priority", [-5, 0, 5])
@pytest.mark.parametrize("num_hits", [0, 1, 10**6])
def test_every_level_is_one_that_there_is(name, priority, num_hits):
    assert 0 <= EVICTION[name](priority, num_hits) < NUM_LEVELS


def test_lru_has_one_level():
    assert {EVICTION["lru"](priority, num_hits) for priority in (-1, 0, 1) for num_hits in (0, 5)} == {0}


def test_retention_keeps_what_was_found_and_then_what_is_urgent():
    levels = [EVICTION["retention"](priority, num_hits) for num_hits in (0, 3) for priority in (0, -1)]
    assert levels == [0, 1, 2, 3]


@pytest.mark.parametrize(("num_blocks", "num_running", "left"), [(1000, 0, 0), (1000, 5, 10), (99, 5, 0)])
def test_admissions_leave_one_block_in_a_hundred_to_the_running(num_blocks, num_running, left):
    assert WATERMARK["one_percent"](num_blocks, num_running) == left


def test_without_a_watermark_nothing_is_left():
    assert WATERMARK["none"](1000, 5) == 0
