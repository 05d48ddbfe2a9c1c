"""A frontend's connection to the Head over real sockets of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import time

import msgspec
import pytest

from kvarto.cluster.engine.zmq_hub import ZmqHub
from kvarto.cluster.frontend.client import EngineClient
from kvarto.cluster.frontend.zmq_connection import ZmqConnection
from kvarto.protos.request import Ping, Pong, Query

HOST = "127.0.0.1"
WAIT_S = 3.0


@pytest.fixture
def hub():
    with ZmqHub(HOST) as hub:
        yield hub


def port_of(endpoint):
    return int(endpoint.address.rsplit(":", 1)[1])


class Frontend:
    """A connection whose Head is where `endpoints[-1]` says."""

    def __init__(self, *endpoints):
        self.endpoints, self.lost = list(endpoints), []
        self.client = EngineClient()
        self.client.on_lost = self.lost.append

    async def __aenter__(self):
        async def locate():
            return self.endpoints[-1]

        self.connection = self.client.connection = await ZmqConnection.start(self.client, locate)
        return self

    async def __aexit__(self, *_):
        with contextlib.suppress(Exception):
            await self.connection.close()


async def eventually(condition, timeout_s=WAIT_S):
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "it did not come about in time"
        await asyncio.sleep(0.01)
    return time.monotonic() - started


def answer(hub):
    """Answer what has come from frontends, as a Head does; whether anything had."""
    messages = hub.receive()
    for owner, message in messages:
        if isinstance(message, Ping):
            hub.send(owner, Pong(epoch=1))
    return bool(messages)


def test_a_head_that_answers_makes_the_frontend_ready(hub):
    async def check():
        async with Frontend(hub.frontend_endpoint) as frontend:
            await eventually(lambda: (answer(hub) and False) or frontend.client.last_pong)

    asyncio.run(check())


def test_a_head_that_goes_away_is_noticed_at_once():
    async def check():
        hub = ZmqHub(HOST)
        async with Frontend(hub.frontend_endpoint) as frontend:
            await eventually(lambda: answer(hub))
            hub.close()
            return await eventually(lambda: frontend.lost)

    assert asyncio.run(check()) < 1


def test_a_head_elsewhere_is_connected_to(hub):
    async def check():
        former = ZmqHub(HOST)
        async with Frontend(former.frontend_endpoint) as frontend:
            await eventually(lambda: answer(former))
            frontend.endpoints.append(hub.frontend_endpoint)
            former.close()
            await eventually(lambda: answer(hub))

    asyncio.run(check())


def test_a_head_that_cannot_be_found_yet_is_looked_for_again(hub):
    async def check():
        former = ZmqHub(HOST)
        async with Frontend(former.frontend_endpoint) as frontend:
            await eventually(lambda: answer(former))
            frontend.endpoints.clear()
            former.close()
            await eventually(lambda: frontend.lost)
            await asyncio.sleep(0.4)
            frontend.endpoints.append(hub.frontend_endpoint)
            await eventually(lambda: answer(hub))

    asyncio.run(check())


def test_a_connection_that_broke_while_the_head_lives_is_made_again(hub):
    async def check():
        pipes = []

        async def forward(reader, writer):
            there = await asyncio.open_connection(HOST, port_of(hub.frontend_endpoint))
            pipes.extend([writer, there[1]])
            await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

        async def pump(reader, writer):
            with contextlib.suppress(OSError):
                while data := await reader.read(4096):
                    writer.write(data)

        proxy = await asyncio.start_server(forward, HOST, 0)
        endpoint = msgspec.structs.replace(
            hub.frontend_endpoint, address=f"tcp://{HOST}:{proxy.sockets[0].getsockname()[1]}")
        async with Frontend(endpoint) as frontend:
            await eventually(lambda: answer(hub))
            for writer in pipes:
                writer.close()
            await eventually(lambda: frontend.lost)
            hub.receive()
            try:
                await eventually(lambda: answer(hub), 1.5)
            finally:
                proxy.close()
                for writer in pipes:
                    writer.close()

    asyncio.run(check())


def test_a_defect_on_taking_a_message_is_not_a_silent_end(hub):
    """Requests would wait for ever while health says that all is well."""
    async def check():
        async with Frontend(hub.frontend_endpoint) as frontend:
            await eventually(lambda: answer(hub))
            frontend.client.take = lambda _: 1 / 0
            await eventually(lambda: answer(hub))
            await asyncio.sleep(0.05)
            del frontend.client.take
            hub.receive()
            await eventually(lambda: answer(hub), 1.5)

    asyncio.run(check())


def test_a_message_sent_right_after_the_start_arrives(hub):
    async def check():
        async with Frontend(hub.frontend_endpoint) as frontend:
            frontend.connection.send(Query(query_id=1, what="info"))
            got = []
            await eventually(lambda: got.extend(m for _, m in hub.receive()) or Query(query_id=1, what="info") in got)

    asyncio.run(check())


def test_a_closed_connection_is_not_connected_to_the_head(hub):
    async def check():
        async with Frontend(hub.frontend_endpoint):
            owner = []
            await eventually(lambda: owner.extend(who for who, _ in hub.receive()) or owner)
        await eventually(lambda: not hub.send(owner[0], Pong(epoch=1)))

    asyncio.run(check())
