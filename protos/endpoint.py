"""Where a Head listens and how to be let in: handed over through Ray, never through a file or the environment."""

from __future__ import annotations

from typing import Any

import zmq
from msgspec import Struct


class Endpoint(Struct, frozen=True, kw_only=True):
    """A CURVE-secured ROUTER socket of a Head. Keys are Z85 text (zmq_curve(7))."""

    address: str
    server_public_key: str
    client_public_key: str
    client_secret_key: str

    def __repr__(self) -> str:
        return f"Endpoint({self.address})"


def connect_dealer(context: zmq.Context[Any], endpoint: Endpoint, identity: bytes) -> Any:
    """A DEALER socket of `context`'s kind (blocking or asyncio) on its way to `endpoint`; messages sent before it is
    there are queued."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.LINGER, 200)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.curve_serverkey = endpoint.server_public_key.encode()
    socket.curve_publickey = endpoint.client_public_key.encode()
    socket.curve_secretkey = endpoint.client_secret_key.encode()
    socket.connect(endpoint.address)
    return socket
