"""Which rows stay, against sorting row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarto.protos.sparsity import KVSparsity
from kvarto.worker.row_selection import select


def spec(policy, window=1):
    return KVSparsity(policy=policy, budget=32, interval=4, window=window)


def best(scores, rows, count):
    return sorted(sorted(rows, key=lambda row: (-scores[row], row))[:count])


# Few values, so that many rows are equal.
SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(SCORES, st.data())
def test_h2o_keeps_the_latest_and_the_heaviest_of_the_rest(scores, data):
    num_kept = data.draw(st.integers(1, len(scores)))
    earlier = range(len(scores) - num_kept // 2)
    expected = best(scores, earlier, num_kept - num_kept // 2) + list(range(len(earlier), len(scores)))
    assert select(spec("h2o"), torch.tensor(scores), num_kept).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(SCORES, st.data())
def test_tova_keeps_the_best(scores, data):
    num_kept = data.draw(st.integers(1, len(scores)))
    assert select(spec("tova"), torch.tensor(scores), num_kept).tolist() == best(scores, range(len(scores)), num_kept)


@settings(max_examples=100, deadline=None)
@given(SCORES, st.data())
def test_snapkv_keeps_its_window_and_what_stands_around_the_best(scores, data):
    window = data.draw(st.integers(1, len(scores)))
    num_kept = data.draw(st.integers(window, len(scores)))
    num_earlier = len(scores) - window
    pooled = [max(scores[max(0, row - 3): min(num_earlier, row + 4)]) for row in range(num_earlier)]
    expected = best(pooled, range(num_earlier), num_kept - window) + list(range(num_earlier, len(scores)))
    assert select(spec("snapkv", window), torch.tensor(scores), num_kept).tolist() == expected


def test_every_layer_and_head_chooses_for_itself():
    scores = torch.rand(3, 2, 50, generator=torch.Generator().manual_seed(0))
    for policy in ("h2o", "snapkv", "tova"):
        chosen = select(spec(policy, 8), scores, 20)
        assert (chosen.shape, chosen.dtype) == ((3, 2, 20), torch.int32)
        alone = [[select(spec(policy, 8), row, 20).tolist() for row in layer] for layer in scores]
        assert chosen.tolist() == alone


@pytest.mark.parametrize(("policy", "num_kept"), [("tova", 11), ("h2o", 11), ("snapkv", 7)])
def test_a_count_out_of_range_is_refused(policy, num_kept):
    with pytest.raises(ValueError, match="cannot keep"):
        select(spec(policy, 8), torch.zeros(1, 1, 10), num_kept)
