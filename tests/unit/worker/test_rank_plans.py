"""A rank with a tiny random model, driven through plans as a Head would."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvarto.cluster.engine.inline import InlineWorkerGroup
from kvarto.cluster.engine.transport import GroupFailedError
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import (
    BlockMoves,
    RankConfig,
    RankCosts,
    SequenceFork,
    SequenceStart,
    SequenceStep,
    StepPlan,
)
from kvarto.worker.collectives import SingleRank, ThreadCommunicator
from kvarto.worker.families import read_model_config
from kvarto.worker.rank import Rank

BLOCK_SIZE = 8
NUM_BLOCKS = 24
BAD_TOKEN = 329
"""Its embedding is not a number."""
PROMPT = [(7 * i + 3) % 300 for i in range(20)]
KEY, OTHER = b"k" * 32, b"o" * 32
COSTS = RankCosts(copy_bytes_per_s=1.0, prefill_tokens_per_s=1.0)
DRAWN = SamplingParams(seed=11, temperature=1.5, logprobs=3, max_tokens=50, frequency_penalty=0.5)
BEAM = SamplingParams(beam_width=3, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(directory, the model as Transformers has it)."""
    path = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=330, hidden_size=72, intermediate_size=160, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=128, eos_token_id=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.model.embed_tokens.weight[BAD_TOKEN] = torch.nan
    model.save_pretrained(path)
    return str(path), model


class Driver:
    """A group of ranks and the plans that it was given. The first rank's results are returned."""

    def __init__(self, path, tp_size=1, num_host_blocks=12, **changes):
        config = dict(
            model=read_model_config(path), dtype="float32", device="cpu", tp_size=tp_size, epoch=1,
            block_size=BLOCK_SIZE, max_model_len=100, max_num_seqs=3, max_num_batched_tokens=64, num_threads=1,
            step_timeout_s=20, lease_s=2) | changes
        comms = [SingleRank()] if tp_size == 1 else ThreadCommunicator.group(tp_size, timeout_s=20)
        self.ranks = [Rank(RankConfig(rank=rank, **config), comm) for rank, comm in enumerate(comms)]
        for rank in self.ranks:
            rank.allocate([NUM_BLOCKS], [num_host_blocks])
        self.group = InlineWorkerGroup(self.ranks)
        self.step_id = 0

    def results(self, **fields):
        self.group.send(StepPlan(epoch=1, step_id=self.step_id, **fields))
        self.step_id += 1
        return self.group.receive()

    def run(self, **fields):
        return self.results(**fields)[0]

    def prefill(self, seq_id, blocks, params=DRAWN, seq_index=0, tokens=PROMPT):
        return self.run(starts=[start(seq_id, params, seq_index, tokens)],
                        steps=[step(seq_id, len(tokens), new_block_ids=[blocks])])


@pytest.fixture
def driver(model):
    return Driver(model[0])


def start(seq_id, params=DRAWN, seq_index=0, tokens=PROMPT, computed=0):
    return SequenceStart(seq_id=seq_id, seq_index=seq_index, token_ids=list(tokens), num_prompt_tokens=len(PROMPT),
                         num_computed_tokens=computed, params=params)


def step(seq_id, num_tokens=1, **fields):
    return SequenceStep(seq_id=seq_id, num_tokens=num_tokens, **fields)


def fork(seq_id, parent_seq_id, seq_index):
    return SequenceFork(seq_id=seq_id, parent_seq_id=parent_seq_id, seq_index=seq_index)


def of(result, seq_id):
    """What `seq_id` gained, its token's log probabilities included: these are equal only if the logits are."""
    (token,) = [token for token in result.tokens if token.seq_id == seq_id]
    return token.token_id, token.logprobs


def alone(path, num_steps, seq_index=0, **options):
    """What a sequence that nothing happens to gains, per step."""
    driver = Driver(path, **options)
    gained = [of(driver.prefill(1, [1, 2, 3, 4, 5], seq_index=seq_index), 1)]
    return gained + [of(driver.run(steps=[step(1)]), 1) for _ in range(num_steps - 1)]


