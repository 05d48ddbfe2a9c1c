"""A benchmark's client of an OpenAI-compatible HTTP server. It must be cheap: it shares the machine with the server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Self

import aiohttp
import msgspec

from ....protos.errors import KvartoError, UnavailableError

OK = 200
_EVENT_END = b"\n\n"
_DATA = b"data:"
_DONE = b"[DONE]"
_NO_CHOICES = b"[]"


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: msgspec.Raw = msgspec.Raw(_NO_CHOICES)
    """Not looked into: only whether there are any."""
    usage: _Usage | None = None
    error: _Error | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


_decoder = msgspec.json.Decoder(_Event)
_error_decoder = msgspec.json.Decoder(_ErrorBody)


class HttpClient:
    """A `StreamClient` of `/v1/completions`, as an asynchronous context manager. `extra` goes into every body."""

    def __init__(self, url: str, api_key: str | None, model: str | None, extra: dict[str, Any] | None = None) -> None:
        self._url = f"{url.rstrip('/')}/v1/completions"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # Running counts are vLLM's addition to OpenAI's API: pieces may hold any number of tokens.
        self._body = {
            **({} if model is None else {"model": model}), "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}, **(extra or {})}
        self._session: aiohttp.ClientSession | None = None
        self.counts_pieces = False

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def stream(self, prompt: list[int], output_len: int) -> AsyncGenerator[int, None]:
        """See `StreamClient`."""
        if self._session is None:
            raise RuntimeError("the client is not open: use it as a context manager")
        body = msgspec.json.encode({**self._body, "prompt": prompt, "max_tokens": output_len})
        count = 0
        try:
            async with self._session.post(self._url, data=body, headers=self._headers) as response:
                if response.status != OK:
                    raise KvartoError(_refusal(response.status, await response.read()))
                async for event in _events(response.content):
                    if event.error is not None:
                        raise KvartoError(event.error.message)
                    if event.usage is not None:
                        count = event.usage.completion_tokens
                    elif bytes(event.choices) != _NO_CHOICES:
                        count += 1
                        self.counts_pieces = True
                    yield count
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"the connection failed: {type(error).__name__}: {error}") from None


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[_Event]:
    rest = b""
    async for data in content.iter_any():
        *events, rest = (rest + data).replace(b"\r\n", b"\n").split(_EVENT_END)
        for event in events:
            payload = event.removeprefix(_DATA).strip()
            if payload == _DONE:
                return
            if event.startswith(_DATA):
                try:
                    yield _decoder.decode(payload)
                except msgspec.MsgspecError as error:
                    raise KvartoError(f"the server sent an event that is none of OpenAI's: {error}") from None
    raise UnavailableError("the server ended the answer before it was complete")


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"{status}: {_error_decoder.decode(body).error.message}"
    except msgspec.MsgspecError:
        return f"{status}: {body[:200].decode(errors='replace')}"
