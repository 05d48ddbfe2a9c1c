"""`kvarto bench throughput`: a trace, all requests at once."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....protos.config import EngineConfig
from ....protos.errors import ConfigError
from ..options import GivenConfig, takes_config
from .profile import Profile
from .trace import TraceRequest, read_trace

if TYPE_CHECKING:
    from ...frontend.llm import LLM

NUM_WARM_UP = 4
"""Requests that are run first and not counted: threads, buffers and the allocator settle."""

_COUNTERS = ("slots_used", "slots_allocated", "num_preemptions")


@takes_config(EngineConfig, model="flag")
def throughput(
    given: GivenConfig,
    trace: Annotated[Path, typer.Option(
        metavar="FILE", help='JSON list of {"prompt": [token ids], "output_len": n}.')],
    profile: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Write a Chrome trace of the run, and print the shares of its parts.")] = None,
) -> None:
    """Replay a trace with all of its requests at once, greedily and past the end of sequence.

    Prints output and total tokens per second, seconds, start-up seconds, the share of KV slots that were allocated and
    not used, and preemptions; with --profile the share of the time that each part of the engine took.
    """
    config = EngineConfig.parse(given)
    if profile is not None and config.on_ray:
        raise ConfigError("--profile listens in this process alone: give it --executor inline too", param="profile")
    requests = read_trace(trace)
    # The clock starts before the imports: they are a part of what a user waits for.
    started = time.perf_counter()
    from ...frontend.llm import LLM

    with LLM(**config.model_dump(exclude_unset=True)) as llm:
        start_s = time.perf_counter() - started
        result = _measure(llm, requests, profile)
    typer.echo(json.dumps({**result, "start_s": round(start_s, 3)}))


def _measure(llm: LLM, requests: Sequence[TraceRequest], trace_file: Path | None) -> dict[str, Any]:
    _run(llm, requests[:NUM_WARM_UP], show_progress=False)
    before = _counters(llm)
    profile = Profile()
    with profile if trace_file is not None else contextlib.nullcontext():
        started = time.perf_counter()
        num_out = _run(llm, requests, show_progress=True)
        seconds = time.perf_counter() - started
    shares = {}
    if trace_file is not None:
        profile.write_chrome_trace(trace_file)
        shares = {"profile": profile.shares(seconds)}
    used, allocated, num_preemptions = (now - then for now, then in zip(_counters(llm), before, strict=True))
    num_in = sum(len(request.prompt) for request in requests)
    return {
        "out_tok_per_s": round(num_out / seconds, 2),
        "total_tok_per_s": round((num_in + num_out) / seconds, 2),
        "seconds": round(seconds, 6),
        "num_requests": len(requests),
        "kv_waste": round(1 - used / allocated, 5),
        "num_preemptions": num_preemptions,
        **shares,
    }


def _run(llm: LLM, requests: Sequence[TraceRequest], *, show_progress: bool) -> int:
    """Returns the number of tokens generated."""
    from ....protos.sampling import SamplingParams

    outputs = llm.generate(
        [request.prompt for request in requests],
        [SamplingParams(temperature=0, max_tokens=request.output_len, ignore_eos=True) for request in requests],
        use_tqdm=show_progress)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def _counters(llm: LLM) -> list[int]:
    """Sums since the start, over all worker groups."""
    groups = llm.status()["groups"].values()
    return [sum(group[name] for group in groups) for name in _COUNTERS]
