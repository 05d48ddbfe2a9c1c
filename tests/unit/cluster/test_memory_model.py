"""The memory model itself: it executes what the contract allows, and finds what the contract forbids."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.protos.model import KVGroupSpec
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.sparsity import KVSparsity
from kvarto.protos.step import BlockMoves, Compaction, SequenceFork, SequenceStart, SequenceStep, StepPlan

_spec = importlib.util.spec_from_file_location("memory_model", Path(__file__).with_name("memory_model.py"))
assert _spec and _spec.loader
memory_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory_model)

PROMPT = [10, 11, 12, 13, 14, 15]
"""A block and a half."""


def rank(**options):
    return memory_model.MemoryModelRank(4, 8, 8, disk_capacity=8, eos_token_ids=(3,), **options)


def plan(*steps, moves=None, **fields):
    return StepPlan(epoch=1, step_id=0, steps=list(steps), moves=[BlockMoves(**moves)] if moves else [], **fields)


def start(seq_id=0, tokens=PROMPT, computed=0, seq_index=0, dropped=0, **params):
    return SequenceStart(
        seq_id=seq_id, seq_index=seq_index, token_ids=list(tokens), num_prompt_tokens=len(PROMPT),
        num_computed_tokens=computed, num_dropped_tokens=dropped, params=SamplingParams(**params))


def step(seq_id=0, num_tokens=1, blocks=(), **fields):
    return SequenceStep(seq_id=seq_id, num_tokens=num_tokens, new_block_ids=[list(blocks)] if blocks else [], **fields)


def fork(seq_id, parent=0, seq_index=1):
    return SequenceFork(seq_id=seq_id, parent_seq_id=parent, seq_index=seq_index)


def prefilled(**params):
    ranks = rank()
    ranks.execute(plan(step(num_tokens=6, blocks=[1, 2]), starts=[start(**params)]))
    return ranks


def test_a_sequence_alone_gets_its_tokens_chunk_by_chunk():
    ranks = rank()
    tokens = []
    for chunk in (plan(step(num_tokens=4, blocks=[1]), starts=[start()]), plan(step(num_tokens=2, blocks=[2])),
                  plan(step()), plan(step()), plan(step(blocks=[3]))):
        tokens += [token.token_id for token in ranks.execute(chunk)[0].tokens]
    assert tokens == memory_model.generate(PROMPT, 4, eos=-1)


def test_completions_of_one_prompt_differ():
    assert memory_model.generate(PROMPT, 9, -1, 0) != memory_model.generate(PROMPT, 9, -1, 1)


def test_siblings_sample_their_own_tokens_and_copy_the_shared_block():
    ranks = rank()
    first = ranks.execute(plan(step(num_tokens=6, blocks=[1, 2]), starts=[start(n=2)], siblings=[fork(5)]))[0]
    second = ranks.execute(plan(step(0, copied_block_ids=[3]), step(5), moves={"copies": [(2, 3)]}))[0]
    for seq_id, index in ((0, 0), (5, 1)):
        tokens = [token.token_id for result in (first, second) for token in result.tokens if token.seq_id == seq_id]
        assert tokens == memory_model.generate(PROMPT, 2, -1, index)


def test_a_shared_block_is_not_written_in_place():
    ranks = rank()
    ranks.execute(plan(step(num_tokens=6, blocks=[1, 2]), starts=[start(n=2)], siblings=[fork(5)]))
    with pytest.raises(AssertionError, match="which sequence"):
        ranks.execute(plan(step(0), step(5)))


def test_a_copied_block_without_its_copy_is_found():
    ranks = rank()
    ranks.execute(plan(step(num_tokens=6, blocks=[1, 2]), starts=[start(n=2)], siblings=[fork(5)]))
    with pytest.raises(AssertionError, match="nothing brings its contents"):
        ranks.execute(plan(step(0, copied_block_ids=[3]), step(5)))


def test_a_beam_appends_nothing_and_is_forked_with_the_token_that_the_head_chose():
    ranks = rank()
    params = dict(beam_width=2)
    result = ranks.execute(plan(step(num_tokens=6, blocks=[1, 2]), starts=[start(**params)]))[0]
    assert not result.tokens and len(result.beams[0].token_ids) == 4
    first, second = result.beams[0].token_ids[:2]
    assert sorted(result.beams[0].logprobs, reverse=True) == result.beams[0].logprobs
    result = ranks.execute(plan(
        step(7, token_ids=[first], copied_block_ids=[4]), step(8, token_ids=[second]), moves={"copies": [(2, 4)]},
        forks=[fork(7), fork(8)], ends=[0]))[0]
    assert [beam.seq_id for beam in result.beams] == [7, 8]


def test_sequences_that_start_together_share_the_block_that_one_of_them_writes():
    ranks = rank()
    result = ranks.execute(plan(
        step(0, 6, [1, 2]), step(1, 2, [1, 3]), starts=[start(0), start(1, computed=4)]))[0]
    assert len({token.token_id for token in result.tokens}) == 1


def test_another_prompt_in_the_shared_block_is_found():
    ranks = prefilled()
    with pytest.raises(AssertionError, match="reads what is not its own"):
        ranks.execute(plan(step(1, 2, [1, 3]), starts=[start(1, [9, *PROMPT[1:]], computed=4)]))


def test_a_swapped_sequence_goes_on():
    ranks = prefilled()
    tokens = PROMPT + memory_model.generate(PROMPT, 1, -1)
    ranks.execute(plan(moves={"swap_outs": [(1, 5), (2, 6)]}, ends=[0]))
    result = ranks.execute(plan(
        step(0, 1, [2, 1]), starts=[start(tokens=tokens, computed=6)], moves={"swap_ins": [(5, 2), (6, 1)]}))[0]
    assert result.tokens[0].token_id == memory_model.generate(PROMPT, 2, -1)[1]


def test_a_block_emptied_by_a_swap_out_is_a_destination_but_for_copies_that_read_it():
    ranks = prefilled()
    ranks.execute(plan(moves={"swap_outs": [(1, 5), (2, 6)], "swap_ins": [(4, 1)]}, ends=[0]))
    ranks = prefilled()
    with pytest.raises(AssertionError, match="overwrites a device block"):
        ranks.execute(plan(
            moves={"swap_outs": [(1, 5), (2, 6)], "swap_ins": [(4, 1)], "copies": [(1, 7)]}, ends=[0]))


@pytest.mark.parametrize(("moves", "message"), [
    ({"copies": [(1, 2)]}, "overwrites a device block"),
    ({"copies": [(3, 4), (5, 4)]}, "brought two contents"),
    ({"copies": [(0, 4)]}, "out of range"),
    ({"swap_ins": [(1, 9)]}, "out of range"),
    ({"swap_outs": [(3, 1)], "swap_ins": [(1, 4)]}, "overwrites a host block"),
    ({"disk_stores": [(1, b"k")]}, "unwritten slot"),
])
def test_moves_that_break_the_rule_are_found(moves, message):
    with pytest.raises(AssertionError, match=message):
        prefilled().execute(plan(moves=moves))


def test_a_block_comes_back_from_disk_and_every_rank_answers():
    ranks = prefilled()
    ranks.execute(plan(moves={"swap_outs": [(1, 5)]}, ends=[0]))
    ranks.execute(plan(moves={"disk_stores": [(5, b"k")]}))
    results = ranks.execute(plan(moves={"disk_loads": [(b"k", 6)]}))
    assert [(result.rank, result.failed_loads) for result in results] == [(0, []), (1, [])]
    ranks.execute(plan(step(1, 2, [4, 3]), starts=[start(1, computed=4)], moves={"swap_ins": [(6, 4)]}))


def test_a_load_that_failed_leaves_garbage():
    ranks = prefilled()
    ranks.execute(plan(moves={"swap_outs": [(1, 5)]}, ends=[0]))
    ranks.execute(plan(moves={"disk_stores": [(5, b"k")]}))
    results = ranks.execute(plan(moves={"disk_loads": [(b"k", 6)]}), corrupt=[b"k"])
    assert [result.failed_loads for result in results] == [[], [(0, b"k")]]
    with pytest.raises(AssertionError, match="reads what is not its own"):
        ranks.execute(plan(step(1, 2, [4, 3]), starts=[start(1, computed=4)], moves={"swap_ins": [(6, 4)]}))


def test_a_sequence_that_failed_samples_no_more():
    ranks = rank()
    result = ranks.execute(plan(step(num_tokens=6, blocks=[1, 2]), starts=[start()]), failing=[0])[0]
    assert [failure.seq_id for failure in result.failures] == [0]
    result = ranks.execute(plan(step()))[0]
    assert not result.tokens and not result.failures


def test_prompt_logprobs_come_chunk_by_chunk():
    ranks = rank()
    found = []
    for chunk in (plan(step(num_tokens=4, blocks=[1]), starts=[start(prompt_logprobs=0)]),
                  plan(step(num_tokens=2, blocks=[2]))):
        found += [entry.token_id for part in ranks.execute(chunk)[0].prompt_logprobs for entry in part.positions]
    assert found == PROMPT[1:]


# -- KV groups and windows -------------------------------------------------------------------------------------------


def windowed(*, num_sinks=0):
    """A group without a window and one that sees 4 tokens, a block's worth."""
    return rank(kv_groups=[KVGroupSpec(layer_ids=(0,)), KVGroupSpec(layer_ids=(1,), window=4, num_sinks=num_sinks)])


