"""Weights of int8 and int4 through the whole engine, on a GGUF file of Q4_1: how likely text is, and that tokens do not
depend on the batch. That the numbers are those of the definition is tested layer by layer, in tests/unit/worker."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvarto import LLM, SamplingParams
from kvarto.protos.errors import ConfigError

NUM_PROMPTS = 6
SCORED = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)

pytestmark = pytest.mark.timeout(900)


@torch.inference_mode()
def log_probabilities(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Of every token but the first, given those before it."""
    logits = model(torch.tensor([token_ids]), use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1)[torch.arange(len(token_ids) - 1), token_ids[1:]]


def scored(llm: LLM, prompts: list[Any]) -> list[torch.Tensor]:
    outputs = llm.generate([list(prompt.token_ids) for prompt in prompts], SCORED)
    return [torch.tensor([row[token].logprob for row, token in zip(
        output.prompt_logprobs[1:], prompt.token_ids[1:], strict=True)]).double()
        for output, prompt in zip(outputs, prompts, strict=True)]


@pytest.mark.parametrize(("quantization", "tp_size"), [("int8", 1), ("int4", 1), ("int4", 2), ("int4", 3)])
def test_text_is_as_likely_as_with_the_numbers_of_the_file(quantization: str, tp_size: int, model_path: str,
                                                           prompts: list[Any], oracle: Any) -> None:
    """Rounding the inputs of 30 layers is noise: it moves a token's log probability by a tenth, either way. What is to
    be seen is that it does not make text less likely; int4 keeps the very weights of this Q4_1 file."""
    some = [prompt for prompt in prompts if 20 < len(prompt.token_ids) < 250][:NUM_PROMPTS]
    assert len(some) == NUM_PROMPTS
    with LLM(model_path, dtype="float32", quantization=quantization, tensor_parallel_size=tp_size, executor="inline",
             max_model_len=512) as llm:
        ours = torch.cat(scored(llm, some))
    model = oracle._model(torch.float32)
    expected = torch.cat([log_probabilities(model, list(prompt.token_ids)) for prompt in some])
    difference = ours - expected
    print(f"{quantization}, tp {tp_size}: {difference.mean():+.4f}, {difference.abs().mean():.4f} either way")
    # Three standard errors, and as much as 1% of perplexity.
    assert difference.mean().abs() < 0.01 + 3 * difference.std() / len(difference) ** 0.5
    assert difference.abs().mean() < 0.2


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_tokens_do_not_depend_on_the_batch(quantization: str, model_path: str, prompts: list[Any]) -> None:
    """Codes are summed in one order whatever else is computed: in bfloat16, alone, in chunks and all together."""
    some = [list(prompt.token_ids) for prompt in prompts if 20 < len(prompt.token_ids) < 250][:NUM_PROMPTS]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=1)
    found = []
    for tokens, together in ((256, True), (256, False), (16, True)):
        with LLM(model_path, quantization=quantization, executor="inline", max_model_len=512,
                 max_num_batched_tokens=tokens) as llm:
            outputs = llm.generate(some, params) if together else [llm.generate([one], params)[0] for one in some]
        found.append([(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs])
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_devices_that_do_not_have_it_refuse_it(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="quantization='int4' is for processors"):
        LLM(model_path, quantization="int4", device="cuda", executor="inline")
