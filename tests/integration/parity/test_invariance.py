"""Seeded sampling does not depend on the batch, on preemption or on the block size, and log probabilities are those
of Transformers' logits in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvarto import LLM, RequestOutput, SamplingParams

NUM_PROMPTS = 12
NUM_TOKENS = 32
FEW_BLOCKS = 40
"""Of 16 tokens: the largest request, two sequences of the longest prompt, takes 32."""
LOGPROB_TOLERANCE = 1e-3
TP_SHARE = 0.9
"""Ranks add in another order: a draw at the border of two tokens may fall to the other one."""

pytestmark = pytest.mark.timeout(1800)

Samples = list[list[list[int]]]
"""Token ids of each prompt's sequences."""


@pytest.fixture(scope="module")
def batch(prompts: list[Any]) -> list[list[int]]:
    """The shorter prompts: what is tested here has nothing to do with length."""
    shortest = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    return [list(prompt.token_ids) for prompt in shortest[2:2 * NUM_PROMPTS + 2:2]]


@pytest.fixture(scope="module")
def params(batch: list[list[int]]) -> list[SamplingParams]:
    return [
        SamplingParams(
            n=2, seed=1000 + index, temperature=0.8, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.3,
            frequency_penalty=0.2, logprobs=3, prompt_logprobs=2, max_tokens=NUM_TOKENS, ignore_eos=True)
        for index in range(len(batch))]


@pytest.fixture(scope="module")
def llm(model_path: str) -> Iterator[LLM]:
    with LLM(model_path, dtype="float32", block_size=16) as llm:
        yield llm


@pytest.fixture(scope="module")
def together(llm: LLM, batch: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
    """All prompts in one batch: what the other runs are compared with."""
    return llm.generate(batch, params, use_tqdm=False)


def samples(outputs: list[RequestOutput]) -> Samples:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def prompt_scores(output: RequestOutput) -> list[float]:
    """Log probability of each prompt token but the first."""
    assert output.prompt_logprobs is not None
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [entries[token_id].logprob for token_id, entries in pairs if entries is not None]


def test_sequences_of_a_request_differ(together: list[RequestOutput]) -> None:
    assert all(first != second for first, second in samples(together))


@pytest.mark.slow
def test_alone_is_as_in_a_batch(
    llm: LLM, batch: list[list[int]], params: list[SamplingParams], together: list[RequestOutput],
) -> None:
    alone = [llm.generate(token_ids, own, use_tqdm=False)[0] for token_ids, own in zip(batch, params, strict=True)]
    assert samples(alone) == samples(together)


def test_preempted_is_as_undisturbed(
    model_path: str, batch: list[list[int]], params: list[SamplingParams], together: list[RequestOutput],
    settled_status: Any,
) -> None:
    """Tokens and the prompt's log probabilities, which arrive in chunks and must survive starting over."""
    with LLM(model_path, dtype="float32", block_size=16, num_blocks=FEW_BLOCKS, max_num_batched_tokens=32) as llm:
        outputs = llm.generate(batch, params, use_tqdm=False)
        status = settled_status(llm)
    assert status["num_preemptions"] > 0
    assert status["blocks"]["free"] + status["blocks"]["cached"] == FEW_BLOCKS
    assert samples(outputs) == samples(together)
    for ours, theirs in zip(outputs, together, strict=True):
        assert prompt_scores(ours) == pytest.approx(prompt_scores(theirs), abs=LOGPROB_TOLERANCE)


@pytest.mark.slow
def test_64_token_blocks_are_as_16_token_blocks(
    model_path: str, batch: list[list[int]], params: list[SamplingParams], together: list[RequestOutput],
) -> None:
    with LLM(model_path, dtype="float32", block_size=64) as llm:
        assert samples(llm.generate(batch, params, use_tqdm=False)) == samples(together)


def test_logprobs_are_those_of_transformers(
    batch: list[list[int]], together: list[RequestOutput], oracle: Any, record_property: Callable[[str, object], None],
) -> None:
    record_property("largest_error", _check_logprobs(batch, together, oracle))


@pytest.mark.slow
def test_prompt_logprobs_are_those_of_transformers_in_chunks_too(
    model_path: str, batch: list[list[int]], params: list[SamplingParams], oracle: Any,
) -> None:
    longest = batch[-1]
    with LLM(model_path, dtype="float32", max_num_batched_tokens=24) as llm:
        outputs = llm.generate([longest], [params[-1]], use_tqdm=False)
    _check_logprobs([longest], outputs, oracle)


@pytest.mark.slow
def test_two_ranks_sample_and_score_as_one(
    model_path: str, batch: list[list[int]], params: list[SamplingParams], together: list[RequestOutput], oracle: Any,
    record_property: Callable[[str, object], None],
) -> None:
    with LLM(model_path, dtype="float32", tensor_parallel_size=2, executor="ray") as llm:
        outputs = llm.generate(batch, params, use_tqdm=False)
    pairs = [pair for ours, theirs in zip(samples(outputs), samples(together), strict=True)
             for pair in zip(ours, theirs, strict=True)]
    share = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
    print(f"{share:.3f} of {len(pairs)} sequences are identical on two ranks")
    record_property("share_identical", share)
    _check_logprobs(batch, outputs, oracle)
    assert share >= TP_SHARE


def _check_logprobs(batch: list[list[int]], outputs: list[RequestOutput], oracle: Any) -> float:
    """Compare the entries with the oracle's, given the tokens that were sampled. Returns the largest error."""
    error = 0.0
    # Every other request, from the longest down: float64 is slow.
    for token_ids, output in list(zip(batch, outputs, strict=True))[::-2]:
        for completion in output.outputs:
            # Row i predicts token i + 1 of prompt and completion.
            known = token_ids + completion.token_ids[:-1]
            expected = oracle.logits64(known, len(known)).log_softmax(-1)
            assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
            for position, entries in enumerate(completion.logprobs):
                row = expected[len(token_ids) - 1 + position]
                error = max(error, _check_entries(entries, row, completion.token_ids[position], num_top=3))
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(token_ids)
        assert output.prompt_logprobs[0] is None
        for position, entries in enumerate(output.prompt_logprobs[1:], start=1):
            assert entries is not None
            error = max(error, _check_entries(entries, expected[position - 1], token_ids[position], num_top=2))
    return error


def _check_entries(entries: dict[int, Any], expected: torch.Tensor, token_id: int, *, num_top: int) -> float:
    """`entries`: the `num_top` likeliest tokens and `token_id`. `expected`: `[vocab_size]`. Returns the error."""
    assert token_id in entries
    by_rank = {entry.rank: entry.logprob for entry in entries.values()}
    assert set(range(1, num_top + 1)) <= set(by_rank) and len(entries) in (num_top, num_top + 1)
    # By value too: two tokens of equal probability may stand in either order, but no other may stand there.
    top = expected.topk(num_top).values.tolist()
    errors = [abs(by_rank[rank] - value) for rank, value in enumerate(top, start=1)]
    errors += [abs(entry.logprob - float(expected[token])) for token, entry in entries.items()]
    assert max(errors) < LOGPROB_TOLERANCE
    own = entries[token_id]
    surely_ahead = int((expected > own.logprob + LOGPROB_TOLERANCE).sum())
    maybe_ahead = int((expected > own.logprob - LOGPROB_TOLERANCE).sum())
    assert surely_ahead + 1 <= own.rank <= maybe_ahead
    return max(errors)
