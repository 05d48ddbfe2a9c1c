"""The scores of sequences: they follow the rows through steps, forks, compactions and swaps."""

from __future__ import annotations

import pytest
import torch

from kvarto.worker.score_pool import ScorePool


def received(*rows):
    """Of one layer with one KV head."""
    return torch.tensor([[rows]], dtype=torch.float32)


@pytest.fixture
def pool():
    pool = ScorePool()
    pool.start(1, 0)
    pool.add(1, received(1.0, 2.0, 3.0))
    return pool


def of(pool, seq_id):
    return pool.scores(seq_id)[0, 0].tolist()


def test_steps_add_up_and_add_rows(pool):
    pool.add(1, received(0.5, 0.25, 0.125, 0.0625))
    assert of(pool, 1) == [1.5, 2.25, 3.125, 0.0625]


def test_what_was_given_may_be_a_view_that_changes_later(pool):
    step = torch.ones(1, 1, 8)
    pool.add(1, step[..., :3])
    step.zero_()
    assert of(pool, 1) == [2.0, 3.0, 4.0]


def test_only_the_rows_that_are_kept_have_scores(pool):
    pool.keep(1, torch.tensor([[[0, 2]]], dtype=torch.int32))
    pool.add(1, received(1.0, 1.0, 1.0))
    assert of(pool, 1) == [2.0, 4.0, 1.0]


def test_a_fork_and_its_parent_go_different_ways(pool):
    pool.fork(2, 1)
    pool.add(1, received(1.0, 1.0, 1.0))
    pool.keep(2, torch.tensor([[[1]]], dtype=torch.int32))
    assert (of(pool, 1), of(pool, 2)) == ([2.0, 3.0, 4.0], [2.0])


def test_a_suspended_sequence_starts_with_its_scores(pool):
    pool.suspend(1)
    pool.fork(2, 1)
    assert pool.is_suspended(1) and pool.is_suspended(2)
    pool.start(1, 3)
    pool.start(2, 3)
    assert not pool.is_suspended(1)
    pool.add(1, received(1.0, 1.0, 1.0, 1.0))
    assert (of(pool, 1), of(pool, 2)) == ([2.0, 3.0, 4.0, 1.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("suspended", [False, True])
def test_an_ended_sequence_leaves_nothing(pool, suspended):
    if suspended:
        pool.suspend(1)
    pool.end(1)
    assert not pool.is_suspended(1)
    with pytest.raises(KeyError):
        pool.scores(1)
    pool.start(1, 0)
    pool.add(1, received(5.0))
    assert of(pool, 1) == [5.0]


def test_rows_that_no_query_was_seen_to_look_at_are_refused(pool):
    with pytest.raises(ValueError, match="sequence 2"):
        pool.start(2, 3)


def test_before_its_first_step_a_sequence_has_no_scores(pool):
    pool.start(2, 0)
    with pytest.raises(ValueError, match="sequence 2"):
        pool.scores(2)
