"""`kvarto bench latency`: one request at a time."""

from __future__ import annotations

import json
import random
import statistics
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ....protos.config import EngineConfig
from ..options import GivenConfig, takes_config

if TYPE_CHECKING:
    from ...frontend.async_llm import AsyncLLM

WARM_UP_OUTPUT_LEN = 2


@takes_config(EngineConfig, model="flag")
def latency(
    given: GivenConfig,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    num_iters: Annotated[int, typer.Option(min=1, help="Requests, one after the other; medians are shown.")] = 3,
) -> None:
    """Measure the time to the first token (TTFT) and per further token (TPOT) of a single stream."""
    config = EngineConfig.parse(given)
    from ..local_model import LocalModel

    with LocalModel(config) as model:
        model.run(_measure(model.frontend, 0, input_len, WARM_UP_OUTPUT_LEN))
        runs = [model.run(_measure(model.frontend, number, input_len, output_len))
                for number in range(1, num_iters + 1)]
    ttft_s, tpot_s = (statistics.median(column) for column in zip(*runs, strict=True))
    typer.echo(json.dumps({
        "ttft_ms": round(1e3 * ttft_s, 3), "tpot_ms": round(1e3 * tpot_s, 3), "input_len": input_len,
        "output_len": output_len, "num_iters": num_iters}))


async def _measure(frontend: AsyncLLM, number: int, input_len: int, output_len: int) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds: arrival to first token, and (E2E - TTFT) / (output_len - 1)."""
    from ....protos.sampling import SamplingParams

    # Prompts without a common beginning, so that no prefix cache helps.
    prompt = random.Random(number).choices(range(frontend.info.vocab_size), k=input_len)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    arrived = time.perf_counter()
    first = None
    async for chunk in frontend.stream(prompt, params):
        if first is None and chunk.token_ids:
            first = time.perf_counter()
    last = time.perf_counter()
    assert first is not None, "a request that ends well has a first token"
    return first - arrived, (last - first) / (output_len - 1)
