"""The Ray Serve application: replicas that answer HTTP, and one that answers gRPC, each a frontend of the Head."""

from __future__ import annotations

import asyncio
import logging
import uuid
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve

from ..protos.config import ServeConfig
from ..protos.endpoint import Endpoint
from ..protos.errors import KvartoError
from ..protos.model import ModelConfig
from .application import end_application, wait_until_ready
from .frontend.async_llm import AsyncLLM
from .grpc.server import GrpcServer
from .head import start_head
from .http.app import create_app
from .http.server import HttpServer
from .launcher.model import load_model_config
from .launcher.on_ray import ON_RAY_HEAD

logger = logging.getLogger(__name__)

MAX_ONGOING_REQUESTS = 100_000
"""The scheduler queues and orders requests; Serve must not do it before."""


class _Replica:
    """Connects to the Head of the application that it is deployed in, starting it if nobody has."""

    def __init__(self, config: ServeConfig, waits: bool) -> None:
        """`waits`: Serve shall not count the replica as running before the model is loaded."""
        self._config = config
        self._waits = waits
        self._application = serve.get_replica_context().app_name
        self._connecting: asyncio.Task[AsyncLLM] | None = None

    async def frontend(self) -> AsyncLLM:
        """The frontend, once the Head is ready. A failed start is raised, and tried again by the next call."""
        if self._connecting is None or (self._connecting.done() and self._connecting.exception()):
            self._connecting = asyncio.create_task(self._connect())
        return await asyncio.shield(self._connecting)

    async def check_health(self) -> None:
        """Called by Serve: once before the replica counts as running, then again and again. Only the first may wait;
        what it raises is what `serve status` says of the application."""
        if self._waits:
            await self.frontend()

    async def _connect(self) -> AsyncLLM:
        model = await asyncio.to_thread(load_model_config, self._config.model)
        head = await asyncio.to_thread(start_head, self._application, self._config, model)
        try:
            await wait_until_ready(head)
        except KvartoError:
            # What a group failed with at its first start does not mend itself in this Head: the next try has a new one.
            await end_application(self._application, head)
            raise
        return await AsyncLLM.connect(self._config, partial(self._locate, model), seed_salt=uuid.uuid4().hex)

    async def _locate(self, model: ModelConfig) -> Endpoint:
        """Where the Head is, which is started if it has ended for good."""
        head = await asyncio.to_thread(start_head, self._application, self._config, model)
        endpoint: Endpoint = await head.endpoint.remote()
        return endpoint


@serve.ingress()
class HttpFrontend(_Replica):
    """The OpenAI-compatible API."""

    def __init__(self, config: ServeConfig, waits: bool, *_: Any) -> None:
        """What follows `waits` are deployments that only have to exist."""
        super().__init__(config, waits)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.frontend, self._config)


class HttpPortFrontend(_Replica):
    """The OpenAI-compatible API, on a port of its own: without Serve's proxy, which costs more than the API itself."""

    def __init__(self, config: ServeConfig, waits: bool, *_: Any) -> None:
        """What follows `waits` are deployments that only have to exist."""
        super().__init__(config, waits)
        self._server = HttpServer(self.frontend, config)
        self._starting = asyncio.create_task(self._server.start())

    async def check_health(self) -> None:
        """As `_Replica.check_health`; and Serve replaces a replica whose server has ended."""
        await super().check_health()
        self._server.check()

    async def port(self) -> int:
        """The port in use, once the server listens. Raises `ResourcesError` when it cannot."""
        return await asyncio.shield(self._starting)


class GrpcFrontend(_Replica):
    """The gRPC API, on a port of its own."""

    def __init__(self, config: ServeConfig, waits: bool) -> None:
        super().__init__(config, waits)
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> int:
        while True:
            try:
                frontend = await self.frontend()
            except KvartoError as error:
                logger.warning("no gRPC yet: %s", error.message)
                await asyncio.sleep(1.0)
                continue
            self._server = GrpcServer(frontend, self._config)
            return await self._server.start()

    async def check_health(self) -> None:
        """As `_Replica.check_health`, and with the port."""
        if self._waits:
            await self.port()

    async def port(self) -> int:
        """The port in use, once the server listens. Raises `ResourcesError` when it cannot."""
        return await asyncio.shield(self._serving)


def build_app(args: ServeConfig | dict[str, Any]) -> serve.Application:
    """The application of a Ray Serve config file (`import_path: kvarto:build_app`); `args` are the fields of
    `ServeConfig`. Deployed from such a file it is DEPLOYING until the model is loaded: who moves traffic to it when it
    is RUNNING, as KubeRay does, then does so in time. Raises `ConfigError`."""
    # Serve takes a builder of exactly one parameter.
    if isinstance(args, ServeConfig):
        return application(args)
    return application(ServeConfig.parse(dict(args)), waits=True)


def application(config: ServeConfig, *, waits: bool = False, behind_proxy: bool = True) -> serve.Application:
    """HTTP comes through Serve's proxies, or without them to the one replica that then listens itself. `waits`: it is
    not running before the model is loaded."""
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "graceful_shutdown_wait_loop_s": 0.2, "graceful_shutdown_timeout_s": config.drain_timeout_s + 5}
    others = []
    if config.grpc_port is not None:
        # Its port is its own: clients must know the node.
        on_head = {**options["ray_actor_options"], "resources": ON_RAY_HEAD}
        grpc: Any = serve.deployment(GrpcFrontend, name="grpc", **{**options, "ray_actor_options": on_head})
        others.append(grpc.bind(config, waits))
    frontend = HttpFrontend if behind_proxy else HttpPortFrontend
    http: Any = serve.deployment(frontend, name="http", num_replicas=config.num_frontends, **options)
    app: serve.Application = http.bind(config, waits, *others)
    return app
