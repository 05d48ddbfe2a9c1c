"""The int4 cache through the whole engine: log probabilities are those of a dense simulation of its definition inside
Transformers, and tokens do not depend on chunks, preemption, sharing, or recovery of blocks."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvarto import LLM, RequestOutput, SamplingParams

_spec = importlib.util.spec_from_file_location("random_models", Path(__file__).with_name("random_models.py"))
assert _spec is not None and _spec.loader is not None
random_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_models)
MAX_MODEL_LEN, PROMPTS, make_model = random_models.MAX_MODEL_LEN, random_models.PROMPTS, random_models.make_model

NUM_TOKENS = 40
BLOCK_SIZE = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, prompt_logprobs=0, logprobs=0)
UNSCORED = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
OPTIONS: dict[str, Any] = dict(kv_cache_dtype="int4", dtype="float32", max_model_len=MAX_MODEL_LEN,
                               block_size=BLOCK_SIZE, check_integrity=True)

pytestmark = pytest.mark.timeout(900)


def channels_read_back(keys: torch.Tensor) -> torch.Tensor:
    """`[..., block_size, head_dim]`, float32, by 16 codes for each channel: as the definition says, in numbers and not
    in bytes."""
    low, high = keys.amin(-2, keepdim=True), keys.amax(-2, keepdim=True)
    return read_back(keys, low, torch.maximum((high - low) / 15, torch.maximum(low.abs(), high.abs()) / 120))


def rows_read_back(values: torch.Tensor) -> torch.Tensor:
    """The same for each row, whose range has a 0 in it."""
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    return read_back(values, low, (high - low) / 15)


def read_back(x: torch.Tensor, low: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # Up to the next bfloat16, which has the upper half of a float32's bits.
    scale = ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 15) - zero) * scale


class Simulation:
    """Attention as the int4 cache defines it, over whole sequences: a query sees its own block of `block_size` tokens
    as it is, and those before it quantized, keys per channel of a block and values per token."""

    block_size = BLOCK_SIZE
    quantizes = True

    def __call__(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
                 scaling: float, sliding_window: int | None = None, softcap: float | None = None, **_: Any,
                 ) -> tuple[torch.Tensor, None]:
        # query: [batch, num_heads, length, head_dim]; key, value: the same of num_kv_heads
        length, size = query.shape[2], self.block_size
        whole = length // size * size if self.quantizes else 0
        blocks = key[:, :, :whole].unflatten(2, (-1, size)) if whole else key[:, :, :0]
        old_key = torch.cat((channels_read_back(blocks).flatten(2, 3), key[:, :, whole:]), 2) if whole else key
        old_value = torch.cat((rows_read_back(value[:, :, :whole]), value[:, :, whole:]), 2) if whole else value
        at = torch.arange(length)
        own = at >= at[:, None] // size * size
        seen = at <= at[:, None]
        if sliding_window is not None:
            seen &= at > at[:, None] - sliding_window
        repeats = query.shape[1] // key.shape[1]

        def wide(x: torch.Tensor) -> torch.Tensor:
            return x.double().repeat_interleave(repeats, 1)

        query = query.double()
        scores = scaling * torch.where(own, query @ wide(key).mT, query @ wide(old_key).mT)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = weights * own @ wide(value) + weights * ~own @ wide(old_value)
        return out.to(key.dtype).transpose(1, 2), None


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    simulation = Simulation()
    ALL_ATTENTION_FUNCTIONS.register("kvarto_int4", simulation)
    return simulation


@pytest.fixture(scope="module", params=["full", "windowed", "alternating"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, simulation: Simulation,
          ) -> tuple[str, Any]:
    """The model's directory, and the model with the simulation in it."""
    directory = tmp_path_factory.mktemp(request.param)
    return str(directory), make_model(directory, request.param, attention="kvarto_int4")


@pytest.fixture(scope="module")
def path(model: tuple[str, Any]) -> str:
    return model[0]


