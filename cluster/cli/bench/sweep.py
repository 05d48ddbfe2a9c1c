"""`kvarto bench sweep`: a server at one request rate after another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....protos.config import EngineConfig
from ....protos.errors import ConfigError
from ..options import GivenConfig, takes_config
from ..server_options import ApiKey
from .arrivals import check_rate
from .plot import check_plot, plot_sweep
from .serve import NumRequests, NumWarmUp, Seed, TimeoutS, TraceFile, load_target, raise_for_failures
from .summary import Slo, summarize
from .target import Grpc, GrpcPort, Url, at_server
from .trace import read_trace, rotated

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "rate": "requests/s", "out_tok_per_s": "out tok/s", "normalized_latency_ms": "ms per token",
    "ttft_p50_ms": "TTFT p50", "ttft_p99_ms": "TTFT p99", "itl_p50_ms": "ITL p50", "itl_p99_ms": "ITL p99",
    "num_failed": "failed"}


@takes_config(EngineConfig, model="optional")
def sweep(
    given: GivenConfig,
    trace: TraceFile,
    rates: Annotated[str, typer.Option(metavar="LIST", help="Requests per second, with commas: 0.5,1,2,4.")],
    url: Url = None,
    api_key: ApiKey = None,
    grpc: Grpc = False,
    grpc_port: GrpcPort = 9000,
    num_requests: NumRequests = None,
    num_warm_up: NumWarmUp = 4,
    seed: Seed = 0,
    timeout_s: TimeoutS = 600.0,
    plot: Annotated[Path | None, typer.Option(
        metavar="FILE", show_default=False, help="Draw both curves into this .svg or .png file.")] = None,
) -> None:
    """Measure throughput and normalized latency over the request rate, as figure 12 of the PagedAttention paper.

    Normalized latency is the mean, over requests, of the time from arrival to the end per output token. The same server
    meets every rate, with the same gaps between requests, scaled. Shows a table and prints one JSON line.
    """
    numbers = _numbers(rates)
    if plot is not None:
        check_plot(plot)
    requests = read_trace(trace)[:num_requests]
    points: list[dict[str, Any]] = []
    with at_server(given, url, api_key, grpc, grpc_port) as target:
        for place, rate in enumerate(numbers):
            # Else every rate after the first would find its prompts in the prefix cache.
            outcomes, counts = load_target(target, rotated(requests, place), rate, seed, num_warm_up, timeout_s)
            points.append({"rate": rate, **summarize(outcomes, Slo()), "itl_counts": counts})
    from rich.console import Console

    Console(stderr=True).print(_table(points))
    if plot is not None:
        plot_sweep(points, plot, f"{given.get('model') or url}, {len(requests)} requests a rate")
    typer.echo(json.dumps({"points": points, "seed": seed, "api": "grpc" if grpc else "http"}))
    for point in points:
        raise_for_failures(point)


def _numbers(rates: str) -> list[float]:
    try:
        found = [float(rate) for rate in rates.split(",")]
    except ValueError:
        raise ConfigError(f"--rates takes numbers with commas, such as 0.5,1,2, got '{rates}'") from None
    for rate in found:
        if math.isinf(check_rate(rate)):
            raise ConfigError("--rates has no place for inf: `kvarto bench serve` measures all at once")
    return found


def _table(points: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table()
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for point in points:
        table.add_row(*("" if point[name] is None else f"{point[name]:g}" for name in COLUMNS))
    return table
