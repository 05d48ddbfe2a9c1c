"""A response of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .disconnect import while_connected
from .errors import describe, error_response, logger

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def event(body: msgspec.Struct) -> bytes:
    """One event. JSON has no line breaks of its own, so that it is one `data:` line."""
    return b"data: " + _encode(body) + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields, in one write each, and closes it as soon as the client goes away.

    The status is sent with the first event: a failure before that is answered by its own status. A later one becomes
    an `error` event, on which the openai client raises, and no `[DONE]` follows.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        try:
            await while_connected(receive, self._respond(scope, receive, send))
        except ClientDisconnect:
            logger.debug("a client left its stream")

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                first = await anext(events)
            except Exception as error:
                await error_response(error)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _write(send, first)
            async for data in _ending_in_an_event(events):
                await _write(send, data)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _write(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _ending_in_an_event(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for data in events:
            yield data
    except Exception as error:
        yield event(describe(error)[1])
