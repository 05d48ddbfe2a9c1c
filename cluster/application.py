"""An application on Ray: its Head, found by name, and what it takes to start and to end one."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
from typing import Any

import ray

from ..protos.config import EngineConfig
from ..protos.endpoint import Endpoint
from ..protos.errors import KvartoError, ResourcesError, UnavailableError
from .head import find_head, find_heads, start_head
from .launcher.model import load_model_config
from .launcher.on_ray import end_ranks_of

logger = logging.getLogger(__name__)

STOP_S = 20.0
CALL_S = 10.0
OBJECT_STORE_BYTES = 128 * 2**20
"""No tensor and no token goes through Ray's object store; by default it takes a third of the memory."""


async def locate_head(application: str) -> Endpoint:
    """Where the Head of `application` listens. Raises `ValueError` where there is none."""
    head = await asyncio.to_thread(find_head, application)
    endpoint: Endpoint = await head.endpoint.remote()
    return endpoint


async def wait_until_ready(head: Any) -> None:
    """Return when all worker groups are ready. Raises the `KvartoError` that one failed with, and a `KvartoError` for
    a Head that died."""
    while True:
        try:
            if await head.wait_ready.remote(5.0):
                return
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, KvartoError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise KvartoError(f"the Head died: {error}") from None


async def end_application(application: str, head: Any) -> None:
    """End the ranks and the Head of `application`, also where the Head is dead or does not stop in time."""
    try:
        await asyncio.wait_for(asyncio.wrap_future(head.stop.remote().future()), STOP_S)
    except Exception as error:
        logger.warning("the Head did not stop by itself: %s", str(error) or type(error).__name__)
    finally:
        ray.kill(head, no_restart=True)
        await asyncio.to_thread(end_ranks_of, application)


def start_ray(address: str | None = None) -> bool:
    """Connect to the cluster at `address`, or start one on this machine. Returns whether one was started. Raises
    `ResourcesError`."""
    if ray.is_initialized():
        return False
    if address:
        _refuse_silence(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
    options: dict[str, Any] = {"address": address} if address else {
        "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:
        raise ResourcesError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    return address is None


def drain_this_node() -> int:
    """Have all applications of this machine's Ray cluster take no more requests for what runs on this node
    (`Head.drain_node`); how many these have left. Raises `UnavailableError` where there is no cluster, or it ends."""
    try:
        start_ray("auto")
        node_id = ray.get_runtime_context().get_node_id()
        return sum(ray.get([head.drain_node.remote(node_id) for head in find_heads()], timeout=CALL_S))
    except (ResourcesError, ray.exceptions.RayError) as error:
        raise UnavailableError(str(error)) from error


def _refuse_silence(address: str) -> None:
    """Raise `ResourcesError` when nobody listens at `address`, where that is HOST:PORT: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CALL_S).close()
    except OSError as error:
        raise ResourcesError(f"no Ray cluster at {address}: {error}") from None


class PrivateApplication:
    """The Head of one `AsyncLLM`, ended with it. Starts Ray on this machine if no cluster is connected."""

    def __init__(self, name: str, head: Any, owns_ray: bool) -> None:
        self._name = name
        self._head = head
        self._owns_ray = owns_ray

    @classmethod
    async def start(cls, config: EngineConfig) -> PrivateApplication:
        """Raises `ConfigError` and its kin; nothing is left running then."""
        model = await asyncio.to_thread(load_model_config, config.model)
        owns_ray = await asyncio.to_thread(start_ray)
        name = f"llm-{uuid.uuid4().hex[:8]}"
        self = cls(name, await asyncio.to_thread(start_head, name, config, model), owns_ray)
        try:
            await wait_until_ready(self._head)
        except BaseException:
            await self.close()
            raise
        return self

    async def locate(self) -> Endpoint:
        return await locate_head(self._name)

    async def close(self) -> None:
        await end_application(self._name, self._head)
        if self._owns_ray:
            await asyncio.to_thread(ray.shutdown)