@pytest.fixture(scope="module")
def undisturbed(path: str) -> list[RequestOutput]:
    with LLM(path, **OPTIONS) as llm:
        return llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def scores(output: RequestOutput) -> torch.Tensor:
    """Log probabilities of all tokens but the first."""
    entries = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids][1:]
    return torch.tensor([entry[token].logprob for entry, token in zip(entries, tokens, strict=True) if entry],
                        dtype=torch.float64)


@torch.inference_mode()
def simulated(model: Any, output: RequestOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities of the same tokens, and how far each generated one lies below the likeliest."""
    tokens = torch.tensor([*output.prompt_token_ids, *output.outputs[0].token_ids])
    logprobs = model(tokens[None], use_cache=False).logits[0].double().log_softmax(-1)[:-1]
    found = logprobs.gather(1, tokens[1:, None])[:, 0]
    return found, (logprobs.amax(1) - found)[-NUM_TOKENS:]


@pytest.mark.parametrize("options", [
    pytest.param({}, id="default"),
    pytest.param({"max_num_batched_tokens": 7, "max_num_seqs": 3}, id="small-chunks"),
    pytest.param({"block_size": 16, "enable_prefix_caching": False}, id="larger-blocks"),
    pytest.param({"tensor_parallel_size": 2, "executor": "inline"}, id="tp2"),
    pytest.param({"tensor_parallel_size": 3, "executor": "inline"}, id="tp3"),
])
def test_log_probabilities_are_those_of_the_definition(
    model: tuple[str, Any], simulation: Simulation, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any],
) -> None:
    path, oracle = model
    monkeypatch.setattr(simulation, "block_size", options.get("block_size", BLOCK_SIZE))
    with LLM(path, **OPTIONS | options) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        # Again: now the prompts, and what was generated, are found in the cache.
        again = llm.generate(PROMPTS, UNSCORED, use_tqdm=False)
    assert token_ids(again) == token_ids(outputs)
    assert again[-1].num_cached_tokens == (0 if "enable_prefix_caching" in options else 192)
    size = options.get("block_size", BLOCK_SIZE)
    exact, errors, gaps, losses = [], [], [], []
    for output in outputs:
        wanted, gap = simulated(oracle, output)
        difference = (scores(output) - wanted).abs()
        # Nothing that these see is quantized.
        exact.append(difference[:size])
        errors.append(difference[size:])
        gaps.append(gap)
        with monkeypatch.context() as context:
            context.setattr(simulation, "quantizes", False)
            losses.append((scores(output) - simulated(oracle, output)[0]).abs()[size:])
    assert torch.cat(exact).max() < 1e-5
    # A number halfway between two codes falls to either by the last bit of a sum over ranks or tiles. The errors of N
    # codes are uniform, sqrt(1/12) of a step each; k codes that fell otherwise are off by a step: sqrt(12 k / N) of
    # the loss. Sums differ by ~1e-6 of a number, which is up to 15 steps: 3 of N = 10^4 codes is plenty.
    assert torch.cat(errors).mean() < torch.cat(losses).mean() * (12 * 3 / 10**4) ** 0.5
    assert torch.cat(gaps).max() < 5e-3


@pytest.mark.parametrize("options", [
    pytest.param({"max_num_batched_tokens": 5}, id="chunks-within-blocks"),
    pytest.param({"max_num_seqs": 1}, id="one-after-another"),
])
def test_tokens_depend_on_nothing_else(
    path: str, undisturbed: list[RequestOutput], options: dict[str, Any],
) -> None:
    with LLM(path, **OPTIONS | options) as llm:
        assert token_ids(llm.generate(PROMPTS, UNSCORED, use_tqdm=False)) == token_ids(undisturbed)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_few_blocks_change_nothing(
    path: str, undisturbed: list[RequestOutput], mode: str, settled_status: Any,
) -> None:
    # What the longest takes, or a few windows and a chunk.
    num_blocks = 22 if "windowed" in path else 40
    with LLM(path, num_blocks=num_blocks, preemption_mode=mode, max_num_batched_tokens=64, **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, UNSCORED, use_tqdm=False)
        status = settled_status(llm)
    assert token_ids(outputs) == token_ids(undisturbed)
    assert status["num_preemptions"] > 0


@pytest.mark.parametrize("few", [False, True], ids=["many-blocks", "few-blocks"])
def test_samples_of_one_prompt_are_what_each_is_alone(path: str, few: bool) -> None:
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    # Beside layers that see everything, a window makes room for three whole prompts a condition of admission.
    num_blocks = 68 if "alternating" in path else 44
    with LLM(path, **OPTIONS, **({"num_blocks": num_blocks, "max_num_batched_tokens": 32} if few else {})) as llm:
        together = llm.generate([PROMPTS[3], PROMPTS[4]], params, use_tqdm=False)
    with LLM(path, **OPTIONS, enable_prefix_caching=False) as llm:
        alone = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt in PROMPTS[3:5]]
    for one, other in zip(together, alone, strict=True):
        assert [part.token_ids for part in one.outputs] == [part.token_ids for part in other.outputs]
        assert all(a.token_ids != b.token_ids for a, b in pairwise(one.outputs))


def test_beams_are_those_that_transformers_finds_with_the_simulation(model: tuple[str, Any]) -> None:
    path, oracle = model
    params = SamplingParams(beam_width=3, n=3, temperature=0.0, max_tokens=20, ignore_eos=True, length_penalty=0.0)
    with LLM(path, **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS[1:4], params, use_tqdm=False)
    for prompt, output in zip(PROMPTS[1:4], outputs, strict=True):
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            found = oracle.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, num_beams=3, num_return_sequences=3,
                max_new_tokens=20, eos_token_id=None, pad_token_id=0, length_penalty=0.0, use_cache=False,
                return_dict_in_generate=True, output_scores=True)
        assert [beam.token_ids for beam in output.outputs] == found.sequences[:, len(prompt):].tolist()
        assert [beam.cumulative_logprob for beam in output.outputs] == pytest.approx(
            found.sequences_scores.tolist(), rel=1e-3)


@pytest.mark.parametrize("pattern", ["streaming_llm", "lm_infinite", "longformer"])
def test_patterns_with_sinks_hold_a_window_and_depend_on_nothing_else(tmp_path: Path, pattern: str) -> None:
    make_model(tmp_path, "full")
    options = OPTIONS | dict(attention_pattern=pattern, attention_window=32, attention_sinks=4)
    params = SamplingParams(temperature=0.0, max_tokens=180, ignore_eos=True)
    found = []
    # Window and sinks take at most 7 blocks, a chunk 4.
    for more in ({"num_blocks": 14, "max_num_batched_tokens": 32}, {"max_num_batched_tokens": 5}):
        with LLM(str(tmp_path), **options, **more) as llm:
            found.append(token_ids(llm.generate(PROMPTS[3], params, use_tqdm=False)))
    assert found[0] == found[1]


def test_blocks_outlive_a_restart_on_disk_without_the_residual(
    path: str, undisturbed: list[RequestOutput], tmp_path: Path,
) -> None:
    options = OPTIONS | dict(num_blocks=40, swap_space_bytes=2**17, kv_disk_path=str(tmp_path / "tier"),
                             max_num_batched_tokens=32, max_num_seqs=4)
    with LLM(path, **options) as llm:
        llm.generate(PROMPTS[-1], UNSCORED, use_tqdm=False)
        # What other prompts need of device and host pushes it to the disk.
        for filler in range(8):
            llm.generate([[filler + 5] * 200], GREEDY, use_tqdm=False)
    groups = {file.name.split("-")[0] for file in (tmp_path / "tier").rglob("*.kv")}
    assert groups == ({"0", "1"} if "alternating" in path else {"0"})
    with LLM(path, **options) as llm:
        output, = llm.generate(PROMPTS[-1], UNSCORED, use_tqdm=False)
    assert output.num_cached_tokens > 0
    assert output.outputs[0].token_ids == undisturbed[-1].outputs[0].token_ids
