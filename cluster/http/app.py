"""The HTTP application: which path is answered by what."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...protos.config import ServeConfig
from ..frontend_protocol import Frontend, Health
from .auth import check_bearer
from .chat import chat
from .completions import complete
from .drain import check_may_drain
from .errors import OpenAIRoute, json_response, on_http_exception
from .models import check_model, model_entry
from .replies import ModelList
from .source import FrontendSource

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(get_frontend: Callable[[], Awaitable[Frontend]], config: ServeConfig) -> FastAPI:
    """The app, for Ray Serve's ingress or any ASGI server. `get_frontend` is first called by the first request, and
    may take its time; it should be cheap once the frontend is there."""
    source = FrontendSource(get_frontend)
    app = FastAPI(title="kvarto", openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.include_router(_v1(source, config))
    app.include_router(_operations(source, config))
    return app


def _v1(source: FrontendSource, config: ServeConfig) -> APIRouter:
    async def require_key(request: Request) -> None:
        if config.api_key is not None:
            check_bearer(request.headers.get("authorization", "").encode("latin-1"), config.api_key)

    # The key is checked on the routes: a middleware that compared paths would miss them behind a route prefix.
    router = APIRouter(prefix="/v1", route_class=OpenAIRoute, dependencies=[Depends(require_key)])
    created = int(time.time())

    @router.get("/models")
    async def models() -> Response:
        return json_response(ModelList([model_entry(await source.get(), created)]))

    # A name may hold slashes: it is often a path or a hub id.
    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(name, config)
        return json_response(model_entry(await source.get(), created))

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        return await complete(request, await source.get())

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await chat(request, await source.get())

    @router.get("/status")
    async def status() -> Response:
        return JSONResponse(await (await source.get()).status())

    @router.get("/blocks")
    async def blocks() -> Response:
        return JSONResponse(await (await source.get()).blocks())

    return router


def _operations(source: FrontendSource, config: ServeConfig) -> APIRouter:
    router = APIRouter(route_class=OpenAIRoute)

    @router.get("/health/live")
    async def live() -> Response:
        health = await source.health()
        return _health_response(health.live, health)

    @router.get("/health")
    @router.get("/health/ready")
    async def ready() -> Response:
        health = await source.health()
        return _health_response(health.ready, health)

    @router.post("/drain")
    async def drain(request: Request) -> Response:
        check_may_drain(request, config.api_key)
        return JSONResponse({"num_unfinished": await (await source.get_soon()).drain()})

    @router.get("/version")
    async def version_() -> Response:
        return JSONResponse({"version": _version()})

    @router.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(await (await source.get()).metrics(), headers={"Content-Type": METRICS_TYPE})

    return router


def _health_response(good: bool, health: Health) -> Response:
    body = {"live": health.live, "ready": health.ready, "reason": health.reason}
    return JSONResponse(body, 200 if good else 503)


def _version() -> str:
    try:
        return version("kvarto")
    except PackageNotFoundError:
        return "0+uninstalled"  # run from a checkout
