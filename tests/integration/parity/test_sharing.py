"""Sharing, swapping and the tiers of the cache change no token: beam search is Transformers', and greedy tokens are the
oracle's with the prefix cache, under preemption of every kind, and after a restart on blocks read from disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvarto import LLM, SamplingParams

NUM_TOKENS = 64
"""As many as the oracle knows of each prompt."""
BEAM_TOKENS = 20
SCORE_TOLERANCE = 1e-4
"""Relative: float32 sums in another order."""

pytestmark = pytest.mark.timeout(1800)


def greedy(num_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def generate(llm: LLM, prompts: list[Any], params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate([list(prompt.token_ids) for prompt in prompts], params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def assert_parity(oracle: Any, prompts: list[Any], tokens: list[list[int]]) -> None:
    found = [difference for prompt, ours in zip(prompts, tokens, strict=True)
             for difference in oracle.differences(prompt, ours)]
    assert all(difference.is_tie for difference in found), "\n".join(map(str, found))
    assert len(found) <= 1


@pytest.fixture(scope="module")
def few(prompts: list[Any]) -> list[Any]:
    """Ten prompts, from short to about 300 tokens."""
    return sorted(prompts, key=lambda prompt: len(prompt.token_ids))[2:22:2]


@pytest.fixture(scope="module")
def llm(model_path: str) -> Any:
    with LLM(model_path, dtype="float32", check_integrity=True, max_model_len=2048) as llm:
        yield llm


@pytest.mark.parametrize(("width", "options"), [
    (2, {}),
    pytest.param(4, {"length_penalty": 0.0}, marks=pytest.mark.slow),
    pytest.param(4, {"length_penalty": 2.0, "early_stopping": True}, marks=pytest.mark.slow),
    pytest.param(6, {"early_stopping": "never"}, marks=pytest.mark.slow),
])
@pytest.mark.parametrize("ends", [False, True], ids=["to-the-end", "with-end-token"])
def test_beam_search_is_that_of_transformers(
    llm: LLM, oracle: Any, few: list[Any], width: int, options: dict[str, Any], ends: bool,
) -> None:
    end_token = llm.tokenizer.encode(".", add_special_tokens=False)[0] if ends else None
    params = SamplingParams(
        beam_width=width, n=width, max_tokens=BEAM_TOKENS, ignore_eos=True,
        stop_token_ids=[end_token] if end_token is not None else [], **options)
    prompts = few[:5]
    outputs = llm.generate([list(prompt.token_ids) for prompt in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        theirs = oracle.beams(prompt, width, BEAM_TOKENS, end_token, **options)
        scores = [completion.beam_score for completion in output.outputs]
        assert scores == pytest.approx([beam.score for beam in theirs], rel=SCORE_TOLERANCE), prompt.name
        assert [tuple(completion.token_ids) for completion in output.outputs] == [beam.token_ids for beam in theirs]


def test_prefix_cache_changes_no_token(llm: LLM, oracle: Any, few: list[Any]) -> None:
    assert_parity(oracle, few, generate(llm, few, greedy()))
    outputs = llm.generate([list(prompt.token_ids) for prompt in few], greedy(), use_tqdm=False)
    assert_parity(oracle, few, [output.outputs[0].token_ids for output in outputs])
    for prompt, output in zip(few, outputs, strict=True):
        assert output.num_cached_tokens == (len(prompt.token_ids) - 1) // 16 * 16, prompt.name


def test_next_turn_of_a_chat_finds_the_generated_tokens(llm: LLM, oracle: Any, few: list[Any]) -> None:
    prompt = few[3]
    first = llm.generate([list(prompt.token_ids)], greedy(40), use_tqdm=False)[0].outputs[0].token_ids
    longer = [*prompt.token_ids, *first]
    output = llm.generate([longer], greedy(24), use_tqdm=False)[0]
    # Of the last token nothing was computed, and a hit leaves at least one token to compute.
    assert output.num_cached_tokens == (len(longer) - 1) // 16 * 16
    assert_parity(oracle, [prompt], [[*first, *output.outputs[0].token_ids]])


@pytest.mark.parametrize("options", [
    {"preemption_mode": "swap"},
    {"preemption_mode": "recompute"},
    pytest.param({"preemption_mode": "auto"}, marks=pytest.mark.slow),
    pytest.param({"preemption_mode": "swap", "enable_prefix_caching": False, "max_num_batched_tokens": 64},
                 marks=pytest.mark.slow),
    pytest.param({"preemption_mode": "swap", "tensor_parallel_size": 2, "executor": "inline"}, marks=pytest.mark.slow),
    pytest.param({"preemption_mode": "swap", "tensor_parallel_size": 2, "executor": "ray"}, marks=pytest.mark.slow),
], ids=["swap", "recompute", "auto", "swap-without-cache", "swap-tp2", "swap-ray-tp2"])
def test_preempted_requests_have_the_same_tokens(
    model_path: str, oracle: Any, few: list[Any], settled_status: Any, options: dict[str, Any],
) -> None:
    longest = max(len(prompt.token_ids) for prompt in few) + NUM_TOKENS
    with LLM(model_path, dtype="float32", max_model_len=2048, num_blocks=-(-longest // 16) + 4, check_integrity=True,
             **options) as llm:
        tokens = generate(llm, few, greedy())
        status = settled_status(llm)
    assert_parity(oracle, few, tokens)
    assert status["num_preemptions"] > 0
    if options["preemption_mode"] == "swap":
        assert status["num_preemptions_by_swap"] > 0
        assert status["swap_in_bytes"] > 0
    if options["preemption_mode"] == "recompute":
        assert status["num_preemptions_by_swap"] == 0
    assert status["blocks"]["used"] == status["blocks"]["swapped"] == 0


@pytest.mark.slow
def test_cached_blocks_outlive_a_restart_on_disk(
    model_path: str, oracle: Any, few: list[Any], tmp_path: Path,
) -> None:
    prompt = few[-1]
    options = dict(dtype="float32", max_model_len=1024, num_blocks=40, swap_space_bytes=20 * 16 * 30 * 2 * 3 * 64 * 4,
                   kv_disk_path=str(tmp_path / "tier"), check_integrity=True)
    with LLM(model_path, **options) as llm:
        assert_parity(oracle, [prompt], generate(llm, [prompt], greedy()))
        # What other prompts need of device and host pushes it to the disk.
        generate(llm, [other for other in few[:-1] for _ in range(2)] * 3, greedy(8))
        for filler in range(8):
            llm.generate([[filler + 5] * 500], greedy(2), use_tqdm=False)
    files = sorted((tmp_path / "tier").rglob("*.kv"))
    assert files
    assert os.stat(tmp_path / "tier" / "prefix-key").st_mode & 0o777 == 0o600
    with LLM(model_path, **options) as llm:
        output = llm.generate([list(prompt.token_ids)], greedy(), use_tqdm=False)[0]
        assert output.num_cached_tokens > 0
        assert_parity(oracle, [prompt], [output.outputs[0].token_ids])
    for file in sorted((tmp_path / "tier").rglob("*.kv")):
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        file.write_bytes(damaged)
    with LLM(model_path, **options) as llm:
        output = llm.generate([list(prompt.token_ids)], greedy(), use_tqdm=False)[0]
        assert output.num_cached_tokens == 0
        assert_parity(oracle, [prompt], [output.outputs[0].token_ids])