def long_step(blocks, *, seq_id=0, num_tokens):
    return SequenceStep(seq_id=seq_id, num_tokens=num_tokens, new_block_ids=blocks)


LONG = [10 + index % 30 for index in range(13)]
"""Three blocks and a token: the query at 12 sees 9 .. 12."""


def test_the_pools_of_two_kv_groups_number_their_blocks_apart():
    windowed().execute(plan(long_step([[1, 2, 3, 4], [4, 3, 2, 1]], num_tokens=13), starts=[start(tokens=LONG)]))


@pytest.mark.parametrize(("num_sinks", "table", "is_right"), [
    (0, [0, 0, 2], True), (0, [0, 0, 0], False), (0, [5, 5, 2], True), (0, [4, 3, 0], False),
    (1, [0, 0, 2], False), (1, [4, 0, 2], True), (5, [4, 0, 2], False), (5, [4, 3, 2], True)])
def test_what_a_query_sees_must_be_there_and_nothing_else(num_sinks, table, is_right):
    ranks = windowed(num_sinks=num_sinks)
    ranks.execute(plan(long_step([[1, 2, 3], [4, 3, 2]], num_tokens=12), starts=[start(tokens=LONG[:12])]))
    other = plan(long_step([[1, 2, 3, 7], [*table, 7]], seq_id=1, num_tokens=1),
                 starts=[start(1, tokens=LONG, computed=12)])
    if is_right:
        ranks.execute(other)
    else:
        with pytest.raises(AssertionError, match=r"reads what is not its own .* of KV group 1"):
            ranks.execute(other)


