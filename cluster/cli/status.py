"""`kvarto status`: what a running server does, for people."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...protos.errors import KvartoError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

DEFAULT_URL = "http://127.0.0.1:8000"
BAR_WIDTH = 12
UNAVAILABLE = 503


def status(
    url: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_URL,
    api_key: Annotated[str | None, typer.Option(
        envvar="KVARTO_API_KEY", show_default=False, help="Key that the server asks for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the server says, as JSON.")] = False,
) -> None:
    """Show how a running server fares."""
    from .server_client import ServerClient

    with ServerClient(url, api_key) as server:
        # Not ready is an answer here, not a failure.
        health = server.get("/health/ready", accept=(UNAVAILABLE,))
        state = server.get("/v1/status")
    if as_json:
        typer.echo(json.dumps({"health": health, **state}))
        return
    try:
        _print(url, health, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise KvartoError(f"the server at {url} describes itself otherwise than this version of kvarto expects: is it "
                          f"of another version? ({type(error).__name__}: {error})") from error


def _print(url: str, health: dict[str, Any], state: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    info = state["info"]
    console = Console(highlight=False)
    readiness = ("ready", "green") if health["ready"] else (f"not ready: {health['reason']}", "red")
    title = Text.assemble(f"{url}: ", readiness)
    if state["draining"]:
        title.append(", draining", "yellow")
    console.print(title)
    console.print(_groups(state))
    console.print(
        f"each group: {info['kv_capacity_tokens']:,} tokens of KV cache in {info['num_blocks']:,} blocks of "
        f"{info['block_size']}; at most {info['max_num_seqs']:,} sequences, {info['max_model_len']:,} tokens each")
    console.print(f"tp_size {info['tp_size']}, {info['dtype']}, kernels {info['kernels']}")


def _groups(state: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    # Narrow: seven columns fit a terminal of 80.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("group", "epoch", "running", "waiting", "preempted"):
        table.add_column(heading, justify="right")
    table.add_column("blocks in use")
    table.add_column("waste", justify="right")
    for index in map(str, range(state["num_groups"])):
        group = state["groups"].get(index)
        if group is None:
            table.add_row(index, "[red]down[/red]")
            continue
        counts = [str(group[key]) for key in ("epoch", "num_running", "num_waiting", "num_preemptions")]
        table.add_row(index, *counts, _bar(group["blocks"]), f"{group['kv_waste']:.1%}")
    return table


def _bar(blocks: dict[str, int]) -> Text:
    """Used and releasing blocks out of all."""
    from rich.text import Text

    total, used = blocks["total"], blocks["used"]
    # Rounded up, so that a few blocks of many are seen.
    used_end, releasing_end = (math.ceil(BAR_WIDTH * count / total) for count in (used, used + blocks["releasing"]))
    return Text.assemble(
        ("█" * used_end, "cyan"), ("▓" * (releasing_end - used_end), "yellow"),
        ("░" * (BAR_WIDTH - releasing_end), "dim"), f" {used:,}/{total:,}")