# ---- moves


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_sequence_swapped_out_and_in_goes_on_bit_for_bit(model, tp_size):
    driver = Driver(model[0], tp_size)
    expected = alone(model[0], 4, tp_size=tp_size)
    gained = [of(driver.prefill(1, [1, 2, 3]), 1), of(driver.run(steps=[step(1)]), 1)]
    known = PROMPT + [token_id for token_id, _ in gained]
    driver.run(moves=[BlockMoves(swap_outs=[(1, 9), (2, 8), (3, 7)])], ends=[1])
    driver.prefill(2, [1, 2, 3], tokens=PROMPT[::-1])
    result = driver.run(moves=[BlockMoves(swap_ins=[(9, 4), (8, 11), (7, 6)])],
                        starts=[start(1, tokens=known, computed=len(known) - 1)],
                        steps=[step(1, new_block_ids=[[4, 11, 6]])])
    gained += [of(result, 1), of(driver.run(steps=[step(1)]), 1)]
    assert gained == expected


def test_a_plan_of_moves_alone_is_answered(driver):
    result = driver.run(moves=[BlockMoves(swap_outs=[(1, 1)])])
    assert (result.step_id, result.tokens, result.failed_loads) == (0, [], [])
    assert 0 < result.move_seconds <= result.seconds


def test_a_plan_without_moves_spends_no_time_on_them(driver):
    assert driver.prefill(1, [1, 2, 3]).move_seconds == 0


def test_moves_come_before_the_step_that_reads_the_blocks(driver, model):
    expected = alone(model[0], 2)
    first = of(driver.prefill(1, [1, 2, 3]), 1)
    second = driver.run(
        moves=[BlockMoves(swap_outs=[(1, 1), (2, 2), (3, 3)], swap_ins=[(1, 3), (2, 2), (3, 1)])], ends=[1],
        starts=[start(4, tokens=[*PROMPT, first[0]], computed=20)], steps=[step(4, new_block_ids=[[3, 2, 1]])])
    assert [first, of(second, 4)] == expected


# ---- forks, copies and siblings


def test_a_fork_writes_into_its_copy_and_its_parent_in_place(driver, model):
    gained = {1: [of(driver.prefill(1, [1, 2, 3]), 1)]}
    driver.run(forks=[fork(2, 1, 1)], moves=[BlockMoves(copies=[(3, 4)])],
               steps=[step(1), step(2, copied_block_ids=[4])])
    results = [driver.run(steps=[step(2), step(1)]) for _ in range(3)]
    # The fork has its parent's first token and then draws as sequence 1 of its group.
    known = [*PROMPT, gained[1][0][0]]
    other = Driver(model[0])
    expected = [of(other.run(starts=[start(9, seq_index=1, tokens=known)],
                             steps=[step(9, 21, new_block_ids=[[1, 2, 3]])]), 9)]
    expected += [of(other.run(steps=[step(9)]), 9) for _ in range(3)]
    assert [of(result, 2)[0] for result in results] == [token_id for token_id, _ in expected[1:]]
    assert [of(result, 1) for result in results] == alone(model[0], 5)[2:]


def test_a_step_may_bring_the_table_and_a_copy(driver, model):
    driver.prefill(1, [1, 2, 3])
    first = of(driver.prefill(2, [4, 5, 6]), 2)
    driver.run(ends=[2])
    result = driver.run(moves=[BlockMoves(copies=[(6, 7)])],
                        starts=[start(3, tokens=[*PROMPT, first[0]], computed=20)],
                        steps=[step(3, new_block_ids=[[4, 5, 6]], copied_block_ids=[7])])
    assert of(result, 3) == alone(model[0], 2)[1]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_siblings_sample_as_if_each_had_been_prefilled(model, tp_size):
    driver = Driver(model[0], tp_size)
    result = driver.run(starts=[start(1)], steps=[step(1, 20, new_block_ids=[[1, 2, 3]])],
                        siblings=[fork(2, 1, 1), fork(3, 1, 2)])
    assert [token.seq_id for token in result.tokens] == [1, 2, 3]
    for seq_id in (1, 2, 3):
        assert of(result, seq_id) == alone(model[0], 1, seq_index=seq_id - 1, tp_size=tp_size)[0]
    assert len({of(result, seq_id)[0] for seq_id in (1, 2, 3)}) > 1


def test_siblings_go_on_as_if_each_had_been_prefilled(driver, model):
    gained = {1: [], 2: []}
    results = [driver.run(starts=[start(1)], steps=[step(1, 20, new_block_ids=[[1, 2, 3]])],
                          siblings=[fork(2, 1, 1)]),
               driver.run(moves=[BlockMoves(copies=[(3, 4)])], steps=[step(2, copied_block_ids=[4]), step(1)])]
    results += [driver.run(steps=[step(1), step(2)]) for _ in range(3)]
    for seq_id in gained:
        tokens = [of(result, seq_id)[0] for result in results]
        assert tokens == [token_id for token_id, _ in alone(model[0], 5, seq_index=seq_id - 1)]