def test_contents_of_another_kv_group_are_not_its_own():
    ranks = windowed()
    ranks.execute(plan(long_step([[1, 2, 3], [4, 3, 2]], num_tokens=12), starts=[start(tokens=LONG[:12])]))
    ranks.devices[1][2] = list(ranks.devices[0][3])
    with pytest.raises(AssertionError, match="KV group 1"):
        ranks.execute(plan(long_step([[1, 2, 3, 7], [0, 0, 2, 7]], seq_id=1, num_tokens=1),
                           starts=[start(1, tokens=LONG, computed=12)]))


def test_the_beginning_of_a_chunk_sees_further_back_than_its_end():
    ranks = windowed()
    ranks.execute(plan(long_step([[1, 2], [4, 3]], num_tokens=8), starts=[start(tokens=LONG[:8])]))
    with pytest.raises(AssertionError, match="positions 5 to 8 of KV group 1"):
        ranks.execute(plan(long_step([[1, 2, 5, 6], [0, 0, 5, 6]], seq_id=1, num_tokens=5),
                           starts=[start(1, tokens=LONG, computed=8)]))


def test_a_block_behind_the_window_may_be_written_by_others():
    ranks = windowed()
    ranks.execute(plan(long_step([[1, 2, 3], [4, 3, 2]], num_tokens=12), starts=[start(tokens=LONG[:12])]))
    ranks.execute(plan(long_step([[5], [4]], seq_id=1, num_tokens=4), long_step([[6], [1]], num_tokens=1),
                       starts=[start(1, tokens=LONG)]))
    with pytest.raises(AssertionError, match="which sequence 0 holds too"):
        ranks.execute(plan(long_step([[7], [2]], seq_id=2, num_tokens=4), starts=[start(2, tokens=LONG)]))


# -- compaction ------------------------------------------------------------------------------------------------------


def compacted(num_kept=3, blocks=(3,), ranks=None, **params):
    """A prompt of which some rows were kept in other blocks."""
    ranks = ranks or rank()
    last = step(num_tokens=6, blocks=[1, 2], compaction=Compaction(num_kept=num_kept, new_block_ids=[list(blocks)]))
    result, = ranks.execute(plan(last, starts=[start(**params)]))
    return ranks, [token.token_id for token in result.tokens]


