"""Log probabilities on one to four ranks, against a naive log-softmax and a stable sort."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kvarto.protos.sampling import SamplingParams
from kvarto.worker.sampling import NonFiniteLogitsError, Sampler


class ThreadRank:
    """One rank of a group of threads. A rank that gathers another shape, or does not come, is an error."""

    def __init__(self, group, rank):
        self.group, self.rank, self.world_size, self.num_gathers = group, rank, group.parties, 0

    def all_gather_rows(self, tensor):
        self.num_gathers += 1
        self.group.slots[self.rank] = tensor
        self.group.wait(timeout=10)
        gathered = torch.stack(self.group.slots)
        self.group.wait(timeout=10)
        return gathered


def on_ranks(world_size, body):
    """`body(comm)` on every rank, each in its thread; the results in the order of ranks."""
    group = threading.Barrier(world_size)
    group.slots = [None] * world_size
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(body, [ThreadRank(group, rank) for rank in range(world_size)]))


def bounds_of(vocab, world_size):
    """Uneven slices, none empty."""
    shares = np.array([1.0, 2.3, 0.4, 1.7])[:world_size]
    cuts = np.round(np.cumsum(shares) / shares.sum() * vocab).astype(int)
    cuts = np.maximum(cuts, np.arange(1, world_size + 1))
    cuts[-1] = vocab
    return [0, *cuts.tolist()]


def check_entry(entry, row, token, num_top):
    expected = torch.log_softmax(row.double(), 0)
    order = np.lexsort((np.arange(len(row)), -row.numpy()))
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(expected[token].item(), abs=1e-5)
    assert entry.rank == order.tolist().index(token) + 1
    assert entry.top_token_ids == order[:num_top].tolist()
    assert entry.top_logprobs == pytest.approx(expected[entry.top_token_ids].tolist(), abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_logprobs_are_those_of_the_raw_logits(world_size):
    logits = (torch.randn(4, 777, generator=torch.Generator().manual_seed(9)) * 3).bfloat16().float()
    wanted = [None, 5, 0, 20]
    params = [SamplingParams(temperature=1.5, seed=i, repetition_penalty=2.0, logit_bias={7: 90.0 * (i % 2)},
                             logprobs=num) for i, num in enumerate(wanted)]
    bounds = bounds_of(777, world_size)

    def body(comm):
        start, end = bounds[comm.rank], bounds[comm.rank + 1]
        sampler = Sampler(comm, vocab_start=start, local_vocab=end - start)
        states = [sampler.start(p, seq_index=0, token_ids=[3], num_prompt_tokens=0, eos_token_ids=[0]) for p in params]
        return sampler.sample(logits[:, start:end].clone(), states, [1, 2, 3, 4])

    answers = on_ranks(world_size, body)
    assert all(answer == answers[0] for answer in answers)
    tokens = answers[0]
    assert tokens[0].logprobs is None
    for row in (1, 2, 3):
        check_entry(tokens[row].logprobs, logits[row], tokens[row].token_id, wanted[row])


@pytest.mark.parametrize("world_size", [1, 3])
def test_prompt_logprobs_are_log_softmax(world_size):
    logits = (torch.randn(50, 301, generator=torch.Generator().manual_seed(10)) * 2).bfloat16().float()
    targets = [(7 * i) % 301 for i in range(50)]
    bounds = bounds_of(301, world_size)

    def body(comm):
        start, end = bounds[comm.rank], bounds[comm.rank + 1]
        sampler = Sampler(comm, vocab_start=start, local_vocab=end - start)
        return sampler.prompt_logprobs(logits[:, start:end], targets, 4)

    answers = on_ranks(world_size, body)
    assert all(answer == answers[0] for answer in answers)
    for entry, row, token in zip(answers[0], logits, targets, strict=True):
        check_entry(entry, row, token, 4)


def test_prompt_logprobs_refuse_what_cannot_be():
    sampler = Sampler(ThreadRank(threading.Barrier(1), 0), vocab_start=0, local_vocab=10)
    sampler._comm.group.slots = [None]
    with pytest.raises(ValueError, match=r"\[10\] are not in the vocabulary"):
        sampler.prompt_logprobs(torch.zeros(2, 10), [3, 10], 1)
    with pytest.raises(NonFiniteLogitsError) as caught:
        sampler.prompt_logprobs(torch.tensor([[0.0] * 10, [torch.nan] * 10]), [3, 4], 1)
    assert caught.value.rows == [1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_likeliest_are_the_head_of_a_stable_sort(world_size):
    logits = (torch.randn(4, 777, generator=torch.Generator().manual_seed(11)) * 3).bfloat16().float()
    logits[3, 5:] = -torch.inf
    counts = [1, 64, 777, 64]
    bounds = bounds_of(777, world_size)

    def body(comm):
        start, end = bounds[comm.rank], bounds[comm.rank + 1]
        found = Sampler(comm, vocab_start=start, local_vocab=end - start).likeliest(logits[:, start:end], counts)
        return found, comm.num_gathers

    answers = on_ranks(world_size, body)
    assert all(answer == answers[0] for answer in answers)
    found, num_gathers = answers[0]
    assert num_gathers == 1
    for (token_ids, logprobs), row, count in zip(found, logits, [1, 64, 777, 5], strict=True):
        order = np.lexsort((np.arange(len(row)), -row.numpy()))[:count]
        assert token_ids == order.tolist()
        assert logprobs == pytest.approx(torch.log_softmax(row.double(), 0)[token_ids].tolist(), abs=1e-5)


def test_the_likeliest_of_rows_with_bad_numbers_are_refused():
    comm = ThreadRank(threading.Barrier(1), 0)
    comm.group.slots = [None]
    sampler = Sampler(comm, vocab_start=0, local_vocab=10)
    assert sampler.likeliest(torch.zeros(0, 10), []) == []
    with pytest.raises(NonFiniteLogitsError) as caught:
        sampler.likeliest(torch.tensor([[0.0] * 10, [torch.nan] * 10]), [2, 2])
    assert caught.value.rows == [1]
