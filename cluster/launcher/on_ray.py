"""Starting and ending the ranks of a worker group on Ray. Only the Head does this."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...protos.endpoint import Endpoint
from ...protos.errors import KvartoError
from ...protos.step import RankReady
from ...worker.rank_actor import RankActor
from ...worker.rank_server import rank_identity
from ..resolve import Resolved
from .placement import place, rank_resources

NAMESPACE = "kvarto"
ON_RAY_HEAD = {"node:__internal_head__": 0.001}
"""The resource that only the node of Ray's own head has; Ray Serve keeps its controller there in the same way."""
LOAD_TIMEOUT_S = 1800.0
"""A rank that has not loaded its weights by then never will."""


@dataclass(slots=True)
class PlacedGroup:
    """A worker group whose ranks have loaded their weights."""

    epoch: int
    placement: PlacementGroup
    actors: list[Any]
    ready: list[RankReady]
    run_refs: list[Any]
    """Pending as long as the ranks live."""

    @property
    def identities(self) -> list[bytes]:
        return [rank_identity(self.epoch, rank) for rank in range(len(self.actors))]

    def run(self, blocks: list[int], host_blocks: list[int], endpoint: Endpoint) -> None:
        """Let the ranks allocate their pools and connect to the Head."""
        self.run_refs = [actor.run.remote(blocks, host_blocks, endpoint) for actor in self.actors]

    def dead_rank(self, timeout_s: float) -> str | None:
        """Which rank has ended and why, waiting up to `timeout_s` for one to; None: all live."""
        done, _ = ray.wait(self.run_refs, num_returns=1, timeout=timeout_s)
        if not done:
            return None
        try:
            ray.get(done[0])
            cause = "it ended"
        except RayError as error:
            cause = str(getattr(error, "cause", None) or type(error).__name__)
        return f"rank {self.run_refs.index(done[0])} died: {cause}"

    def node_ids(self) -> set[str]:
        """Ray's ids of the nodes that the ranks are on."""
        return set(placement_group_table(self.placement)["bundles_to_node_id"].values())

    def end(self) -> None:
        """Kill what still lives and give the resources back."""
        for actor in self.actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        remove_placement_group(self.placement)


def launch_group(resolved: Resolved, application: str, index: int, epoch: int) -> PlacedGroup:
    """Place the ranks of worker group `index` and load their weights. Raises `ResourcesError`, `ModelLoadError` or
    whatever a rank raised; nothing is left behind then."""
    name = f"{application}/group{index}/epoch{epoch}"
    group = PlacedGroup(epoch, place(resolved, name), [], [], [])
    resources = rank_resources(resolved)
    actor_class: Any = ray.remote(RankActor)
    try:
        for rank in range(resolved.config.tensor_parallel_size):
            group.actors.append(actor_class.options(
                name=f"{name}/rank{rank}", namespace=NAMESPACE, lifetime="detached", max_restarts=0,
                num_cpus=resources.get("CPU", 0.0), num_gpus=resources.get("GPU", 0.0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group.placement, placement_group_bundle_index=rank),
            ).remote(resolved.rank_config(rank, epoch)))
        store = ray.get(group.actors[0].serve_store.remote()) if len(group.actors) > 1 else ("", 0)
        group.ready = ray.get([actor.load.remote(*store) for actor in group.actors], timeout=LOAD_TIMEOUT_S)
    except RayTaskError as error:
        group.end()
        if isinstance(error.cause, KvartoError):
            raise error.cause from None
        raise
    except BaseException:
        group.end()
        raise
    return group


def end_ranks_of(application: str) -> None:
    """Kill every rank that a former Head of this application left, and remove their placement groups."""
    prefix = f"{application}/group"
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix):
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(actor["name"], namespace=NAMESPACE), no_restart=True)
    for entry in ray.util.placement_group_table().values():
        if entry["name"].startswith(prefix) and entry["state"] != "REMOVED":
            with contextlib.suppress(ValueError):
                remove_placement_group(ray.util.get_placement_group(entry["name"]))
