"""How the block space stands at one moment, in numbers and as a map."""

from __future__ import annotations

from typing import Any

from .block_pool import BlockPool, State
from .block_space import BlockSpace

_LETTERS = {State.FREE: "f", State.CACHED: "c", State.RELEASING: "r", State.EMPTIED: "r", State.USED: "u"}


def block_counts(space: BlockSpace) -> dict[str, int]:
    """Blocks by state, summed over the KV groups; `used` includes `shared`."""

    def total(pools: list[BlockPool], state: State) -> int:
        return sum(pool.counts[state] for pool in pools)

    return {
        "total": space.num_blocks,
        "used": total(space.devices, State.USED),
        "shared": sum(pool.num_shared for pool in space.devices),
        "cached": total(space.devices, State.CACHED),
        "free": total(space.devices, State.FREE),
        "releasing": total(space.devices, State.RELEASING),
        "table_entries": sum(pool.num_references for pool in space.devices),
        "swapped": total(space.hosts, State.USED) - space.tiers.num_loading,
        "host_cached": total(space.hosts, State.CACHED),
        "host_free": total(space.hosts, State.FREE),
        "host_total": sum(pool.num_blocks for pool in space.hosts),
        "disk": space.tiers.num_on_disk,
    }


def pool_map(pool: BlockPool) -> dict[str, Any]:
    """One letter per block: f free, c cached, u used, s shared, r releasing; and the counts of the shared ones."""
    shared = {block_id: count for block_id, count in enumerate(pool.ref_counts) if count > 1}
    letters = [_LETTERS[state] for state in pool.states[1:]]
    for block_id in shared:
        letters[block_id - 1] = "s"
    return {"num_blocks": pool.num_blocks, "states": "".join(letters),
            "ref_counts": {str(block_id): count for block_id, count in shared.items()}}


def space_map(space: BlockSpace) -> list[dict[str, Any]]:
    """The pools of every KV group."""
    disk = {"num_blocks": space.tiers.num_on_disk, "capacity": space.tiers.disk_capacity}
    no_disk = dict.fromkeys(disk, 0)
    return [{"device": pool_map(device), "host": pool_map(host), "disk": no_disk if group.residual else disk}
            for group, device, host in zip(space.kv_groups, space.devices, space.hosts, strict=True)]
