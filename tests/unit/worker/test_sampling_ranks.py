"""Draws on one to four ranks, against a dense float64 oracle that is written as vLLM describes sampling."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvarto.kernels import best_tokens
from kvarto.protos.sampling import SamplingParams
from kvarto.worker.sampling import NonFiniteLogitsError, Sampler
from kvarto.worker.sampling.philox import uniforms


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


def sample(logits, requests, *, world_size=1):
    """Samples row i for `requests[i]` = (params, seq_index, position, prompt, output). Every rank's answer is checked
    to be the same; returns it and the number of collectives."""
    bounds = bounds_of(logits.shape[1], world_size)

    def body(comm):
        start, end = bounds[comm.rank], bounds[comm.rank + 1]
        sampler = Sampler(comm, vocab_start=start, local_vocab=end - start)
        states = [sampler.start(params, seq_index=index, token_ids=prompt + output, num_prompt_tokens=len(prompt),
                                eos_token_ids=[0]) for params, index, _, prompt, output in requests]
        tokens = sampler.sample(logits[:, start:end].clone(), states, [request[2] for request in requests])
        return tokens, comm.num_gathers

    answers = on_ranks(world_size, body)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def ids(logits, requests, *, world_size=1):
    return [token.token_id for token in sample(logits, requests, world_size=world_size)[0]]


def request(position=0, seq_index=0, prompt=(), output=(), **params):
    return SamplingParams(**{"seed": 0, **params}), seq_index, position, list(prompt), list(output)


# ---- the oracle: dense, float64, as vLLM describes it


def distribution(logits, params, prompt, output):
    x = np.asarray(logits, dtype=np.float64).copy()
    if len(output) < params.min_tokens:
        x[[0, *params.stop_token_ids]] = -np.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    p = np.exp((x - x.max()) / params.temperature)
    p[p < params.min_p * p.max()] = 0.0
    if params.top_k is not None and params.top_k < len(p):
        p[x < np.sort(np.where(p > 0, x, -np.inf))[-params.top_k]] = 0.0
    p /= p.sum()
    if params.top_p < 1.0:
        order = np.lexsort((np.arange(len(p)), -x))
        above = np.cumsum(p[order]) - p[order]
        p[order[above >= params.top_p]] = 0.0
        p /= p.sum()
    return p, x


def expected_tokens(logits, params, seq_index, position, prompt, output):
    """The tokens that inverting the cumulative distribution may give, for a uniform known to within 1e-6."""
    p, x = distribution(logits, params, prompt, output)
    truncated = params.top_k is not None or params.top_p < 1.0 or params.min_p > 0.0
    order = np.lexsort((np.arange(len(p)), -x)) if truncated else np.arange(len(p))
    ends = np.cumsum(p[order])
    uniform = uniforms([params.seed], [seq_index], [position])[0]
    first, last = (ends <= uniform - 1e-6).sum(), (ends <= min(uniform + 1e-6, 1.0 - 1e-9)).sum()
    return {int(token) for token in order[first:last + 1] if p[token] > 0.0}


def random_params(rng):
    params = {"seed": int(rng.integers(-2**62, 2**62)), "temperature": float(rng.choice([0.4, 0.9, 1.0, 1.7]))}
    if rng.random() < 0.4:
        params["top_k"] = int(rng.choice([1, 5, 50, 127, 128, 200, 1500]))
    if rng.random() < 0.5:
        params["top_p"] = float(rng.choice([0.05, 0.5, 0.9, 0.99, 0.999999]))
    if rng.random() < 0.3:
        params["min_p"] = float(rng.choice([1e-6, 0.001, 0.1, 1.0]))
    if rng.random() < 0.3:
        params |= {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.2}
    if rng.random() < 0.2:
        params |= {"logit_bias": {0: 2.5}, "min_tokens": 12}
    return params


def random_batch(seed, rows=24):
    """Logits of many shapes (flat, peaked, with ties as bfloat16 has them, with masked tokens) and mixed requests."""
    rng = np.random.default_rng(seed)
    vocab = int(rng.choice([7, 64, 130, 1000, 4099]))
    logits = torch.from_numpy(rng.standard_normal((rows, vocab)) * rng.choice([0.05, 1.0, 4.0], (rows, 1))).float()
    if rng.random() < 0.4:
        logits = logits.bfloat16().float()
    if rng.random() < 0.3:
        logits[:, 3 + int(rng.integers(vocab - 3)):] = -torch.inf
    requests = []
    for _ in range(rows):
        tokens = rng.integers(0, vocab, 30).tolist()
        requests.append(request(int(rng.integers(0, 5000)), int(rng.integers(0, 4)), tokens[:20], tokens[20:],
                                **random_params(rng)))
    return logits, requests


@pytest.mark.parametrize("world_size", [1, 3])
def test_draws_invert_the_distribution_of_the_oracle(world_size):
    wrong, widest = [], 0
    for seed in range(40):
        logits, requests = random_batch(seed)
        tokens, num_gathers = sample(logits, requests, world_size=world_size)
        widest = max(widest, num_gathers)
        for row, (token, asked) in enumerate(zip(tokens, requests, strict=True)):
            if token.token_id not in expected_tokens(logits[row], *asked):
                wrong.append((seed, row, token.token_id, asked[0]))
    assert not wrong
    assert widest == 6, "the batches are to go all ways, the histogram's three cuts included"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1000, 10**6))
def test_tokens_are_the_same_at_every_world_size(seed):
    logits, requests = random_batch(seed)
    alone = ids(logits, requests)
    assert all(ids(logits, requests, world_size=n) == alone for n in (2, 3, 4))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1000, 10**6))
def test_a_row_is_sampled_alone_as_in_a_batch(seed):
    logits, requests = random_batch(seed)
    requests[3] = request(temperature=0.0)
    alone = [ids(logits[i:i + 1], requests[i:i + 1], world_size=2)[0] for i in range(len(requests))]
    assert ids(logits, requests, world_size=2) == alone


@pytest.mark.parametrize("params", [
    {"temperature": 1.0}, {"temperature": 0.6}, {"top_k": 10}, {"top_p": 0.8}, {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.7, "temperature": 1.3},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "top_p": 0.95},
    {"min_tokens": 9, "logit_bias": {3: 2.0}, "stop_token_ids": [5]},
], ids=str)
def test_draws_follow_the_distribution(params):
    draws, vocab = 4000, 40
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    requests = [request(i, prompt=[1, 2], output=[3, 3, 4], **params) for i in range(draws)]
    counts = np.bincount(ids(logits.expand(draws, -1), requests, world_size=2), minlength=vocab)
    expected = draws * distribution(logits[0], *[requests[0][i] for i in (0, 3, 4)])[0]
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square < common.sum() + 5 * np.sqrt(2 * common.sum())


def test_wide_draws_follow_the_distribution():
    draws, vocab = 2000, 3000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(2)) * 0.5
    requests = [request(i, top_p=0.7) for i in range(draws)]
    tokens, num_gathers = sample(logits.expand(draws, -1), requests, world_size=2)
    assert num_gathers == 4
    p = distribution(logits[0], *[requests[0][i] for i in (0, 3, 4)])[0]
    order = np.argsort(-p)
    place = np.empty(vocab, dtype=int)
    place[order] = np.arange(vocab)
    # Twenty groups of like probability; none falls outside the nucleus.
    kept = int((p > 0).sum())
    group = np.minimum(np.arange(vocab) * 20 // kept, 20)
    expected = draws * np.bincount(group, weights=p[order], minlength=21)
    counts = np.bincount(group[place[[token.token_id for token in tokens]]], minlength=21)
    assert counts[20] == 0
    assert ((counts - expected)[:20] ** 2 / expected[:20]).sum() < 20 + 5 * np.sqrt(40)


def test_the_oracle_truncates_as_transformers_does():
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(3)) * 2
    params = SamplingParams(temperature=0.8, min_p=0.02, top_k=60, top_p=0.9)
    x = logits.clone()
    for warper in (TemperatureLogitsWarper(0.8), MinPLogitsWarper(0.02), TopKLogitsWarper(60), TopPLogitsWarper(0.9)):
        x = warper(None, x)
    oracle = np.stack([distribution(row, params, [], [])[0] for row in logits])
    np.testing.assert_allclose(oracle, x.softmax(1).numpy(), atol=1e-6)


@pytest.mark.parametrize(("params", "warper"), [
    ({"top_k": 6}, TopKLogitsWarper(6)), ({"top_p": 0.6}, TopPLogitsWarper(0.6)),
    ({"min_p": 0.3}, MinPLogitsWarper(0.3)),
])
def test_truncation_leaves_the_tokens_that_transformers_leaves(params, warper):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(4))
    drawn = set(ids(logits.expand(3000, -1), [request(i, **params) for i in range(3000)], world_size=3))
    assert drawn == set(torch.isfinite(warper(None, logits.clone())[0]).nonzero().flatten().tolist())


def test_top_k_keeps_all_that_equal_the_kth():
    logits = torch.zeros(1, 900)
    logits[0, 100], logits[0, 700] = 1.0, 1.0
    drawn = ids(logits.expand(400, -1), [request(i, top_k=3) for i in range(400)], world_size=2)
    assert len(set(drawn)) > 250
    drawn = ids(logits.expand(400, -1), [request(i, top_k=2) for i in range(400)], world_size=2)
    assert set(drawn) == {100, 700}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_greedy_takes_the_lowest_of_equal_maxima_in_one_collective(world_size):
    logits = torch.randn(5, 333, generator=torch.Generator().manual_seed(5)).clamp_(max=1.0)
    logits[3] = 0.0
    logits[4, :] = -0.0
    logits[4, 200:] = 0.0
    tokens, num_gathers = sample(logits, [request(temperature=0.0)] * 5, world_size=world_size)
    assert [t.token_id for t in tokens] == np.argmax(logits.numpy(), axis=1).tolist()
    assert num_gathers == 1


def test_a_tiny_temperature_is_greedy_in_the_limit():
    logits = torch.randn(2, 200, generator=torch.Generator().manual_seed(6))
    requests = [request(temperature=1e-40), request(temperature=1e-40, top_p=0.9)]
    assert ids(logits, requests, world_size=2) == logits.argmax(1).tolist()


def test_draws_repeat_with_the_seed_and_differ_with_index_and_position():
    logits = torch.zeros(1, 5000)

    def draws(**changes):
        return [ids(logits, [request(**{"seed": 5, "position": 3, "top_p": p, **changes})])[0] for p in (0.9, 1.0)]

    assert draws() == draws()
    for changes in ({"seed": 6}, {"seq_index": 1}, {"position": 4}):
        assert all(a != b for a, b in zip(draws(), draws(**changes), strict=True))


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 70, 129])
def test_rows_with_bad_numbers_are_named(value, column):
    logits = torch.randn(4, 130, generator=torch.Generator().manual_seed(7))
    logits[1, column] = value
    logits[3] = -torch.inf
    requests = [request(), request(top_p=0.9), request(temperature=0.0), request(top_k=3)]
    with pytest.raises(NonFiniteLogitsError) as caught:
        sample(logits, requests, world_size=3)
    assert caught.value.rows == [1, 3]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_best_of_every_rank_is_what_greedy_sampling_takes(world_size):
    # So few values that the largest are many, on several ranks.
    logits = torch.randint(-3, 3, (40, 130), generator=torch.Generator().manual_seed(9)).float()
    logits[3, 70], logits[5, 1], logits[7] = torch.nan, torch.inf, -torch.inf
    logits[9, :129] = -torch.inf
    good = [row for row in range(40) if row not in (3, 5, 7)]
    bounds = bounds_of(130, world_size)

    def body(comm):
        start, end = bounds[comm.rank], bounds[comm.rank + 1]
        sampler = Sampler(comm, vocab_start=start, local_vocab=end - start)
        return *sampler.take_the_best(*best_tokens(logits[:, start:end])), comm.num_gathers

    (token_ids, bad, num_gathers), *others = on_ranks(world_size, body)
    assert all(other == (token_ids, bad, num_gathers) for other in others)
    assert bad == [3, 5, 7]
    assert num_gathers == (world_size > 1)
    greedy = request(temperature=0.0)
    assert [token_ids[row] for row in good] == ids(logits[good], [greedy] * len(good), world_size=world_size)
    assert [token_ids[row] for row in good] == [row.tolist().index(row.max()) for row in logits[good]]


def test_logits_of_the_wrong_shape_or_dtype_are_refused():
    sampler = Sampler(ThreadRank(threading.Barrier(1), 0), vocab_start=0, local_vocab=10)
    for logits in (torch.zeros(0, 11), torch.zeros(0, 10, dtype=torch.int64), torch.zeros(1, 10)):
        with pytest.raises(ValueError, match="floating"):
            sampler.sample(logits, [], [])


@pytest.mark.parametrize(("params", "num_gathers"), [
    ({"temperature": 0.0, "repetition_penalty": 1.2}, 1), ({"temperature": 0.7}, 2), ({"top_k": 50}, 1),
    ({"top_p": 0.9, "logprobs": 3}, 3), ({"logprobs": 0}, 4),
])
def test_collectives_are_as_few_as_documented(params, num_gathers):
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(8)) * 4
    assert sample(logits, [request(i, output=[1], **params) for i in range(3)], world_size=3)[1] == num_gathers
