"""Every head, column and vocabulary row lives on exactly one rank, and ranks do about the same between two meetings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarto.protos.errors import ConfigError
from kvarto.protos.model import ModelConfig
from kvarto.worker.layout import TPLayout


def config(num_heads=9, num_kv_heads=3, head_dim=64, hidden=576, mlp=1536, vocab=49152, layers=30) -> ModelConfig:
    return ModelConfig(
        path="/x", format="hf", family="llama", hidden_size=hidden, intermediate_size=mlp, num_layers=layers,
        num_heads=num_heads, total_num_kv_heads=num_kv_heads, head_dim=head_dim, vocab_size=vocab,
        max_position_embeddings=2048, norm_eps=1e-5, rope_theta=10000.0)


def layouts(model: ModelConfig, tp_size: int) -> list[TPLayout]:
    return [TPLayout.of(model, tp_size, rank) for rank in range(tp_size)]


def joined(ranges: list[range]) -> list[int]:
    return [item for part in ranges for item in part]


models = st.builds(
    lambda kv, ratio, dim, mlp, vocab, layers: config(kv * ratio, kv, dim, kv * ratio * dim, mlp, vocab, layers),
    st.integers(1, 8), st.integers(1, 8), st.sampled_from([16, 64, 128]), st.integers(8, 12000),
    st.integers(8, 60000), st.integers(1, 40))


@settings(max_examples=200, deadline=None)
@given(models, st.integers(1, 8))
def test_everything_is_held_exactly_once(model, tp_size):
    tp_size = min(tp_size, model.num_heads)
    parts = layouts(model, tp_size)
    assert joined([part.q_heads for part in parts]) == list(range(model.num_heads))
    assert joined([part.mlp_columns for part in parts]) == list(range(model.intermediate_size))
    assert joined([part.vocab for part in parts]) == list(range(model.vocab_size))
    assert sorted(set(joined([part.kv_heads for part in parts]))) == list(range(model.total_num_kv_heads))
    if tp_size <= model.total_num_kv_heads:
        assert joined([part.kv_heads for part in parts]) == list(range(model.total_num_kv_heads))
    assert all(len(part.mlp_columns) and len(part.vocab) and part.num_heads for part in parts)


@settings(max_examples=200, deadline=None)
@given(models, st.integers(1, 8))
def test_local_query_heads_read_the_kv_head_of_the_whole_model(model, tp_size):
    ratio = model.num_heads // model.total_num_kv_heads
    for part in layouts(model, min(tp_size, model.num_heads)):
        assert part.num_heads % part.num_kv_heads == 0
        read = [part.kv_heads[local] for local in part.kv_head_of]
        assert read == [head // ratio for head in part.q_heads]


@pytest.mark.parametrize("tp_size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("model", [
    pytest.param(config(), id="smollm2-135m"),
    pytest.param(config(32, 8, 128, 4096, 14336, 128256, 32), id="llama3-8b"),
    pytest.param(config(32, 4, 64, 2048, 5632, 32000, 22), id="tinyllama"),
])
def test_no_rank_has_much_more_of_the_mlp_or_the_vocabulary_than_another(model, tp_size):
    """Between two meetings of the ranks, that is: after the first they would only wait longer at the second."""
    parts = layouts(model, tp_size)
    for held, unit in (([len(part.mlp_columns) for part in parts], 32), ([len(part.vocab) for part in parts], 64)):
        assert max(held) - min(held) <= unit


def test_three_kv_heads_on_two_ranks_split_two_and_one():
    first, second = layouts(config(), 2)
    assert (first.num_kv_heads, second.num_kv_heads) == (2, 1)
    assert (first.num_heads, second.num_heads) == (6, 3)
    assert len(first.mlp_columns) == len(second.mlp_columns)


def test_more_ranks_than_kv_heads_replicate_a_kv_head_and_divide_its_queries():
    parts = layouts(config(), 4)
    assert [list(part.kv_heads) for part in parts] == [[0], [0], [1], [2]]
    assert [part.num_heads for part in parts] == [2, 1, 3, 3]


def test_cuts_fall_on_whole_units():
    for part in layouts(config(), 3):
        assert part.mlp_columns.start % 32 == 0
        assert part.vocab.start % 64 == 0


def test_more_ranks_than_heads_is_refused():
    with pytest.raises(ConfigError, match="at most 9") as caught:
        TPLayout.of(config(), 10, 0)
    assert caught.value.param == "tensor_parallel_size"


def test_a_rank_outside_the_group_is_refused():
    with pytest.raises(ConfigError, match="rank 2"):
        TPLayout.of(config(), 2, 2)