def test_a_sequence_that_drops_rows_comes_to_its_tokens():
    ranks, tokens = compacted()
    for each in (step(), step(blocks=[4])):
        tokens += [token.token_id for token in ranks.execute(plan(each))[0].tokens]
    assert (tokens, ranks.held.rows(0)) == (memory_model.generate(PROMPT, 3, eos=-1), 5)


def test_the_last_row_is_kept_and_the_rest_in_order():
    ranks, _ = compacted()
    kept = ranks.texts[0].kept
    assert (kept, kept[-1], len(kept)) == (sorted(kept), 5, 3)


def test_siblings_copy_what_was_kept():
    ranks = rank()
    last = step(num_tokens=6, blocks=[1, 2], compaction=Compaction(num_kept=4, new_block_ids=[[3]]))
    ranks.execute(plan(last, starts=[start()], siblings=[fork(1)]))
    ranks.execute(plan(step(0, blocks=[4]), step(1, blocks=[5])))
    assert ranks.held.tables == {0: [[3, 4]], 1: [[3, 5]]}


def test_what_was_kept_can_go_to_the_host_and_back():
    ranks, tokens = compacted()
    ranks.execute(plan(moves={"swap_outs": [(3, 7)]}, ends=[0]))
    again = start(tokens=PROMPT + tokens, computed=6, dropped=3)
    result = ranks.execute(plan(step(blocks=[5]), starts=[again], moves={"swap_ins": [(7, 5)]}))[0]
    assert [token.token_id for token in result.tokens] == memory_model.generate(PROMPT, 2, eos=-1)[1:]


def test_rows_that_come_back_from_a_wrong_block_are_found():
    ranks, tokens = compacted()
    ranks.execute(plan(moves={"swap_outs": [(2, 7)]}, ends=[0]))
    again = start(tokens=PROMPT + tokens, computed=6, dropped=3)
    with pytest.raises(AssertionError, match="rows come back out of order, or others"):
        ranks.execute(plan(step(blocks=[5]), starts=[again], moves={"swap_ins": [(7, 5)]}))


@pytest.mark.parametrize(("num_kept", "blocks", "message"), [
    (6, [3, 4], "drops nothing"), (3, [2], "reads or fills"), (3, [3, 4], "too many blocks"), (5, [3, 3], "one block")])
def test_a_compaction_that_makes_no_sense_is_found(num_kept, blocks, message):
    with pytest.raises(AssertionError, match=message):
        compacted(num_kept, blocks)


def test_a_compaction_into_a_block_that_is_copied_to_is_found():
    ranks, _ = compacted()
    with pytest.raises(AssertionError, match="reads or fills"):
        ranks.execute(plan(step(compaction=Compaction(num_kept=3, new_block_ids=[[6]])), moves={"copies": [(5, 6)]}))


def test_the_old_blocks_are_not_read_any_more():
    ranks, _ = compacted()
    for block in (1, 2):
        ranks.devices[0][block] = [0] * 4
    ranks.execute(plan(step()))


SPARSE = KVSparsity(policy="snapkv", budget=3, interval=4, window=2)


@pytest.mark.parametrize(("last", "message"), [
    (step(num_tokens=6, blocks=[1, 2]), "not at all"),
    (step(num_tokens=5, blocks=[1, 2], compaction=Compaction(num_kept=3, new_block_ids=[[3]])), "too early")])
def test_a_compaction_at_a_wrong_length_is_found(last, message):
    with pytest.raises(AssertionError, match=message):
        rank(sparsity=SPARSE).execute(plan(last, starts=[start()]))


def test_a_last_chunk_without_the_queries_that_score_the_prompt_is_found():
    ranks = rank(sparsity=SPARSE)
    ranks.execute(plan(step(num_tokens=5, blocks=[1, 2]), starts=[start()]))
    with pytest.raises(AssertionError, match="queries that score a prompt are missing"):
        ranks.execute(plan(step(compaction=Compaction(num_kept=3, new_block_ids=[[3]]))))


def test_rows_that_come_back_without_their_scores_are_found():
    scored = KVSparsity(policy="h2o", budget=3, interval=4)
    for suspends in ([0], []):
        ranks, tokens = compacted(ranks=rank(sparsity=scored))
        ranks.execute(plan(moves={"swap_outs": [(3, 7)]}, suspends=suspends, ends=[] if suspends else [0]))
        again = plan(step(blocks=[5]), moves={"swap_ins": [(7, 5)]},
                     starts=[start(tokens=PROMPT + tokens, computed=6, dropped=3)])
        if suspends:
            ranks.execute(again)
            continue
        with pytest.raises(AssertionError, match="rows without their scores"):
            ranks.execute(again)
