"""`kvarto bench serve`: a trace against a server, at a rate."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ....protos.config import EngineConfig
from ....protos.errors import ConfigError, KvartoError
from ..options import GivenConfig, takes_config
from ..server_options import ApiKey
from .arrivals import check_rate, poisson_arrivals
from .load import run_load
from .outcome import Outcome
from .summary import Slo, summarize
from .target import Grpc, GrpcPort, Target, Url, at_server
from .trace import TraceRequest, read_trace

TraceFile = Annotated[Path, typer.Option(
    metavar="FILE", help='JSON list of {"prompt": [token ids], "output_len": n}.')]
NumRequests = Annotated[int | None, typer.Option(
    min=1, show_default=False, help="Only so many of the trace's requests, its first; default: all.")]
NumWarmUp = Annotated[int, typer.Option(
    min=0, help="Requests sent first and not counted: the trace's, their prompts backwards, so that no cache helps.")]
Seed = Annotated[int, typer.Option(help="Of the arrivals.")]
TimeoutS = Annotated[float, typer.Option(metavar="SECONDS", help="A request that takes longer has failed.")]
SloTtftMs = Annotated[float | None, typer.Option(
    metavar="MS", show_default=False, help="Objective: the first token within so long.")]
SloItlMs = Annotated[float | None, typer.Option(
    metavar="MS", show_default=False, help="Objective: at most so long per further token, on average of a request.")]


@takes_config(EngineConfig, model="optional")
def serve(
    given: GivenConfig,
    trace: TraceFile,
    rate: Annotated[float, typer.Option(
        metavar="NUMBER", help="Requests per second, as a Poisson process; inf: all at once.")] = math.inf,
    url: Url = None,
    api_key: ApiKey = None,
    grpc: Grpc = False,
    grpc_port: GrpcPort = 9000,
    num_requests: NumRequests = None,
    num_warm_up: NumWarmUp = 4,
    seed: Seed = 0,
    timeout_s: TimeoutS = 600.0,
    slo_ttft_ms: SloTtftMs = None,
    slo_itl_ms: SloItlMs = None,
) -> None:
    """Load a server with a trace, streaming, and measure what its clients see.

    The server is one that is started with MODEL and ended, or any OpenAI-compatible one at --url. Prints the time to
    the first token (TTFT) from when a request was due, the latency between tokens (ITL), output tokens per second,
    failures, and the share of requests within the objectives. Ends with an error when a request failed.
    """
    check_rate(rate)
    slo = Slo(_bound(slo_ttft_ms, "--slo-ttft-ms"), _bound(slo_itl_ms, "--slo-itl-ms"))
    requests = read_trace(trace)[:num_requests]
    with at_server(given, url, api_key, grpc, grpc_port) as target:
        outcomes, counts = load_target(target, requests, rate, seed, num_warm_up, timeout_s)
    report = {**summarize(outcomes, slo), "itl_counts": counts, "rate": None if math.isinf(rate) else rate,
              "seed": seed, "api": "grpc" if grpc else "http"}
    typer.echo(json.dumps(report))
    raise_for_failures(report)


def load_target(
    target: Target, requests: Sequence[TraceRequest], rate: float, seed: int, num_warm_up: int, timeout_s: float,
) -> tuple[list[Outcome], str]:
    """The outcomes of `requests` at `rate`, after a warm-up, with a progress bar on a terminal; and whether the server
    said how many `tokens` a piece holds, or each counted as one (`pieces`)."""
    return asyncio.run(_load(target, requests, rate, seed, num_warm_up, timeout_s))


def raise_for_failures(report: dict[str, Any]) -> None:
    """Raises `KvartoError` when requests failed, with the commonest reason."""
    if report["num_failed"]:
        reason = next(iter(report["failures"]))
        raise KvartoError(f"{report['num_failed']} of {report['num_requests']} requests failed, most of them with: "
                          f"{reason}")


async def _load(
    target: Target, requests: Sequence[TraceRequest], rate: float, seed: int, num_warm_up: int, timeout_s: float,
) -> tuple[list[Outcome], str]:
    from rich.console import Console
    from rich.progress import Progress

    warm_up = [TraceRequest(request.prompt[::-1], request.output_len) for request in requests[:num_warm_up]]
    console = Console(stderr=True)
    async with target.client() as client:
        await run_load(client, warm_up, [0.0] * len(warm_up), timeout_s)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("requests", total=len(requests))
            outcomes = await run_load(client, requests, poisson_arrivals(rate, len(requests), seed), timeout_s,
                                      lambda: progress.advance(task))
        return outcomes, "pieces" if client.counts_pieces else "tokens"


def _bound(milliseconds: float | None, option: str) -> float | None:
    if milliseconds is not None and not 0 < milliseconds < math.inf:
        raise ConfigError(f"{option} takes milliseconds above 0, got {milliseconds:g}")
    return milliseconds
