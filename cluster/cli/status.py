"""`kvarto status`: what a running server does, for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from time import sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...protos.errors import ConfigError, KvartoError, ModelNotFoundError
from .server_options import DEFAULT_URL, ApiKey

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    from .server_client import ServerClient

BAR_WIDTH = 12
UNAVAILABLE = 503
MIN_WATCH_S, MAX_WATCH_S = 0.1, 3600.0


def status(
    url: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_URL,
    api_key: ApiKey = None,
    blocks: Annotated[bool, typer.Option(
        "--blocks", help="Draw the blocks of the KV cache, and whose they are.")] = False,
    watch: Annotated[float | None, typer.Option(
        metavar="SECONDS", help="Look again at this interval, until Ctrl-C.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the server says, as JSON.")] = False,
) -> None:
    """Show how a running server fares."""
    if watch is not None and not MIN_WATCH_S <= watch <= MAX_WATCH_S:
        raise ConfigError(f"--watch takes {MIN_WATCH_S:g} to {MAX_WATCH_S:g} seconds, got {watch:g}")
    from .server_client import ServerClient

    with ServerClient(url, api_key) as server:
        if as_json:
            _repeat(lambda: typer.echo(json.dumps(_blocks(server, url) if blocks else _state(server))), watch)
        else:
            _show(lambda console: _picture(server, url, blocks, console), watch)


def _state(server: ServerClient) -> dict[str, Any]:
    # Not ready is an answer here, not a failure.
    health = server.get("/health/ready", accept=(UNAVAILABLE,))
    return {"health": health, **server.get("/v1/status")}


def _blocks(server: ServerClient, url: str) -> dict[str, Any]:
    try:
        return server.get("/v1/blocks")
    except ModelNotFoundError:  # what a 404 is taken for
        raise KvartoError(f"the server at {url} has no block map: is it of an older version of kvarto?") from None


def _repeat(act: Callable[[], None], watch: float | None) -> None:
    """Once, or every `watch` seconds until Ctrl-C, which is then no failure."""
    try:
        act()
        while watch is not None:
            sleep(watch)
            act()
    except KeyboardInterrupt:
        if watch is None:
            raise


def _show(picture: Callable[[Console], Group], watch: float | None) -> None:
    """Print what `picture` draws; where it is watched on a screen, each in place of the one before."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if watch is None or not console.is_terminal or console.is_dumb_terminal:
        _repeat(lambda: console.print(picture(console)), watch)
        return
    with Live(console=console, auto_refresh=False) as live:
        _repeat(lambda: live.update(picture(console), refresh=True), watch)


def _picture(server: ServerClient, url: str, blocks: bool, console: Console) -> Group:
    from rich.console import Group
    from rich.text import Text

    from .block_map import draw

    state = _blocks(server, url) if blocks else _state(server)
    try:
        if blocks:
            return Group(Text(url), draw(state, console.width, console.height - 1))
        return Group(_title(url, state), _groups(state), _capacity(state["info"]))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise KvartoError(f"the server at {url} describes itself otherwise than this version of kvarto expects: is it "
                          f"of another version? ({type(error).__name__}: {error})") from error


def _title(url: str, state: dict[str, Any]) -> Text:
    from rich.text import Text

    health = state["health"]
    title = Text.assemble(
        f"{url}: ", ("ready", "green") if health["ready"] else (f"not ready: {health['reason']}", "red"))
    return title.append(", draining", "yellow") if state["draining"] else title


def _capacity(info: dict[str, Any]) -> Text:
    from rich.text import Text

    blocks = " + ".join(f"{pool['num_blocks']:,}" for pool in info["kv_pools"])
    weights = "" if info["quantization"] == "none" else f" (weights {info['quantization']})"
    return Text(
        f"each group: {info['kv_capacity_tokens']:,} tokens of KV cache ({info['kv_cache_dtype']}) in {blocks} blocks "
        f"of {info['block_size']}; at most {info['max_num_seqs']:,} sequences, {info['max_model_len']:,} tokens each\n"
        f"tp_size {info['tp_size']}, {info['dtype']}{weights}, kernels {info['kernels']}, "
        f"collectives {info['collectives']}")


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
