"""`kvarto bench sampling`: what sharing saves when one prompt has several sequences."""

from __future__ import annotations

import json
import random
import statistics
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....protos.config import EngineConfig
from ....protos.errors import ConfigError
from ..options import GivenConfig, takes_config
from .offline import NumRounds, counter, random_prompts, seconds_of, vocab_size

if TYPE_CHECKING:
    from ....protos.sampling import SamplingParams
    from ...frontend.llm import LLM


@takes_config(EngineConfig, model="flag")
def sampling(
    given: GivenConfig,
    n: Annotated[int, typer.Option(min=2, help="Parallel samples of each prompt.")] = 4,
    beam_width: Annotated[int, typer.Option(min=2, help="Beams of each prompt.")] = 4,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate for each sequence.")] = 64,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    num_rounds: NumRounds = 3,
) -> None:
    """Measure parallel sampling and beam search against as many single requests that share nothing.

    All in one engine in this process, without the prefix cache. Prints tokens per second of all sequences, both ways,
    and the share of blocks that sharing saves, over all steps.
    """
    if "enable_prefix_caching" in given:
        raise ConfigError("enable_prefix_caching cannot be set here: only what one request's sequences share counts")
    config = EngineConfig.parse(given)
    from ....protos.sampling import SamplingParams
    from ...frontend.llm import LLM

    common: dict[str, Any] = {"max_tokens": output_len, "ignore_eos": True}
    parallel = SamplingParams(n=n, temperature=1, seed=0, **common), SamplingParams(temperature=1, seed=0, **common)
    beams = SamplingParams(beam_width=beam_width, **common), SamplingParams(temperature=0, **common)
    with LLM(**{**config.model_dump(exclude_unset=True), "enable_prefix_caching": False}) as llm:
        shape = input_len, output_len, num_requests, num_rounds
        report = {"parallel": _measure(llm, *parallel, n, *shape), "beams": _measure(llm, *beams, beam_width, *shape)}
    typer.echo(json.dumps({
        **report, "n": n, "beam_width": beam_width, "input_len": input_len, "output_len": output_len,
        "num_requests": num_requests, "num_rounds": num_rounds}))


def _measure(llm: LLM, together: SamplingParams, alone: SamplingParams, width: int, input_len: int, output_len: int,
             num_requests: int, num_rounds: int) -> dict[str, Any]:
    """`width` sequences of each prompt in one request, against `width` requests of each prompt."""
    seconds: dict[str, list[float]] = {"together": [], "alone": []}
    blocks = entries = 0
    rng, size = random.Random(width), vocab_size(llm)
    warm_up = random_prompts(rng, size, 1, input_len)
    for params in (together, alone):
        seconds_of(llm, warm_up, params, show_progress=False)
    for _ in range(num_rounds):
        prompts = random_prompts(rng, size, num_requests, input_len)
        had = counter(llm, "blocks_used"), counter(llm, "table_entries")
        seconds["together"].append(seconds_of(llm, prompts, together, show_progress=True))
        blocks += counter(llm, "blocks_used") - had[0]
        entries += counter(llm, "table_entries") - had[1]
        seconds["alone"].append(seconds_of(
            llm, [prompt for prompt in prompts for _ in range(width)], alone, show_progress=True))
    num_out = num_requests * width * output_len
    shared, unshared = (statistics.median(values) for values in seconds.values())
    return {"tok_per_s_shared": round(num_out / shared, 2), "tok_per_s_unshared": round(num_out / unshared, 2),
            "speedup": round(unshared / shared, 3), "blocks_saved": round(1 - blocks / entries, 5)}
