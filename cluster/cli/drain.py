"""`kvarto drain`: what a pod does before it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import typer

from ...protos.errors import ConfigError, KvartoError, ModelNotFoundError, UnavailableError
from .server_options import DEFAULT_URL, ApiKey

POLL_S = 0.2


def drain(
    url: Annotated[str, typer.Option(help="Address of the server, which must be on this machine.")] = DEFAULT_URL,
    api_key: ApiKey = None,
    worker: Annotated[bool, typer.Option(
        "--worker", help="Only what has ranks on this node of the Ray cluster; --url is not used.")] = False,
    delay: Annotated[float, typer.Option(
        metavar="SECONDS", help="Go on for so long first, until nobody is sent here any more.")] = 0.0,
    timeout: Annotated[float, typer.Option(
        metavar="SECONDS", help="How long running requests may take to finish.")] = 30.0,
) -> None:
    """Have a server take no more requests, and return when those that run have finished.

    Its exit code is 1 when requests are left after the timeout. A drained server stays so: it is to be ended next.
    """
    for name, value in (("delay", delay), ("timeout", timeout)):
        if value < 0:
            raise ConfigError(f"--{name} takes a number of seconds from 0, got {value:g}")
    time.sleep(delay)
    if worker:
        from ..application import drain_this_node

        _drain(drain_this_node, timeout)
    else:
        _drain(_asks_server(url, api_key), timeout)


def _asks_server(url: str, api_key: str | None) -> Callable[[], int]:
    from .server_client import ServerClient

    def ask() -> int:
        with ServerClient(url, api_key) as server:
            try:
                return int(server.post("/drain")["num_unfinished"])
            except ModelNotFoundError as error:  # what a 404 is taken for: Ray Serve has no application there
                raise UnavailableError(error.message) from None

    return ask


def _drain(ask: Callable[[], int], timeout_s: float) -> None:
    """Call `ask`, which drains and says how many requests are left, until there are none. Raises `KvartoError` after
    the timeout."""
    deadline = time.monotonic() + timeout_s
    try:
        left = ask()
        typer.echo(f"draining: {left} requests are left")
        while left and time.monotonic() < deadline:
            time.sleep(POLL_S)
            left = ask()
    except UnavailableError as error:
        # Nobody listens, is up yet, or any longer: whichever it is, no request is running there.
        typer.echo(f"nothing to drain: {error.message}")
        return
    if left:
        raise KvartoError(f"{left} requests did not finish within {timeout_s:g} s")
    # The last deltas still have to reach their clients.
    time.sleep(POLL_S)
    typer.echo("all requests have finished")
