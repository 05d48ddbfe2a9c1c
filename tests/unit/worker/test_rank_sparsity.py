"""A rank with KV sparsity, driven through plans: what plans order, and what they cannot."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvarto.protos.errors import ConfigError
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.sparsity import KVSparsity
from kvarto.protos.step import (
    BlockMoves,
    Compaction,
    RankConfig,
    SequenceFork,
    SequenceStart,
    SequenceStep,
    StepPlan,
)
from kvarto.worker.collectives import SingleRank
from kvarto.worker.families import read_model_config
from kvarto.worker.rank import Rank

PROMPT = [(7 * i * i + 3) % 131 for i in range(40)]
GREEDY = SamplingParams(temperature=0.0, logprobs=3, max_tokens=60)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=100, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=128, eos_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(path)
    return str(path)


class Driver:
    """One rank and the plans that it was given."""

    def __init__(self, path, policy="h2o", window=1, model=None, **changes):
        sparsity = policy and KVSparsity(policy=policy, budget=32, interval=4, window=window)
        self.rank = Rank(RankConfig(
            model=model or read_model_config(path), dtype="float32", device="cpu", tp_size=1, rank=0, epoch=1,
            block_size=8, max_model_len=100, max_num_seqs=3, max_num_batched_tokens=64, num_threads=1,
            step_timeout_s=20, lease_s=2, kv_sparsity=sparsity, **changes), SingleRank())
        self.rank.allocate([40], [12])
        self.step_id = 0

    def run(self, **fields):
        self.step_id += 1
        return self.rank.execute(StepPlan(epoch=1, step_id=self.step_id, **fields))

    def prefill(self, seq_id, blocks, kept, **fields):
        return self.run(starts=[start(seq_id)], steps=[step(
            seq_id, len(PROMPT), new_block_ids=[blocks], compaction=compaction(32, kept))], **fields)


def start(seq_id, tokens=PROMPT, **fields):
    return SequenceStart(seq_id=seq_id, seq_index=0, token_ids=list(tokens), num_prompt_tokens=len(PROMPT),
                         params=GREEDY, **fields)


def step(seq_id, num_tokens=1, **fields):
    return SequenceStep(seq_id=seq_id, num_tokens=num_tokens, **fields)


def compaction(num_kept, blocks):
    return Compaction(num_kept=num_kept, new_block_ids=[blocks])


def of(result, seq_id=1):
    (token,) = [token for token in result.tokens if token.seq_id == seq_id]
    return token.token_id, token.logprobs


def decode(driver, seq_id=1, blocks=(20, 21, 22, 23)):
    """Three rows beside the budget, and a fourth that makes it compact again; then one more."""
    gained = [of(driver.run(steps=[step(seq_id, new_block_ids=[[blocks[0]]])]), seq_id)]
    gained += [of(driver.run(steps=[step(seq_id)]), seq_id) for _ in range(2)]
    again = step(seq_id, compaction=compaction(32, [24, 25, 26, 27]))
    gained.append(of(driver.run(steps=[again]), seq_id))
    return [*gained, of(driver.run(steps=[step(seq_id, new_block_ids=[[28]])]), seq_id)]


@pytest.fixture
def alone(path):
    """What the sequence gains to which nothing happens."""
    driver = Driver(path)
    return [of(driver.prefill(1, [1, 2, 3, 4, 5], [6, 7, 8, 9])), *decode(driver)]


def test_a_suspended_sequence_goes_on_with_its_rows_and_scores(path, alone):
    driver = Driver(path)
    first = of(driver.prefill(1, [1, 2, 3, 4, 5], [6, 7, 8, 9]))
    driver.run(moves=[BlockMoves(swap_outs=[(6, 1), (7, 2), (8, 3), (9, 4)])], suspends=[1])
    # Another takes its blocks meanwhile.
    driver.prefill(2, [6, 7, 8, 9, 1], [2, 3, 4, 5])
    result = driver.run(
        moves=[BlockMoves(swap_ins=[(1, 11), (2, 12), (3, 13), (4, 14)])],
        starts=[start(1, [*PROMPT, first[0]], num_computed_tokens=40, num_dropped_tokens=8)],
        steps=[step(1, new_block_ids=[[11, 12, 13, 14, 20]])], ends=[2])
    gained = [first, of(result), *(of(driver.run(steps=[step(1)])) for _ in range(2))]
    gained.append(of(driver.run(steps=[step(1, compaction=compaction(32, [24, 25, 26, 27]))])))
    gained.append(of(driver.run(steps=[step(1, new_block_ids=[[28]])])))
    assert gained == alone


def test_a_copy_of_a_suspended_sequence_starts_where_that_stands(path, alone):
    """Forked before it is suspended, or after."""
    driver = Driver(path)
    first = of(driver.prefill(1, [1, 2, 3, 4, 5], [6, 7, 8, 9]))
    driver.run(moves=[BlockMoves(swap_outs=[(6, 1), (7, 2), (8, 3), (9, 4)])],
               forks=[SequenceFork(seq_id=2, parent_seq_id=1, seq_index=0)], suspends=[1, 2])
    driver.run(moves=[BlockMoves(swap_ins=[(1, 11), (2, 12), (3, 13), (4, 14)])],
               forks=[SequenceFork(seq_id=3, parent_seq_id=2, seq_index=0)], ends=[1, 2])
    result = driver.run(
        starts=[start(3, [*PROMPT, first[0]], num_computed_tokens=40, num_dropped_tokens=8)],
        steps=[step(3, new_block_ids=[[11, 12, 13, 14, 20]])])
    assert of(result, 3) == alone[1]


def test_siblings_begin_with_what_their_parent_kept(path, alone):
    driver = Driver(path)
    driver.prefill(1, [1, 2, 3, 4, 5], [6, 7, 8, 9],
                   siblings=[SequenceFork(seq_id=2, parent_seq_id=1, seq_index=1)])
    driver.run(ends=[1])
    assert decode(driver, 2) == alone[1:]


def test_sequences_are_compacted_side_by_side_to_different_numbers_of_rows(path):
    """Two whose prompts end in one step, each as it is alone."""
    lengths, kept = {1: 40, 2: 35}, {1: 33, 2: 30}
    together, gained = Driver(path, "tova"), {}
    together.run(
        starts=[start(seq_id, PROMPT[:length]) for seq_id, length in lengths.items()],
        steps=[step(1, 40, new_block_ids=[[1, 2, 3, 4, 5]], compaction=compaction(33, [11, 12, 13, 14, 15])),
               step(2, 35, new_block_ids=[[6, 7, 8, 9, 10]], compaction=compaction(30, [16, 17, 18, 19]))])
    result = together.run(steps=[step(1), step(2)])
    for seq_id, length in lengths.items():
        driver = Driver(path, "tova")
        blocks = list(range(11, 16)[: -(-kept[seq_id] // 8)])
        driver.run(starts=[start(1, PROMPT[:length])], steps=[
            step(1, length, new_block_ids=[[1, 2, 3, 4, 5]], compaction=compaction(kept[seq_id], blocks))])
        gained[seq_id] = of(driver.run(steps=[step(1)]))
    assert {seq_id: of(result, seq_id) for seq_id in lengths} == gained


def test_ranks_that_keep_nothing_suspend_nothing(path):
    for policy in ("tova", None):
        driver = Driver(path, policy)
        driver.run(starts=[start(1)], steps=[step(1, len(PROMPT), new_block_ids=[[1, 2, 3, 4, 5]])])
        with pytest.raises(ValueError, match="suspended"):
            driver.run(suspends=[1])


def test_queries_that_score_a_prompt_are_computed_in_the_step_that_compacts_it(path):
    driver = Driver(path, "snapkv", 32)
    driver.run(starts=[start(1)], steps=[step(1, 9, new_block_ids=[[1, 2, 3, 4, 5]])])
    with pytest.raises(ValueError, match="last 32 queries"):
        driver.run(steps=[step(1, 31, compaction=compaction(32, [6, 7, 8, 9]))])


def test_layers_with_a_window_are_refused(path):
    model = read_model_config(path)
    windowed = type(model)(**{field: getattr(model, field) for field in model.__struct_fields__} | {
        "layer_windows": (None, 16)})
    with pytest.raises(ConfigError, match="window"):
        Driver(path, model=windowed)