def test_prompt_log_probabilities_are_the_parents_alone(driver):
    params = SamplingParams(seed=1, prompt_logprobs=2)
    result = driver.run(starts=[start(1, params)], steps=[step(1, 20, new_block_ids=[[1, 2, 3]])],
                        siblings=[fork(2, 1, 1)])
    assert [(part.seq_id, part.first, len(part.positions)) for part in result.prompt_logprobs] == [(1, 1, 19)]


def test_forks_find_rows_before_ends_give_theirs_back(driver):
    for seq_id in (1, 2, 3):
        driver.prefill(seq_id, [3 * seq_id, 3 * seq_id + 1, 3 * seq_id + 2])
    driver.run(forks=[fork(4, 1, 1), fork(5, 1, 2), fork(6, 2, 1)], ends=[1, 2, 3])
    driver.run(ends=[4, 5, 6])


def test_a_sibling_of_a_sequence_that_does_not_sample_is_refused(driver):
    with pytest.raises(GroupFailedError, match=r"siblings \[2\]"):
        driver.run(starts=[start(1)], steps=[step(1, 8, new_block_ids=[[1]])], siblings=[fork(2, 1, 1)])


# ---- beams


def dense_logprobs(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(0)


def check_candidates(candidates, expected, count):
    best = expected.topk(count)
    assert candidates.token_ids == best.indices.tolist()
    assert candidates.logprobs == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_candidates_are_the_best_of_the_dense_log_softmax(model, tp_size):
    result = Driver(model[0], tp_size).prefill(7, [1, 2, 3], BEAM)
    (beam,) = result.beams
    assert (beam.seq_id, result.tokens) == (7, [])
    check_candidates(beam, dense_logprobs(model[1], PROMPT), 6)


def test_every_end_token_asks_for_more_candidates(driver, model):
    params = SamplingParams(beam_width=2, temperature=0.0, stop_token_ids=[5, 6, 7])
    (beam,) = driver.prefill(1, [1, 2, 3], params).beams
    check_candidates(beam, dense_logprobs(model[1], PROMPT), 2 * (1 + 4))


def test_there_are_no_more_candidates_than_tokens(driver):
    (beam,) = driver.prefill(1, [1, 2, 3], SamplingParams(beam_width=200, temperature=0.0)).beams
    assert sorted(beam.token_ids) == list(range(330))
    assert sum(torch.tensor(beam.logprobs).exp().tolist()) == pytest.approx(1.0)


def test_beams_go_on_with_the_tokens_that_the_head_chose(driver, model):
    first = driver.prefill(1, [1, 2, 3], BEAM).beams[0].token_ids
    result = driver.run(forks=[fork(2, 1, 1)], moves=[BlockMoves(copies=[(3, 4)])], steps=[
        step(1, token_ids=[first[0]]), step(2, token_ids=[first[1]], copied_block_ids=[4])])
    assert [beam.seq_id for beam in result.beams] == [1, 2]
    for beam, token in zip(result.beams, first, strict=False):
        check_candidates(beam, dense_logprobs(model[1], [*PROMPT, token]), 6)
    second = result.beams[1].token_ids[3]
    result = driver.run(forks=[fork(3, 2, 2)], ends=[1, 2], steps=[step(3, token_ids=[second])])
    check_candidates(result.beams[0], dense_logprobs(model[1], [*PROMPT, first[1], second]), 6)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_beams_and_drawn_sequences_share_a_step(model, tp_size):
    driver = Driver(model[0], tp_size)
    result = driver.run(
        starts=[start(1), start(2, BEAM), start(3, seq_index=1)],
        steps=[step(1, 20, new_block_ids=[[1, 2, 3]]), step(2, 20, new_block_ids=[[4, 5, 6]]),
               step(3, 20, new_block_ids=[[7, 8, 9]])])
    assert of(result, 1) == alone(model[0], 1, tp_size=tp_size)[0]
    assert of(result, 3) == alone(model[0], 1, seq_index=1, tp_size=tp_size)[0]
    check_candidates(result.beams[0], dense_logprobs(model[1], PROMPT), 6)


def test_a_beam_whose_prompt_is_not_computed_whole_has_no_candidates(driver):
    result = driver.run(starts=[start(1, BEAM)], steps=[step(1, 8, new_block_ids=[[1]])])
    assert result.beams == []


# ---- logits that are not numbers


@pytest.mark.parametrize("tp_size", [1, 2])
def test_rows_that_are_not_numbers_fail_and_the_others_go_on(model, tp_size):
    driver = Driver(model[0], tp_size, max_num_seqs=8)
    bad = [*PROMPT[:-1], BAD_TOKEN]
    result = driver.run(
        starts=[start(1, BEAM, tokens=bad), start(2, BEAM), start(3, tokens=bad), start(4)],
        steps=[step(seq_id, 20, new_block_ids=[[3 * seq_id, 3 * seq_id + 1, 3 * seq_id + 2]])
               for seq_id in (1, 2, 3, 4)],
        siblings=[fork(5, 3, 1), fork(6, 4, 1)])
    assert [failure.seq_id for failure in result.failures] == [1, 3, 5]
    check_candidates(result.beams[0], dense_logprobs(model[1], PROMPT), 6)
    assert [token.seq_id for token in result.tokens] == [4, 6]
    assert of(result, 4) == alone(model[0], 1, tp_size=tp_size)[0]
    assert of(result, 6) == alone(model[0], 1, seq_index=1, tp_size=tp_size)[0]


# ---- the disk


def stored(driver):
    """Prefill, and keep the first two blocks of the prompt on disk under KEY and OTHER."""
    gained = of(driver.prefill(1, [1, 2, 3]), 1)
    driver.run(ends=[1], moves=[BlockMoves(swap_outs=[(1, 1), (2, 2)])])
    driver.run(moves=[BlockMoves(disk_stores=[(1, KEY), (2, OTHER)])])
    return gained


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_later_rank_goes_on_from_the_blocks_on_disk(model, tmp_path, tp_size):
    expected = stored(Driver(model[0], tp_size, kv_disk_path=str(tmp_path)))
    later = Driver(model[0], tp_size, kv_disk_path=str(tmp_path))
    for rank in later.ranks:
        assert sorted(rank.ready(COSTS).stored_keys[0]) == [KEY, OTHER]
    results = later.results(
        moves=[BlockMoves(disk_loads=[(KEY, 4), (OTHER, 5)], swap_ins=[(4, 9), (5, 8)])],
        starts=[start(1, computed=16)], steps=[step(1, 4, new_block_ids=[[9, 8, 7]])])
    assert [(result.rank, result.failed_loads) for result in results] == [(rank, []) for rank in range(tp_size)]
    assert of(results[0], 1) == expected


def files_of(tmp_path, key):
    return sorted(tmp_path.glob(f"*/0-{key.hex()}.kv"))


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:-4] + b"evil")], ids=["truncated", "missing", "corrupt"])
def test_a_damaged_file_is_a_failed_load(model, tmp_path, damage):
    driver = Driver(model[0], kv_disk_path=str(tmp_path))
    stored(driver)
    (path,) = files_of(tmp_path, OTHER)
    damage(path)
    result = driver.run(moves=[BlockMoves(disk_loads=[(KEY, 4), (OTHER, 5)])])
    assert result.failed_loads == [(0, OTHER)]


