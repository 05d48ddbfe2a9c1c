"""The frontend with a connection whose other end is the test."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

from kvarto.cluster.frontend.async_llm import AsyncLLM
from kvarto.cluster.frontend.client import EngineClient
from kvarto.protos.config import ServeConfig
from kvarto.protos.errors import KvartoError
from kvarto.protos.request import Delta, DeltaBatch, Pong
from kvarto.protos.sampling import SamplingParams

_spec = importlib.util.spec_from_file_location("engine_fake", Path(__file__).with_name("engine_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


class ByteTokenizer:
    special_token_ids = frozenset({0})
    codec_errors = "replace"

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def token_bytes(self, token_id, *, first=False):
        return bytes([token_id])

    def token_text(self, token_id):
        return chr(token_id)


class FakeConnection:
    name = "fake"

    def __init__(self):
        self.sent, self.closed = [], False

    def send(self, message):
        self.sent.append(message)

    async def close(self):
        self.closed = True


class World:
    """Must be made inside an event loop. The Head has answered a ping."""

    def __init__(self, **info):
        self.client = EngineClient()
        self.connection = self.client.connection = FakeConnection()
        self.llm = AsyncLLM(
            ServeConfig(model="m"), self.client, fake.make_info(vocab_size=256, **info), (ByteTokenizer(), {}))
        self.client.take(Pong(epoch=1))

    def sent(self, kind):
        return [message for message in self.connection.sent if isinstance(message, kind)]

    def say(self, *deltas):
        self.client.take(DeltaBatch(epoch=1, deltas=list(deltas)))


def params(**fields):
    return SamplingParams(**{"max_tokens": 8} | fields)


def finished(request_id, first=0):
    return Delta(request_id=request_id, first=first, token_ids=[97], finish_reason="length")


async def outcome(stream):
    """How a stream ends: the class of its error, or its finish reasons."""
    reasons = []
    try:
        async for chunk in stream:
            if chunk.finish_reason:
                reasons.append(chunk.finish_reason)
    except KvartoError as error:
        return type(error).__name__
    return reasons


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 5))
