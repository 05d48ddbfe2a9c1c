"""The API key, as both the HTTP and the gRPC server check it."""

from __future__ import annotations

import hmac

from ...protos.errors import AuthenticationError


def check_bearer(value: bytes, api_key: str) -> None:
    """Raise `AuthenticationError` unless `value` is `Bearer <api_key>`, in a time that tells nothing of the key."""
    scheme, _, key = value.partition(b" ")
    if scheme.lower() != b"bearer" or not key.strip():
        raise AuthenticationError("an API key is needed: send 'Authorization: Bearer <key>'")
    if not hmac.compare_digest(key.strip(), api_key.encode()):
        raise AuthenticationError("the API key is not the one that this server was started with")
