"""The frontend behind the app, which may come up after the app does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ...protos.errors import KvartoError, UnavailableError
from ..frontend_protocol import Frontend, Health
from .errors import logger


class FrontendSource:
    """Hands out the frontend; while it starts, everyone waits for the same start."""

    def __init__(self, get_frontend: Callable[[], Awaitable[Frontend]]) -> None:
        self._get_frontend = get_frontend
        self._starting: asyncio.Task[Frontend] | None = None

    async def get(self) -> Frontend:
        """The frontend, started if need be. A failed start is raised and tried again by the next call."""
        if self._starting is None or self._starting.done():
            self._starting = asyncio.ensure_future(self._ask())
        # Shielded: one impatient client must not end the start that others wait for.
        return await asyncio.shield(self._starting)

    async def get_soon(self, patience_s: float = 0.5) -> Frontend:
        """The frontend, for what cannot wait for its start. Raises `UnavailableError` while it is starting."""
        try:
            return await asyncio.wait_for(self.get(), patience_s)
        except TimeoutError:
            raise UnavailableError("the frontend is starting") from None

    async def health(self) -> Health:
        """Health now. A frontend that is starting, or could not start, is alive and not ready."""
        try:
            frontend = await self.get_soon()
        except KvartoError as error:
            return Health(live=True, ready=False, reason=error.message)
        except Exception:
            logger.exception("the frontend could not be started")
            return Health(live=True, ready=False, reason="the frontend could not be started; the log says why")
        return frontend.health()

    async def _ask(self) -> Frontend:
        return await self._get_frontend()
