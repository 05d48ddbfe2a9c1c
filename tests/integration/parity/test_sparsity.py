"""KV sparsity through the whole engine: what it generates is what a dense simulation of the policy in float64 does, and
does not depend on chunks, ranks, sharing, or preemption; memory is bounded."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM

from kvarto import LLM, AsyncLLM, RequestOutput, SamplingParams

VOCAB = 131
MAX_MODEL_LEN = 256
NUM_TOKENS = 60
BUDGET, INTERVAL = 40, 12
# By KV heads: three ranks of a model with two hold one of them twice, each with a query head.
MODELS = {"gqa": {"num_attention_heads": 6, "num_key_value_heads": 3},
          "few-heads": {"num_attention_heads": 4, "num_key_value_heads": 2}}
POLICIES = ["h2o", "snapkv", "tova"]
PROMPTS = [[(13 * place * place + 7 * number + 5 * place) % VOCAB for place in range(length)]
           for number, length in enumerate((3, 33, 40, 41, 97, 130))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=4)

pytestmark = pytest.mark.timeout(900)


def _oracle_class() -> Any:
    spec = importlib.util.spec_from_file_location("sparse_oracle", Path(__file__).with_name("sparse_oracle.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SparseOracle


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """By name: the directory, and the model in float64. Weights are float32 there as well."""
    found = {}
    for name, heads in MODELS.items():
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=100, num_hidden_layers=3, head_dim=16,
            max_position_embeddings=MAX_MODEL_LEN, bos_token_id=1, eos_token_id=2, **heads)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
        tokenizer = Tokenizer(tokenizer_models.BPE({letter: number for number, letter in enumerate(letters)}, []))
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        found[name] = str(directory), model.double()
    return found


@pytest.fixture(scope="module")
def expected(models: dict[str, tuple[str, Any]]) -> Any:
    """A function: what the dense simulation continues the prompts with, and its log probabilities."""
    known: dict[tuple[str, str], list[tuple[list[int], list[torch.Tensor]]]] = {}

    def look_up(name: str, policy: str) -> list[tuple[list[int], list[torch.Tensor]]]:
        if (name, policy) not in known:
            oracle = _oracle_class()(models[name][1], policy, BUDGET, INTERVAL)
            known[name, policy] = [oracle.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
        return known[name, policy]

    return look_up


def interval(policy: str) -> int | None:
    return None if policy == "snapkv" else INTERVAL


def engine(path: str, policy: str, **options: Any) -> LLM:
    settings = dict(dtype="float32", max_model_len=MAX_MODEL_LEN, block_size=8, kv_sparsity=policy,
                    kv_sparsity_budget=BUDGET, kv_sparsity_interval=interval(policy), check_integrity=True)
    return LLM(path, **settings | options)


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def check(outputs: list[RequestOutput], expected: list[tuple[list[int], list[torch.Tensor]]],
          tolerance: float = 1e-4) -> None:
    """Tokens, and the log probabilities of the likeliest."""
    for output, (tokens, logprobs) in zip(outputs, expected, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == tokens
        for entries, row in zip(completion.logprobs or [], logprobs, strict=True):
            for token, entry in entries.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=tolerance)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "options"), [
    pytest.param("gqa", {}, id="default"),
    pytest.param("gqa", {"max_num_batched_tokens": 37, "max_num_seqs": 3, "block_size": 16}, id="small-chunks"),
    pytest.param("gqa", {"tensor_parallel_size": 2}, id="tp2"),
    pytest.param("gqa", {"tensor_parallel_size": 3}, id="tp3"),
    pytest.param("few-heads", {"tensor_parallel_size": 3}, id="tp3-replicated"),
    pytest.param("few-heads", {"tensor_parallel_size": 4, "max_num_batched_tokens": 50}, id="tp4-replicated"),
])
def test_tokens_and_logits_are_those_of_a_dense_simulation(
    models: Any, expected: Any, policy: str, name: str, options: dict[str, Any],
) -> None:
    with engine(models[name][0], policy, executor="inline", **options) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        check(outputs, expected(name, policy))
        # Again: prompts are found in the cache, but for the queries that score them; with h2o all are such.
        again = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        check(again, expected(name, policy))
    assert (again[-1].num_cached_tokens > 0) == (policy != "h2o")


def test_the_policies_differ_from_one_another_and_from_a_whole_cache(models: Any, expected: Any) -> None:
    """Or the tests beside this one would show little."""
    with LLM(models["gqa"][0], dtype="float32", max_model_len=MAX_MODEL_LEN) as llm:
        whole = token_ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    found = [whole, *([tokens for tokens, _ in expected("gqa", policy)] for policy in POLICIES)]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_that_holds_everything_changes_not_a_bit(models: Any, policy: str) -> None:
    with LLM(models["gqa"][0], dtype="float32", max_model_len=MAX_MODEL_LEN) as llm:
        whole = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    with engine(models["gqa"][0], policy, kv_sparsity_budget=MAX_MODEL_LEN) as llm:
        sparse = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert token_ids(sparse) == token_ids(whole)
    assert [output.outputs[0].logprobs for output in sparse] == [output.outputs[0].logprobs for output in whole]


@pytest.mark.parametrize("policy", ["h2o", "tova"])
def test_a_long_output_fits_a_small_pool(models: Any, policy: str, settled_status: Any) -> None:
    """230 tokens in blocks for budget, interval and a compaction: 52 + 40 rows."""
    path, model = models["gqa"]
    params = SamplingParams(temperature=0.0, max_tokens=197, ignore_eos=True, logprobs=2)
    with engine(path, policy, num_blocks=12) as llm:
        outputs = llm.generate([PROMPTS[1]], params, use_tqdm=False)
        status = settled_status(llm)
    oracle = _oracle_class()(model, policy, BUDGET, INTERVAL)
    check(outputs, [oracle.greedy(PROMPTS[1], 197)])
    # The last token is not computed: 229 tokens, compacted at 52, 64, 76, ...
    assert (status["num_compactions"], status["num_dropped_rows"]) == (15, 180)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tp_size", [1, 3])
def test_samples_share_what_was_kept_and_then_go_their_own_ways(models: Any, policy: str, tp_size: int) -> None:
    """Each is scored as the simulation scores the tokens that it drew."""
    path, model = models["few-heads"]
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=40, ignore_eos=True, logprobs=0)
    with engine(path, policy, block_size=16, tensor_parallel_size=tp_size, executor="inline") as llm:
        outputs = llm.generate(PROMPTS[3:5], params, use_tqdm=False)
    oracle = _oracle_class()(model, policy, BUDGET, INTERVAL)
    for output in outputs:
        for completion in output.outputs:
            found = [entries[token].logprob for token, entries in zip(
                completion.token_ids, completion.logprobs or [], strict=True)]
            assert found == pytest.approx(oracle.read(output.prompt_token_ids, completion.token_ids), abs=1e-4)
        assert all(one.token_ids != other.token_ids for one, other in pairwise(output.outputs))


@pytest.mark.parametrize("policy", POLICIES)
def test_beams_fork_with_what_was_kept(models: Any, policy: str) -> None:
    path, model = models["gqa"]
    params = SamplingParams(temperature=0.0, beam_width=3, n=3, max_tokens=35, ignore_eos=True)
    with engine(path, policy) as llm:
        output, = llm.generate([PROMPTS[4]], params, use_tqdm=False)
    oracle = _oracle_class()(model, policy, BUDGET, INTERVAL)
    assert len({tuple(beam.token_ids) for beam in output.outputs}) == 3
    for beam in output.outputs:
        assert beam.cumulative_logprob == pytest.approx(sum(oracle.read(PROMPTS[4], beam.token_ids)), abs=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tp_size", [1, 3])
def test_a_sequence_that_was_swapped_goes_on_with_its_rows(
    models: Any, expected: Any, policy: str, tp_size: int, settled_status: Any,
) -> None:
    """In a pool for the longest alone."""
    num_blocks = {"h2o": 22, "tova": 22, "snapkv": 26}[policy]
    with engine(models["few-heads"][0], policy, num_blocks=num_blocks, preemption_mode="swap",
                tensor_parallel_size=tp_size, executor="inline", enable_prefix_caching=False) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        status = settled_status(llm)
    check(outputs, expected("few-heads", policy))
    assert status["num_preemptions_by_swap"] > 0
    assert status["num_rechosen"] == 0
    assert status["num_dropped_rows"] > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_log_probabilities_of_a_prompt_are_those_of_all_its_tokens(models: Any, policy: str) -> None:
    path, model = models["gqa"]
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    with engine(path, policy, max_num_batched_tokens=45, max_num_seqs=3) as llm:
        output, = llm.generate([PROMPTS[5]], params, use_tqdm=False)
    oracle = _oracle_class()(model, "snapkv", MAX_MODEL_LEN, 1)
    wanted = oracle.read(PROMPTS[5][:1], PROMPTS[5][1:])
    found = [entries[token].logprob for token, entries in zip(
        PROMPTS[5][1:], (output.prompt_logprobs or [])[1:], strict=True) if entries]
    assert found == pytest.approx(wanted, abs=1e-4)


async def _last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


@pytest.mark.parametrize("policy", POLICIES)
def test_who_leaves_early_leaves_nothing_behind(models: Any, expected: Any, policy: str) -> None:
    """Requests that are cancelled, running, waiting or swapped out, beside one that goes on."""
    num_blocks = 26
    options = dict(dtype="float32", max_model_len=MAX_MODEL_LEN, block_size=8, kv_sparsity=policy,
                   kv_sparsity_budget=BUDGET, kv_sparsity_interval=interval(policy), check_integrity=True,
                   num_blocks=num_blocks, enable_prefix_caching=False, executor="inline")

    async def run() -> list[int]:
        async with await AsyncLLM.start(models["gqa"][0], **options) as llm:
            keeper = asyncio.create_task(_last(llm.generate(PROMPTS[4], GREEDY)))
            streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[1:4]]
            for stream in streams:
                async for _ in stream:
                    break
            for stream in streams:
                await stream.aclose()
            output = await keeper
            while (await llm.status())["groups"]["0"]["blocks"]["free"] < num_blocks:
                await asyncio.sleep(0.02)
            return output.outputs[0].token_ids

    assert asyncio.run(asyncio.wait_for(run(), 120)) == expected("gqa", policy)[4][0]


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_quantized_cache_are_kept_with_their_scales(models: Any, policy: str) -> None:
    """The simulation rounds keys and values as well: to the same codes, but for a few that lie between two."""
    path, model = models["gqa"]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=4)
    with engine(path, policy, kv_cache_dtype="int8") as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    oracle = _oracle_class()(model, policy, BUDGET, INTERVAL, int8=True)
    check(outputs, [oracle.greedy(prompt, 20) for prompt in PROMPTS], tolerance=0.02)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_quantized_sequence_that_was_swapped_goes_on_with_its_rows(
    models: Any, policy: str, kv_cache_dtype: str, settled_status: Any,
) -> None:
    with engine(models["gqa"][0], policy, kv_cache_dtype=kv_cache_dtype) as llm:
        expected = token_ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    with engine(models["gqa"][0], policy, kv_cache_dtype=kv_cache_dtype, num_blocks=26, preemption_mode="swap",
                enable_prefix_caching=False) as llm:
        assert token_ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
        status = settled_status(llm)
    assert status["num_preemptions_by_swap"] > 0
    assert status["num_rechosen"] == 0
