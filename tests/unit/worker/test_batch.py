"""Slot arithmetic against a loop that goes token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import SequenceFork, SequenceStart, SequenceStep
from kvarto.worker.batch import SequenceTable, build, lay_out

CPU = torch.device("cpu")
MAX_LEN = 60


def start(seq_id, token_ids, computed=0):
    return SequenceStart(
        seq_id=seq_id, seq_index=0, token_ids=token_ids, num_prompt_tokens=len(token_ids),
        num_computed_tokens=computed, params=SamplingParams())


@st.composite
def runs(draw):
    """(block_size, number of KV groups, prompts, steps as lists of (sequence, number of tokens))."""
    block_size = draw(st.sampled_from([8, 16]))
    num_groups = draw(st.integers(1, 2))
    prompts = draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=MAX_LEN), min_size=1, max_size=5))
    left = [len(prompt) for prompt in prompts]
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        step = []
        for index in draw(st.permutations(range(len(prompts)))):
            if left[index] and draw(st.booleans()):
                count = draw(st.integers(1, left[index]))
                left[index] -= count
                step.append((index, count))
        if step:
            steps.append(step)
    return block_size, num_groups, prompts, steps


@settings(max_examples=50, deadline=None)
@given(runs(), st.randoms(use_true_random=False))
def test_a_batch_is_what_a_loop_over_tokens_makes(run, random):
    block_size, num_groups, prompts, steps = run
    table = SequenceTable(len(prompts), MAX_LEN, block_size, num_groups)
    for seq_id, prompt in enumerate(prompts):
        table.start(start(seq_id, prompt))
    unused = [random.sample(range(1, 200), 190) for _ in range(num_groups)]
    tables = [[[] for _ in range(num_groups)] for _ in prompts]
    computed = [0] * len(prompts)
    for step in steps:
        plan = []
        token_ids, positions, slots, starts = [], [], [[] for _ in range(num_groups)], [0]
        for seq_id, count in step:
            end = computed[seq_id] + count
            missing = -(-end // block_size) - len(tables[seq_id][0])
            new = [[unused[group].pop() for _ in range(missing)] for group in range(num_groups)] if missing > 0 else []
            for group, block_ids in enumerate(new):
                tables[seq_id][group].extend(block_ids)
            plan.append(SequenceStep(seq_id=seq_id, num_tokens=count, new_block_ids=new))
            for position in range(computed[seq_id], end):
                token_ids.append(prompts[seq_id][position])
                positions.append(position)
                for group in range(num_groups):
                    block_id = tables[seq_id][group][position // block_size]
                    slots[group].append(block_id * block_size + position % block_size)
            computed[seq_id] = end
            starts.append(len(token_ids))
        layout = lay_out(plan, table)
        batch = build(layout, table, CPU)
        table.num_computed[layout.rows] = layout.ends
        assert batch.token_ids.tolist() == token_ids
        assert batch.positions.tolist() == positions
        assert batch.query_start_loc.tolist() == starts
        assert batch.kv_lens.tolist() == [computed[seq_id] for seq_id, _ in step]
        assert [mapping.tolist() for mapping in batch.slot_mapping] == slots
        for row, (seq_id, _) in enumerate(step):
            for group in range(num_groups):
                held = tables[seq_id][group]
                assert batch.block_tables[group][row].tolist()[: len(held)] == held


@pytest.fixture
def table():
    return SequenceTable(2, MAX_LEN, 8, 1)


def step(seq_id, count, *block_ids):
    return SequenceStep(seq_id=seq_id, num_tokens=count, new_block_ids=[list(block_ids)] if block_ids else [])


def test_entries_past_the_last_block_are_the_null_block(table):
    table.start(start(1, [5] * 20))
    table.start(start(2, [5]))
    batch = build(lay_out([step(1, 20, 3, 4, 5), step(2, 1, 6)], table), table, CPU)
    assert batch.block_tables[0].tolist() == [[3, 4, 5], [6, 0, 0]]


def test_a_sampled_token_is_the_next_to_be_computed(table):
    row = table.start(start(1, [5, 6]))
    layout = lay_out([step(1, 2, 3)], table)
    table.num_computed[layout.rows] = layout.ends
    table.append(np.array([row]), np.array([9]))
    assert build(lay_out([step(1, 1)], table), table, CPU).token_ids.tolist() == [9]


def test_the_row_of_an_ended_sequence_is_taken_again_without_its_blocks(table):
    table.start(start(1, [5] * 20))
    lay_out([step(1, 20, 3, 4, 5)], table)
    table.end(1)
    table.start(start(2, [7] * 20))
    batch = build(lay_out([step(2, 4, 9)], table), table, CPU)
    assert batch.block_tables[0].tolist() == [[9]]


def test_slots_of_a_large_pool_do_not_overflow(table):
    table.start(start(1, [5]))
    block_id = 2**31 - 1
    assert build(lay_out([step(1, 1, block_id)], table), table, CPU).slot_mapping[0].tolist() == [block_id * 8]


def test_as_many_sequences_as_there_are_rows_can_be_held(table):
    rows = {table.start(start(seq_id, [1])) for seq_id in (1, 2)}
    assert rows == {0, 1}


def test_a_sequence_of_the_greatest_length_may_still_gain_a_token(table):
    row = table.start(start(1, [5] * MAX_LEN))
    table.append(np.array([row]), np.array([9]))
    assert table.num_tokens[row] == MAX_LEN + 1


def run(table, *steps):
    """Lay out and build a step, and mark it as computed."""
    layout = lay_out(list(steps), table)
    batch = build(layout, table, CPU)
    table.num_computed[layout.rows] = layout.ends
    return batch


def fork(seq_id, parent_seq_id):
    return SequenceFork(seq_id=seq_id, parent_seq_id=parent_seq_id, seq_index=1)


def test_a_fork_begins_as_its_parent_stands(table):
    table.start(start(1, list(range(20))))
    run(table, step(1, 18, 3, 4, 5))
    table.fork(fork(2, 1))
    batch = run(table, step(2, 2))
    assert batch.token_ids.tolist() == [18, 19]
    assert batch.positions.tolist() == [18, 19]
    assert batch.block_tables[0].tolist() == [[3, 4, 5]]
    assert batch.slot_mapping[0].tolist() == [5 * 8 + 2, 5 * 8 + 3]


def test_a_fork_and_its_parent_go_different_ways(table):
    row = table.start(start(1, [7] * 8))
    run(table, step(1, 8, 3))
    child = table.fork(fork(2, 1))
    table.append(np.array([row, child]), np.array([10, 11]))
    batch = run(table, step(1, 1, 4), step(2, 1, 5))
    assert batch.token_ids.tolist() == [10, 11]
    assert batch.block_tables[0].tolist() == [[3, 4], [3, 5]]


def test_a_fork_outlives_its_parent(table):
    table.start(start(1, [7] * 8))
    run(table, step(1, 7, 3))
    table.fork(fork(2, 1))
    table.end(1)
    table.start(start(3, [9]))
    assert run(table, step(2, 1), step(3, 1, 6)).block_tables[0].tolist() == [[3], [6]]


def test_a_copied_block_takes_the_place_of_the_one_that_is_written():
    table = SequenceTable(1, MAX_LEN, 8, 2)
    table.start(start(1, [7] * 20))
    run(table, SequenceStep(seq_id=1, num_tokens=12, new_block_ids=[[3, 4], [5, 6]]))
    batch = run(table, SequenceStep(seq_id=1, num_tokens=8, new_block_ids=[[8], [9]], copied_block_ids=[10, 11]))
    assert [blocks.tolist() for blocks in batch.block_tables] == [[[3, 10, 8]], [[5, 11, 9]]]
    assert [slots[0].item() for slots in batch.slot_mapping] == [10 * 8 + 4, 11 * 8 + 4]


def test_tokens_that_a_step_brings_are_computed_by_it(table):
    table.start(start(1, [7, 8]))
    run(table, step(1, 2, 3))
    brought = run(table, SequenceStep(seq_id=1, num_tokens=1, token_ids=[42]))
    assert brought.token_ids.tolist() == [42]
    assert table.tokens(1).tolist() == [7, 8, 42]


def compacted(table):
    """Twenty tokens of a sequence in blocks 3, 4, 5, of which ten rows are left in 6 and 7."""
    table.start(start(1, list(range(30))))
    layout = lay_out([step(1, 20, 3, 4, 5)], table)
    table.num_computed[layout.rows] = layout.ends
    table.compact(1, 10, [[6, 7]])


def test_a_compacted_sequence_goes_on_in_its_new_blocks_where_it_stands_in_the_text(table):
    compacted(table)
    layout = lay_out([step(1, 7, 9)], table)
    batch = build(layout, table, CPU)
    assert batch.token_ids.tolist() == batch.positions.tolist() == list(range(20, 27))
    assert batch.slot_mapping[0].tolist() == [58, 59, 60, 61, 62, 63, 72]
    assert batch.kv_lens.tolist() == [17]
    assert batch.block_tables[0].tolist() == [[6, 7, 9]]


def test_a_fork_of_a_compacted_sequence_has_dropped_as_much_and_may_copy_its_last_block(table):
    compacted(table)
    table.fork(SequenceFork(seq_id=2, parent_seq_id=1, seq_index=1))
    layout = lay_out([SequenceStep(seq_id=2, num_tokens=1, copied_block_ids=[8])], table)
    batch = build(layout, table, CPU)
    assert (batch.positions.tolist(), batch.kv_lens.tolist()) == ([20], [11])
    assert (batch.slot_mapping[0].tolist(), batch.block_tables[0].tolist()) == ([66], [[6, 8]])


def test_a_sequence_comes_back_with_what_it_has_dropped(table):
    begin = start(1, list(range(30)), computed=20)
    begin.num_dropped_tokens = 10
    table.start(begin)
    batch = build(lay_out([step(1, 1, 6, 7)], table), table, CPU)
    assert (batch.positions.tolist(), batch.slot_mapping[0].tolist()) == ([20], [58])
    table.end(1)
    table.start(start(2, [5, 6]))
    assert build(lay_out([step(2, 2, 3)], table), table, CPU).slot_mapping[0].tolist() == [24, 25]
