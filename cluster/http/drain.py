"""Who may end the service for everybody."""

from __future__ import annotations

import ipaddress

from starlette.requests import Request

from ...protos.errors import PermissionDeniedError
from .auth import check_bearer

_OF_OTHERS = ("forwarded", "x-forwarded-for", "x-real-ip", "via", "origin")
"""Headers of a proxy that speaks for somebody else, and of a browser that a web page uses."""


def check_may_drain(request: Request, api_key: str | None) -> None:
    """Raise `PermissionDeniedError` unless `request` comes from this machine itself (in Kubernetes: from this pod), and
    `AuthenticationError` unless it bears the API key, where there is one. The key alone is not enough: every user of
    the service has it."""
    if not _is_loopback(request) or any(name in request.headers for name in _OF_OTHERS):
        raise PermissionDeniedError("only a process on the server's own machine may drain it, without a proxy between: "
                                    "run `kvarto drain` there")
    if api_key is not None:
        check_bearer(request.headers.get("authorization", "").encode("latin-1"), api_key)


def _is_loopback(request: Request) -> bool:
    try:
        address = ipaddress.ip_address(request.client.host) if request.client else None
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address is not None and (mapped or address).is_loopback
