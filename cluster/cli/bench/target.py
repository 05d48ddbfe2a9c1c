"""The server that a benchmark is run against: one that runs already, or one that is started for it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol
from urllib.parse import urlsplit

import typer

from ....protos.config import EngineConfig
from ....protos.errors import ConfigError, KvartoError
from ..options import GivenConfig
from .load import StreamClient

Url = Annotated[str | None, typer.Option(
    help="Load the server there instead of starting one; MODEL is then the name that it serves.")]
Grpc = Annotated[bool, typer.Option("--grpc", help="Over gRPC instead of HTTP.")]
GrpcPort = Annotated[int, typer.Option(min=1, max=65535, help="gRPC port of the server at --url.")]


class OpenClient(StreamClient, AbstractAsyncContextManager["OpenClient"], Protocol):
    """A client that has to be entered before use, in the event loop that it is used in."""


@dataclass(frozen=True)
class Target:
    """Where a server is reached."""

    url: str
    model: str | None = None
    api_key: str | None = None
    grpc_address: str | None = None
    """Where it is reached over gRPC instead."""

    def client(self) -> OpenClient:
        if self.grpc_address is not None:
            from ...grpc.client import GrpcClient

            return GrpcClient(self.grpc_address, self.api_key)
        from .http_client import HttpClient

        return HttpClient(self.url, self.api_key, self.model)


@contextmanager
def at_server(
    given: GivenConfig, url: str | None, api_key: str | None, grpc: bool, grpc_port: int,
) -> Generator[Target, None, None]:
    """The server at `url`, or one started with the configuration `given` and ended on leaving.

    Raises `ConfigError` where the options do not go together, and `UnavailableError` and its kin when no
    OpenAI-compatible server answers at `url`.
    """
    if url is None:
        with _started(EngineConfig.parse(given), grpc) as target:
            yield target
        return
    if unused := sorted(given.keys() - {"model"}):
        raise ConfigError(f"{', '.join(unused)} cannot be set with --url: the server there has loaded its model")
    from ..server_client import ServerClient

    with ServerClient(url, api_key) as server:
        models = server.get("/v1/models")
    name = given.get("model") or _first_name(url, models)
    yield Target(url, name, api_key, f"{_host(url)}:{grpc_port}" if grpc else None)


@contextmanager
def _started(config: EngineConfig, grpc: bool) -> Generator[Target, None, None]:
    from rich.console import Console

    from ..server_process import ServerProcess

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        # JSON is YAML too.
        path.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
        with ExitStack() as stack:
            with Console(stderr=True).status(f"starting kvarto serve {config.model}"):
                server = stack.enter_context(ServerProcess(["--config", str(path)]))
            yield Target(server.url, grpc_address=f"127.0.0.1:{server.grpc_port}" if grpc else None)


def _first_name(url: str, models: dict[str, Any]) -> str:
    try:
        return str(models["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise KvartoError(f"{url}/v1/models names no model: is it an OpenAI-compatible server?") from None


def _host(url: str) -> str:
    host = urlsplit(url).hostname or ""
    return f"[{host}]" if ":" in host else host
