"""`kvarto serve`: Ray, the Head, the ranks and the Serve application, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from typing import Any

import ray
from ray import serve
from rich.console import Console

from ...protos.config import ServeConfig
from ...protos.errors import ResourcesError
from ...protos.request import EngineInfo
from ..application import end_application, start_ray, wait_until_ready
from ..head import find_head, start_head
from ..launcher.model import load_model_config
from ..resolve import resolve
from ..serve_app import application

APPLICATION = "kvarto"
POLL_S = 0.1

console = Console(stderr=True, highlight=False)


def run_serve(config: ServeConfig, address: str | None) -> int:
    """Serve until told to end; returns the exit code. Raises `ConfigError` and its kin, with nothing left running."""
    started = time.monotonic()
    # What can be refused without starting anything is refused first.
    model = load_model_config(config.model)
    resolve(config, model, has_cuda=config.device == "cuda")
    config = config.model_copy(update={"port": claim_port(config.host, config.port, "port")})
    if config.grpc_port is not None:
        claimed = claim_port(config.host, config.grpc_port, "grpc_port")
        config = config.model_copy(update={"grpc_port": claimed})
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    head: Any = None
    owns_ray = start_ray(address)
    try:
        refuse_second_server()
    except BaseException:
        # What runs there is not ours to end.
        if owns_ray:
            ray.shutdown()
        raise
    # One frontend on one machine needs no proxy before it, which would take a quarter of what two cores can serve.
    direct = owns_ray and config.num_frontends == 1
    try:
        head = start_head(APPLICATION, config, model)
        try:
            serve.start(
                proxy_location="Disabled" if direct else "EveryNode",
                http_options={"host": config.host, "port": config.port}, logging_config={"log_level": "WARNING"})
        except ray.exceptions.RayTaskError as error:
            raise ResourcesError(
                f"the HTTP proxy cannot listen on {config.host}:{config.port}: {error.cause}") from None
        # Until here a signal ends the start where it stands. From here on somebody may be served, so it means to drain.
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        app = application(config, behind_proxy=not direct)
        serve.run(app, name=APPLICATION, route_prefix="/")
        asyncio.run(_wait_until_ready(config, head, stop, direct))
        if not stop.is_set():
            _announce(config, ray.get(head.infos.remote()), time.monotonic() - started)
        stop.wait()
        _drain(head, config.drain_timeout_s)
    finally:
        _tear_down(head, owns_ray)
    return 0


def claim_port(host: str, port: int, name: str) -> int:
    """A port that can be bound now: `port`, or any free one for 0. Raises `ResourcesError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourcesError(
                f"cannot listen on {host}:{port}: {error.strerror}; free it, or choose another with {name} (0: any "
                "free one)", param=name) from None
        return int(probe.getsockname()[1])


def refuse_second_server() -> None:
    """Raises `ResourcesError` when this Ray cluster serves a kvarto application already."""
    try:
        find_head(APPLICATION)
    except ValueError:
        return
    raise ResourcesError("this Ray cluster already runs `kvarto serve`: end that first, or use another cluster")


async def _wait_until_ready(config: ServeConfig, head: Any, stop: threading.Event, direct: bool) -> None:
    """Return when requests can be served, or `stop` is set. Raises the `KvartoError` that keeps them from it."""

    async def wait() -> None:
        await wait_until_ready(head)
        for name, listens in (("http", direct), ("grpc", config.grpc_port is not None)):
            if listens:
                await serve.get_deployment_handle(name, APPLICATION).port.remote()

    waiting = asyncio.create_task(wait())
    while not waiting.done() and not stop.is_set():
        await asyncio.wait([waiting], timeout=POLL_S)
    if waiting.done():
        await waiting
    waiting.cancel()


def _announce(config: ServeConfig, infos: list[EngineInfo], seconds: float) -> None:
    info = infos[0]
    capacity = sum(each.kv_capacity_tokens for each in infos)
    blocks = " + ".join(f"{pool.num_blocks:,}" for pool in info.kv_pools)
    console.print(
        f"KV cache: {capacity:,} tokens ({info.kv_cache_dtype}) in {blocks} blocks of {info.block_size}; "
        f"{capacity / info.max_model_len:.1f} requests of {info.max_model_len:,} tokens at once")
    weights = "" if info.quantization == "none" else f" (weights {info.quantization})"
    console.print(f"model {config.public_name}: {info.dtype}{weights}, tp_size {info.tp_size}, kernels {info.kernels}, "
                  f"collectives {info.collectives}")
    grpc = "" if config.grpc_port is None else f", gRPC at {config.host}:{config.grpc_port}"
    console.print(f"ready after {seconds:.1f} s: http://{config.host}:{config.port}/v1{grpc}")


def _drain(head: Any, timeout_s: float) -> None:
    """Let running requests finish; new ones are refused meanwhile."""
    console.print("draining")
    ray.get(head.drain.remote())
    deadline = time.monotonic() + timeout_s
    while (left := ray.get(head.num_unfinished.remote())) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    # The last deltas still have to reach their clients through the replicas.
    time.sleep(2 * POLL_S)
    console.print(f"cancelled {left} requests that did not finish in time" if left else "all requests finished")


def _tear_down(head: Any, owns_ray: bool) -> None:
    if not owns_ray:
        # Before the Head: a replica that misses it would start another.
        serve.delete(APPLICATION)
    if head is not None:
        asyncio.run(end_application(APPLICATION, head))
    if owns_ray:
        ray.shutdown()
