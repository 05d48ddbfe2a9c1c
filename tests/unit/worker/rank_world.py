"""A group of ranks with a tiny random model, driven through plans as a Head would."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvarto.cluster.engine.inline import InlineWorkerGroup
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import (
    RankConfig,
    SequenceFork,
    SequenceStart,
    SequenceStep,
    StepPlan,
)
from kvarto.worker.collectives import SingleRank, thread_group
from kvarto.worker.families import read_model_config
from kvarto.worker.rank import Rank

BLOCK_SIZE = 8
NUM_BLOCKS = 24
BAD_TOKEN = 329
"""Its embedding is not a number."""
PROMPT = [(7 * i + 3) % 300 for i in range(20)]
DRAWN = SamplingParams(seed=11, temperature=1.5, logprobs=3, max_tokens=50, frequency_penalty=0.5)


def make_model(path):
    """(directory, the model as Transformers has it)."""
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
            block_size=BLOCK_SIZE, max_model_len=100, max_num_seqs=3, max_num_batched_tokens=96, num_threads=1,
            step_timeout_s=20, lease_s=2) | changes
        comms = [SingleRank()] if tp_size == 1 else thread_group(tp_size, "cpu", timeout_s=20)
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
