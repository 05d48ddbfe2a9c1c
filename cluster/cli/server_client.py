"""A running server, as the command line sees it: over HTTP, its failures as kvarto's own errors."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Self

import httpx

from ...protos.errors import (
    AuthenticationError,
    ConfigError,
    InvalidRequestError,
    KvartoError,
    ModelNotFoundError,
    PermissionDeniedError,
    UnavailableError,
)

TIMEOUT_S = 10.0
_ERRORS: dict[int, type[KvartoError]] = {
    401: AuthenticationError, 403: PermissionDeniedError, 404: ModelNotFoundError, 503: UnavailableError}


class ServerClient:
    """Use as a context manager. Every method raises `UnavailableError` when nobody answers at `url`."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/")
        headers = [] if api_key is None else [(b"Authorization", f"Bearer {api_key}".encode())]
        with self._translated():
            # A long answer may take its time between two events.
            self._http = httpx.Client(
                base_url=self._url, headers=headers, timeout=httpx.Timeout(TIMEOUT_S, read=None))

    def get(self, path: str, *, accept: tuple[int, ...] = ()) -> dict[str, Any]:
        """The JSON object at `path`. Raises the error that the server answers with, unless its status is one of
        `accept`."""
        with self._translated():
            response = self._http.get(path, timeout=TIMEOUT_S)
        return self._object(path, response, accept)

    def _object(self, path: str, response: httpx.Response, accept: tuple[int, ...] = ()) -> dict[str, Any]:
        if response.is_error and response.status_code not in accept:
            raise _error_of(response)
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise KvartoError(f"{self._url}{path} does not answer as a kvarto server does: is it another's address?")
        return body

    def post(self, path: str) -> dict[str, Any]:
        """What an empty POST to `path` is answered with. Raises the error that the server answers with."""
        with self._translated():
            return self._object(path, self._http.post(path, timeout=TIMEOUT_S))

    def stream_chat(self, body: dict[str, Any]) -> Generator[str, None, None]:
        """The pieces of one chat answer. Closing the generator cancels it on the server."""
        with self._translated(), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise _error_of(response)
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data:
                    yield from _pieces(json.loads(data))
        raise UnavailableError(f"the server at {self._url} ended the answer before it was complete")

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            raise ConfigError(f"'{self._url}' is no URL of a server ({error}): give one such as "
                              "http://127.0.0.1:8000") from None
        except httpx.ConnectError as error:
            raise UnavailableError(f"no server answers at {self._url} ({error}): start one with `kvarto serve`, or "
                                   "give the address of another with --url") from None
        except httpx.TimeoutException:
            raise UnavailableError(f"the server at {self._url} did not answer within {TIMEOUT_S:g} s") from None
        except httpx.TransportError as error:
            raise UnavailableError(f"the connection to {self._url} failed: {error}") from None


def _pieces(event: dict[str, Any]) -> Iterator[str]:
    if "error" in event:
        raise KvartoError(str(event["error"]["message"]))
    for choice in event["choices"]:
        if content := choice["delta"].get("content"):
            yield content


def _error_of(response: httpx.Response) -> KvartoError:
    """The error in OpenAI's format that a response bears, or what can be said of one without."""
    status = response.status_code
    kind = _ERRORS.get(status, InvalidRequestError if status < 500 else KvartoError)
    try:
        return kind(str(response.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return kind(f"{response.url} answered {status} {response.reason_phrase}: is it a kvarto server?")
