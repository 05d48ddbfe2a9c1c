"""How long sampling takes: printed (`pytest -s`), not judged, since the machine may be shared."""

import statistics
import time

import pytest
import torch

from kvarto.protos.sampling import SamplingParams
from kvarto.worker.sampling import Sampler


class OnlyRank:
    rank, world_size = 0, 1

    def all_gather_rows(self, tensor):
        return tensor.unsqueeze(0)


@pytest.mark.parametrize("params", [
    {"temperature": 0.0}, {"temperature": 0.8}, {"top_p": 0.9}, {"top_k": 50},
    {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5}, {"top_p": 0.9, "repetition_penalty": 1.1},
], ids=str)
def test_timing_of_64_rows(params):
    rows, vocab = 64, 49_152
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    prompts = torch.randint(0, vocab, (rows, 1000), generator=generator).tolist()
    sampler = Sampler(OnlyRank(), vocab_start=0, local_vocab=vocab)
    states = [sampler.start(SamplingParams(seed=i, **params), seq_index=0, token_ids=prompt, num_prompt_tokens=500,
                            eos_token_ids=[0]) for i, prompt in enumerate(prompts)]
    seconds = []
    for position in range(4):
        step_logits = logits.clone()
        start = time.perf_counter()
        sampled = sampler.sample(step_logits, states, [1000 + position] * rows)
        seconds.append(time.perf_counter() - start)
    print(f"\n{params}: median {statistics.median(seconds) * 1e3:.2f} ms, least {min(seconds) * 1e3:.2f} ms")
    assert len(sampled) == rows
