"""`kvarto bench`: how fast the engine is on this machine, each benchmark as one JSON line on stdout."""

from __future__ import annotations

import typer

from .latency import latency
from .prefix import prefix
from .sampling import sampling
from .serve import serve
from .sweep import sweep
from .throughput import throughput

bench = typer.Typer(
    no_args_is_help=True, help="Measure throughput, latency, and what sharing saves; each prints one JSON line.")
bench.command()(throughput)
bench.command()(latency)
bench.command()(serve)
bench.command()(sweep)
bench.command()(prefix)
bench.command()(sampling)
