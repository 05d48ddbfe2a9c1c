"""Where Ray puts the ranks of a worker group: one placement group, on one node if it fits there."""

from __future__ import annotations

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ...protos.errors import ResourcesError
from ..resolve import Resolved


def rank_resources(resolved: Resolved) -> dict[str, float]:
    """What Ray reserves for one rank: `cpus_per_rank`, by default an even share of the cluster and at most one."""
    config = resolved.config
    num_ranks = config.tensor_parallel_size * config.num_worker_groups
    cpus = config.cpus_per_rank
    if cpus is None:
        # Ray counts in ten-thousandths.
        cpus = min(1.0, int(ray.cluster_resources().get("CPU", 0.0) / num_ranks * 1e4) / 1e4)
    resources = {"CPU": cpus} if cpus else {}
    return resources | {"GPU": 1.0} if resolved.device == "cuda" else resources


def place(resolved: Resolved, name: str) -> PlacementGroup:
    """A placement group with one bundle per rank, ready. Raises `ResourcesError` that says what was asked for and
    what there is when the cluster cannot hold it, or not within `placement_timeout_s`."""
    config = resolved.config
    bundle = rank_resources(resolved)
    tp_size = config.tensor_parallel_size
    need = {key: amount * tp_size for key, amount in bundle.items()}
    asked = f"{tp_size} rank(s) of {_show(bundle)}"
    total = ray.cluster_resources()
    if any(total.get(key, 0.0) < amount - 1e-6 for key, amount in need.items()):
        raise ResourcesError(f"a worker group needs {asked}, the Ray cluster has {_show(total, need)}: "
                             "lower cpus_per_rank or tensor_parallel_size, or add nodes")
    on_one_node = any(
        node["Alive"] and all(node["Resources"].get(key, 0.0) >= amount for key, amount in need.items())
        for node in ray.nodes())
    group: PlacementGroup = placement_group(
        [dict(bundle) for _ in range(tp_size)], strategy="STRICT_PACK" if on_one_node else "PACK", name=name,
        lifetime="detached")
    if not group.wait(config.placement_timeout_s):
        remove_placement_group(group)
        raise ResourcesError(
            f"Ray did not place {asked} within {config.placement_timeout_s:g} s; free now: "
            f"{_show(ray.available_resources(), need)}. Something else holds the rest, or lower cpus_per_rank")
    return group


def _show(resources: dict[str, float], keys: dict[str, float] | None = None) -> str:
    return ", ".join(f"{resources.get(key, 0.0):g} {key}" for key in (keys or resources)) or "nothing"
