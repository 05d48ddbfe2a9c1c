"""Greedy tokens in float32 are Transformers' own: 32 prompts of 3 to 900 tokens, 64 tokens each, however they are run.

The cases cover every value of every option with all prompts; their full product would take an hour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvarto import LLM, SamplingParams

TOKENS_PER_DIFFERENCE = 2000
"""At most one token in so many may differ, and one in a run of fewer."""
FEW_BLOCKS = 100
"""Of 16 tokens: the longest sequence alone takes 61."""

# The first test of a session may have to compute the oracle's tokens.
pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    """One prompt at a time instead of all in one batch."""
    every: int = 1
    """Of so many prompts, one: where another case runs them all the same way but for the processes."""

    @property
    def preempts(self) -> bool:
        return "num_blocks" in self.options


def case(name: str, *, alone: bool = False, every: int = 1, slow: bool = True, **options: Any) -> Any:
    return pytest.param(Case(options, alone, every), id=name, marks=[pytest.mark.slow] if slow else [])


INLINE: dict[str, Any] = {"executor": "inline"}
RAY: dict[str, Any] = {"executor": "ray"}
CASES = [
    case("inline-block16", block_size=16, slow=False),
    case("inline-block64", block_size=64, slow=False),
    case("inline-alone", alone=True),
    case("inline-chunked", max_num_batched_tokens=64),
    case("inline-few-blocks", num_blocks=FEW_BLOCKS),
    case("inline-tp2-few-blocks", tensor_parallel_size=2, num_blocks=FEW_BLOCKS, **INLINE),
    case("inline-tp3-chunked", tensor_parallel_size=3, max_num_batched_tokens=64, **INLINE),
    case("inline-tp4-block64", tensor_parallel_size=4, block_size=64, **INLINE),
    case("ray-tp1", tensor_parallel_size=1, **RAY),
    case("ray-tp2-few-blocks", tensor_parallel_size=2, num_blocks=FEW_BLOCKS, **RAY),
    case("ray-tp2-alone", tensor_parallel_size=2, alone=True, every=4, **RAY),
    case("ray-tp3", tensor_parallel_size=3, **RAY),
    case("ray-tp4-block64-chunked", tensor_parallel_size=4, block_size=64, max_num_batched_tokens=64, **RAY),
]


@dataclass(frozen=True)
class Run:
    case: Case
    prompts: list[Any]
    tokens: list[list[int]]
    status: dict[str, Any]


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, model_path: str, prompts: list[Any], settled_status: Any) -> Iterator[Run]:
    """What one configuration generated, and the state that it left."""
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    config: Case = request.param
    # The last one, the longest, is always among them.
    chosen = prompts[config.every - 1::config.every]
    batch = [list(prompt.token_ids) for prompt in chosen]
    with LLM(model_path, dtype="float32", **config.options) as llm:
        if config.alone:
            outputs = [llm.generate(token_ids, params, use_tqdm=False)[0] for token_ids in batch]
        else:
            outputs = llm.generate(batch, params, use_tqdm=False)
        yield Run(config, chosen, [output.outputs[0].token_ids for output in outputs], settled_status(llm))


def test_tokens_are_those_of_transformers(
    run: Run, oracle: Any, record_property: Callable[[str, object], None],
) -> None:
    """Up to ties of the two best logits, of which there are few; each is listed."""
    differences = [
        difference for prompt, tokens in zip(run.prompts, run.tokens, strict=True)
        for difference in oracle.differences(prompt, tokens)]
    num_tokens = sum(map(len, run.tokens))
    for line in [f"{len(differences)} of {num_tokens} tokens differ", *map(str, differences)]:
        print(line)
        record_property("parity", line)
    assert not [str(difference) for difference in differences if not difference.is_tie]
    assert len(differences) <= max(1, num_tokens // TOKENS_PER_DIFFERENCE)


def test_few_blocks_mean_preemption(run: Run) -> None:
    assert (run.status["num_preemptions"] > 0) == run.case.preempts


def test_all_blocks_are_free_afterwards(run: Run) -> None:
    blocks = run.status["blocks"]
    assert blocks["free"] + blocks["cached"] == blocks["total"]


def test_prompts_are_32_from_3_to_900_tokens(prompts: list[Any]) -> None:
    lengths = sorted(len(prompt.token_ids) for prompt in prompts)
    assert (len(lengths), lengths[0], lengths[-1]) == (32, 3, 900)
