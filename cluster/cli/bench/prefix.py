"""`kvarto bench prefix`: what the prefix cache saves when prompts begin alike."""

from __future__ import annotations

import json
import random
import statistics
from typing import Annotated

import typer

from ....protos.config import EngineConfig
from ....protos.errors import ConfigError
from ..options import GivenConfig, takes_config
from .offline import NumRounds, counter, random_prompts, seconds_of, vocab_size

WARM_UP = "warm-up"


@takes_config(EngineConfig, model="flag")
def prefix(
    given: GivenConfig,
    prefix_len: Annotated[int, typer.Option(
        min=1, help="Tokens that all prompts of a round share, as a system prompt.")] = 341,
    own_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt after them.")] = 30,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate for each.")] = 30,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    num_rounds: NumRounds = 3,
) -> None:
    """Measure requests that share a beginning, with the prefix cache and without.

    One engine after the other in this process, on the same prompts; a round's prefix has not been seen before it.
    Prints output tokens per second of both, and the share of prompt tokens that were found in the cache.
    """
    if "enable_prefix_caching" in given:
        raise ConfigError("enable_prefix_caching cannot be set here: both ways are measured")
    config = EngineConfig.parse(given)
    lengths = prefix_len, own_len, output_len
    without, _ = _measure(config, False, num_requests, num_rounds, *lengths)
    with_cache, hit_share = _measure(config, True, num_requests, num_rounds, *lengths)
    num_out = num_requests * output_len
    typer.echo(json.dumps({
        "out_tok_per_s_with": round(num_out / with_cache, 2), "out_tok_per_s_without": round(num_out / without, 2),
        "speedup": round(without / with_cache, 3), "hit_share": round(hit_share, 5), "prefix_len": prefix_len,
        "own_len": own_len, "output_len": output_len, "num_requests": num_requests, "num_rounds": num_rounds}))


def _measure(config: EngineConfig, caching: bool, num_requests: int, num_rounds: int, prefix_len: int, own_len: int,
             output_len: int) -> tuple[float, float]:
    """(median seconds of a round, share of prompt tokens found in the cache)."""
    from ....protos.sampling import SamplingParams
    from ...frontend.llm import LLM

    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    options = {**config.model_dump(exclude_unset=True), "enable_prefix_caching": caching}
    with LLM(**options) as llm:

        def prompts(name: str, count: int) -> list[list[int]]:
            rng, size = random.Random(name), vocab_size(llm)
            [shared] = random_prompts(rng, size, 1, prefix_len)
            return [shared + own for own in random_prompts(rng, size, count, own_len)]

        seconds_of(llm, prompts(WARM_UP, min(4, num_requests)), params, show_progress=False)
        hits = counter(llm, "prefix_hit_tokens")
        seconds = [seconds_of(llm, prompts(f"round {number}", num_requests), params, show_progress=True)
                   for number in range(num_rounds)]
        hits = counter(llm, "prefix_hit_tokens") - hits
    return statistics.median(seconds), hits / (num_rounds * num_requests * (prefix_len + own_len))
