"""The Head: one per application, a named detached Ray actor that owns schedulers, block spaces and worker groups."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from concurrent.futures import Future
from typing import Any

import ray

from ..protos.config import EngineConfig
from ..protos.endpoint import Endpoint
from ..protos.errors import KvartoError
from ..protos.model import ModelConfig
from ..protos.request import EngineInfo
from ..protos.span_export import export_spans
from .engine.engine import Engine
from .engine.loop import EngineLoop
from .engine.zmq_hub import ZmqHub
from .launcher.on_ray import NAMESPACE, ON_RAY_HEAD, PlacedGroup, end_ranks_of, launch_group
from .metrics import Metrics
from .resolve import resolve
from .supervisor import Supervisor

logger = logging.getLogger(__name__)

MAX_CALLS = 16
"""Calls that the actor answers at once: frontends ask for the endpoint while `start` waits for the ranks."""

RETRY_S = 2.0
ORPHAN_S = 120.0
"""A Head that no frontend has spoken to for so long belongs to nobody: its callers are dead or its app is deleted."""


class _Group:
    """A placed group together with its engine, as the supervisor wants it."""

    def __init__(self, placed: PlacedGroup, engine: Engine) -> None:
        self.engine = engine
        self.dead_rank = placed.dead_rank
        self.end = placed.end


class Head:
    """Made an actor by `start_head`. Lives until `stop`; restarted by Ray when it dies, it ends the ranks of its
    former self and starts anew."""

    def __init__(self, application: str, config: EngineConfig, model: ModelConfig) -> None:
        logging.basicConfig(level=logging.INFO)
        if config.otlp_traces_endpoint is not None:
            export_spans(config.otlp_traces_endpoint, "head")
        self._restarted = ray.get_runtime_context().was_current_actor_reconstructed
        end_ranks_of(application)
        self._application = application
        self._resolved = resolve(config, model, has_cuda=bool(ray.cluster_resources().get("GPU")))
        self._metrics = Metrics()
        self._hub = ZmqHub(ray.util.get_node_ip_address(), min_port=config.min_port, max_port=config.max_port)
        self._loop = EngineLoop(self._hub, self._metrics, on_group_failed=self._on_group_failed)
        self._thread = threading.Thread(target=self._run_loop, name="engine-loop", daemon=True)
        self._thread.start()
        # Names and messages of a former Head's groups may still be about: no epoch comes twice.
        first_epoch = int(time.time()) if self._restarted else 1
        self._supervisor = Supervisor(
            self._bring_up, self._loop, config.num_worker_groups, first_epoch=first_epoch)
        self._pids: dict[int, list[int]] = {}
        self._nodes: dict[int, set[str]] = {}
        self._started = threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._start, name="start", daemon=True).start()
        threading.Thread(target=self._watch_for_frontends, name="orphan", daemon=True).start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether all worker groups are ready, after waiting up to `timeout_s`. Raises what a group failed with at its
        first start."""
        self._started.wait(timeout_s)
        if self._error is not None:
            raise self._error
        return self._started.is_set()

    def endpoint(self) -> Endpoint:
        """Where frontends connect to."""
        return self._hub.frontend_endpoint

    def rank_pids(self) -> list[int]:
        """Process ids of the ranks of every worker group, in group and rank order."""
        return [pid for index in sorted(self._pids) for pid in self._pids[index]]

    def infos(self) -> list[EngineInfo]:
        """Of every worker group that works now."""
        return self._loop.infos

    def num_unfinished(self) -> int:
        """Requests that are running or waiting."""
        return self._loop.num_unfinished

    def drain(self) -> None:
        """Take no more requests; those that run may finish."""
        self._loop.post(self._loop.drain)

    def drain_node(self, node_id: str) -> int:
        """The node with this Ray id is leaving: take no more requests for the worker groups that have a rank there,
        nor for any group if this Head is there itself. Returns how many requests these have left. To be asked again
        until there are none: groups may come up there meanwhile."""
        if node_id == ray.get_runtime_context().get_node_id():
            self.drain()
            return self.num_unfinished()
        leaving = [index for index, nodes in list(self._nodes.items()) if node_id in nodes]
        left: Future[int] = Future()
        self._loop.post(lambda: left.set_result(self._loop.drain_groups(leaving)))
        return left.result()

    def stop(self) -> None:
        """End the ranks and the loop. The actor itself is killed by whoever called."""
        self._supervisor.stop()
        self._loop.stop()
        self._thread.join()

    def _run_loop(self) -> None:
        try:
            self._loop.run()
        except BaseException:
            # Without its loop this process answers nobody and looks alive: Ray starts another.
            logger.exception("the engine loop died")
            os._exit(1)

    def _start(self) -> None:
        try:
            self._supervisor.start()
        except Exception as error:
            if self._restarted:
                # This configuration has worked: Ray starts another Head, and what is in the way may be gone then.
                logger.exception("a restarted Head could not start its worker groups")
                time.sleep(RETRY_S)
                os._exit(1)
            self._error = error if isinstance(error, KvartoError) else KvartoError(f"{type(error).__name__}: {error}")
        self._started.set()

    def _watch_for_frontends(self) -> None:
        self._started.wait()
        ready_s = time.monotonic()
        while time.monotonic() - max(ready_s, self._loop.last_heard_s) < ORPHAN_S:
            time.sleep(1.0)
        logger.warning("no frontend has spoken for %g s: ending", ORPHAN_S)
        self.stop()
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _on_group_failed(self, index: int, reason: str) -> None:
        self._supervisor.on_group_failed(index, reason)

    def _bring_up(self, index: int, epoch: int) -> _Group:
        started = time.monotonic()
        placed = launch_group(self._resolved, self._application, index, epoch)
        try:
            blocks, host_blocks = self._resolved.blocks(placed.ready)
            placed.run(blocks, host_blocks, self._hub.rank_endpoint)
            link = self._hub.link(epoch, placed.identities)
            engine = self._resolved.engine(placed.ready, blocks, host_blocks, link, epoch, self._metrics)
        except BaseException:
            placed.end()
            raise
        self._nodes[index] = placed.node_ids()
        self._pids[index] = [ready.pid for ready in placed.ready]
        logger.info("worker group %d (epoch %d) is up after %.1f s: ranks %s, kernels %s", index, epoch,
                    time.monotonic() - started, self._pids[index], placed.ready[0].kernels)
        return _Group(placed, engine)


def head_name(application: str) -> str:
    return f"{application}/head"


def find_heads() -> list[Any]:
    """The living Heads of all applications of the Ray cluster."""
    heads = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].endswith(head_name("")):
            # One that has ended meanwhile is none.
            with contextlib.suppress(ValueError):
                heads.append(ray.get_actor(actor["name"], namespace=NAMESPACE))
    return heads


def start_head(application: str, config: EngineConfig, model: ModelConfig) -> Any:
    """The Head of `application`: the living one, or a new one, on the node where Ray's own head is: the application
    ends with that one anyway, and must not end with any other. Returns the actor handle at once; `wait_ready` waits."""
    actor_class: Any = ray.remote(Head)
    return actor_class.options(
        name=head_name(application), namespace=NAMESPACE, lifetime="detached", get_if_exists=True, max_restarts=-1,
        max_task_retries=-1, num_cpus=0, max_concurrency=MAX_CALLS, resources=ON_RAY_HEAD,
    ).remote(application, config, model)


def find_head(application: str) -> Any:
    """The living Head of `application`. Raises `ValueError` if there is none."""
    return ray.get_actor(head_name(application), namespace=NAMESPACE)