def test_a_file_damaged_on_one_rank_is_told_by_that_rank(model, tmp_path):
    driver = Driver(model[0], 2, kv_disk_path=str(tmp_path))
    stored(driver)
    rank_1 = driver.ranks[1]._disk._directory
    (rank_1 / f"0-{KEY.hex()}.kv").unlink()
    results = driver.results(moves=[BlockMoves(disk_loads=[(KEY, 4), (OTHER, 5)])])
    assert [(result.rank, result.failed_loads) for result in results] == [(0, []), (1, [(0, KEY)])]


def test_without_disk_loads_rank_0_alone_answers(model, tmp_path):
    driver = Driver(model[0], 2, kv_disk_path=str(tmp_path))
    assert len(driver.results(moves=[BlockMoves(disk_drops=[KEY])])) == 1


# ---- what a rank says of itself


def test_without_a_disk_there_are_no_stored_keys(driver):
    ready = driver.ranks[0].ready(COSTS)
    assert (ready.stored_keys, ready.costs) == ([], COSTS)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_ranks_measure_together_and_find_their_costs(model, tp_size):
    ranks = Driver(model[0], tp_size).ranks
    with ThreadPoolExecutor(tp_size) as pool:
        found = list(pool.map(Rank.measure, ranks))
    assert all(costs.copy_bytes_per_s > 1e6 and costs.prefill_tokens_per_s > 1 for costs in found)


def test_pools_of_no_host_blocks_are_possible(model):
    assert Driver(model[0], num_host_blocks=0).prefill(1, [1, 2, 3]).tokens
