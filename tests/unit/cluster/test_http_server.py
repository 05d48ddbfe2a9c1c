"""The HTTP server on a port of its own, asked through real sockets."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from pathlib import Path

import httpx
import pytest

from kvarto.cluster.http.server import HttpServer
from kvarto.protos.config import ServeConfig
from kvarto.protos.errors import ResourcesError, UnavailableError

_spec = importlib.util.spec_from_file_location("http_fake", Path(__file__).with_name("http_fake.py"))
assert _spec and _spec.loader
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)


def server(port=0):
    async def frontend():
        return fakes.FakeFrontend()

    return HttpServer(frontend, ServeConfig(model="m", port=port, grpc_port=None))


def test_it_answers_on_the_port_that_it_names():
    async def run():
        port = await server().start()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            return await client.get("/health/live")

    assert asyncio.run(run()).status_code == 200


def test_a_port_that_is_taken_is_refused_with_what_to_do():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(ResourcesError, match=r"cannot listen on 127\.0\.0\.1.*choose another with port") as caught:
            asyncio.run(server(holder.getsockname()[1]).start())
    assert caught.value.param == "port"


def test_a_server_that_has_ended_is_not_healthy():
    async def run():
        made = server()
        await made.start()
        made.check()
        [serving] = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        serving.cancel()
        await asyncio.wait([serving])
        with pytest.raises(UnavailableError, match="has ended"):
            made.check()

    asyncio.run(run())
