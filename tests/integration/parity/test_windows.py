"""Windows and small caches through the whole engine: tokens are those of Transformers, and do not depend on chunks,
preemption, sharing or recovery of blocks; memory is bounded."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kvarto import LLM, RequestOutput, SamplingParams

_spec = importlib.util.spec_from_file_location("random_models", Path(__file__).with_name("random_models.py"))
assert _spec is not None and _spec.loader is not None
random_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_models)
MAX_MODEL_LEN, PROMPTS, make_model = random_models.MAX_MODEL_LEN, random_models.PROMPTS, random_models.make_model

NUM_TOKENS = 40
POOL_BYTES = 64 * 2**20
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)

pytestmark = pytest.mark.timeout(900)


def continued(model: Any, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt):]


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def scores(outputs: list[RequestOutput]) -> torch.Tensor:
    """Log probabilities of all prompt tokens but the first of each."""
    return torch.tensor([
        entries[token].logprob for output in outputs
        for token, entries in zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=True)
        if entries is not None])


@pytest.fixture(scope="module", params=["alternating", "windowed"])
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    """The model's directory, and what Transformers continues the prompts with."""
    directory = tmp_path_factory.mktemp(request.param)
    model = make_model(directory, request.param)
    return str(directory), [continued(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("options", [
    pytest.param({}, id="default"),
    pytest.param({"max_num_batched_tokens": 7, "max_num_seqs": 3, "block_size": 8}, id="small-chunks"),
    pytest.param({"tensor_parallel_size": 2, "executor": "inline"}, id="tp2"),
    pytest.param({"tensor_parallel_size": 2, "executor": "ray"}, id="tp2-on-ray", marks=pytest.mark.slow),
])
def test_tokens_are_those_of_transformers(windowed: tuple[str, list[list[int]]], options: dict[str, Any]) -> None:
    path, expected = windowed
    with LLM(path, dtype="float32", max_model_len=MAX_MODEL_LEN, check_integrity=True, **options) as llm:
        assert token_ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
        # Again: now the prompts, and what was generated, are found in the cache.
        again = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert token_ids(again) == expected
    if not options:
        assert again[-1].num_cached_tokens == 192


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_few_blocks_change_nothing(windowed: tuple[str, list[list[int]]], mode: str, settled_status: Any) -> None:
    path, expected = windowed
    # What the longest takes, or a few windows and a chunk.
    num_blocks = 40 if "alternating" in path else 22
    with LLM(path, dtype="float32", max_model_len=MAX_MODEL_LEN, block_size=8, num_blocks=num_blocks,
             preemption_mode=mode, max_num_batched_tokens=64, check_integrity=True) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        status = settled_status(llm)
    assert token_ids(outputs) == expected
    assert status["num_preemptions"] > 0


def test_sequences_that_share_a_windowed_prompt(windowed: tuple[str, list[list[int]]]) -> None:
    """Every sample of one request is what it is alone with the same seed."""
    path, _ = windowed
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(path, dtype="float32", max_model_len=MAX_MODEL_LEN, block_size=8, check_integrity=True) as llm:
        together = llm.generate([PROMPTS[3], PROMPTS[4]], params, use_tqdm=False)
    with LLM(path, dtype="float32", max_model_len=MAX_MODEL_LEN, block_size=16, enable_prefix_caching=False) as llm:
        alone = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt in PROMPTS[3:5]]
    for one, other in zip(together, alone, strict=True):
        assert [part.token_ids for part in one.outputs] == [part.token_ids for part in other.outputs]
        assert all(a.token_ids != b.token_ids for a, b in pairwise(one.outputs))


@pytest.mark.parametrize("pattern", ["streaming_llm", "lm_infinite", "sliding_window"])
def test_a_sequence_outgrows_its_model_in_bounded_memory(tmp_path: Path, pattern: str) -> None:
    """A model of 64 positions, 600 tokens, and a pool in which they would not fit."""
    make_model(tmp_path, "short")
    params = SamplingParams(temperature=0.0, max_tokens=600, ignore_eos=True)
    options: dict[str, Any] = dict(
        dtype="float32", attention_pattern=pattern, attention_window=32, max_model_len=700, check_integrity=True,
        block_size=8)
    outputs = []
    # Window and sinks take at most 8 blocks, a chunk 4.
    for more in ({"num_blocks": 14, "max_num_batched_tokens": 32}, {"max_num_batched_tokens": 5}):
        with LLM(str(tmp_path), **options, **more) as llm:
            output, = llm.generate(PROMPTS[3], params, use_tqdm=False)
            outputs.append(output.outputs[0].token_ids)
    assert len(outputs[0]) == 600
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_quantized_cache_holds_more_and_depends_on_nothing_else(
    model_path: str, prompts: list[Any], kv_cache_dtype: str, settled_status: Any,
) -> None:
    batch = [list(prompt.token_ids) for prompt in sorted(prompts, key=lambda prompt: len(prompt.token_ids))[2:14]]
    options: dict[str, Any] = dict(dtype="bfloat16", max_model_len=2048, max_num_seqs=64)
    scored = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, prompt_logprobs=0)
    with LLM(model_path, kv_cache_dtype=kv_cache_dtype, kv_cache_memory_bytes=POOL_BYTES, **options) as llm:
        undisturbed = llm.generate(batch, scored, use_tqdm=False)
        capacity = settled_status(llm)["blocks"]["total"]
    with LLM(model_path, kv_cache_dtype=kv_cache_dtype, num_blocks=28, max_num_batched_tokens=32, **options) as llm:
        preempted = llm.generate(batch, scored, use_tqdm=False)
        assert settled_status(llm)["num_preemptions"] > 0
    with LLM(model_path, kv_cache_memory_bytes=POOL_BYTES, **options) as llm:
        plain = llm.generate(batch, scored, use_tqdm=False)
        assert capacity >= 1.85 * settled_status(llm)["blocks"]["total"]
    assert token_ids(preempted) == token_ids(undisturbed)
    # Rows in wrong places cost nats.
    error = (scores(undisturbed) - scores(plain)).abs().mean()
    assert 0 < error < 0.15
