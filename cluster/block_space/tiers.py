"""Where cached blocks go when the device needs their place: host memory, then a local directory."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable

from .block_pool import BlockPool
from .plan_moves import PlanMoves

logger = logging.getLogger(__name__)

MAX_LOADS = 32
"""Blocks that one request has loaded from disk by one plan: a step must not wait for more reading than this."""


class Tiers:
    """Watches the evictions of the device and host pools. A block falls one tier down unless it is there already."""

    def __init__(
        self, devices: list[BlockPool], hosts: list[BlockPool], moves: PlanMoves, groups: list[int], *,
        disk_capacity: int = 0, stored_keys: Iterable[bytes] = (), orphaned_keys: Iterable[bytes] = (),
    ) -> None:
        """`groups`: the KV groups whose blocks are cached; `disk_capacity` in blocks of each of them, 0: no disk tier;
        `stored_keys`: what is there, oldest first; `orphaned_keys`: of which some files are missing, so that the others
        go."""
        self._hosts = {group: hosts[group] for group in groups}
        self._moves = moves
        self.disk_capacity = disk_capacity
        # Per KV group, oldest first: a key is of use when it is in all of them.
        self._disk: dict[int, OrderedDict[bytes, None]] = {group: OrderedDict() for group in groups}
        self._loading: dict[bytes, list[int]] = {}
        self._unwanted: set[bytes] = set()
        for group in groups:
            devices[group].on_evict = lambda block_id, key, group=group: self._fall_to_host(group, block_id, key)
            hosts[group].on_evict = lambda block_id, key, group=group: self._fall_to_disk(group, block_id, key)
        if disk_capacity:
            for key in stored_keys:
                for group, disk in self._disk.items():
                    disk[key] = None
                    self._keep_within_capacity(group)
            for key in orphaned_keys:
                for group in groups:
                    self._moves.disk_drop(group, key)

    @property
    def num_on_disk(self) -> int:
        """Blocks of the KV group that has the most there."""
        return max(len(disk) for disk in self._disk.values())

    @property
    def num_loading(self) -> int:
        """Host blocks that are being loaded from disk, summed over the KV groups."""
        return len(self._loading) * len(self._hosts)

    @property
    def num_host_blocks(self) -> int:
        """Of the smallest host pool."""
        return min(host.num_blocks for host in self._hosts.values())

    def is_loading(self, key: bytes) -> bool:
        return key in self._loading

    def num_loadable(self, keys: list[bytes], num_kept: int = 0) -> int:
        """How many of the first `keys` can be loaded from disk, in a row; no more than the host has room for beside
        `num_kept` blocks, since they would push each other out."""
        limit = min(MAX_LOADS, *(max(0, host.num_available() - num_kept) for host in self._hosts.values()))
        count = 0
        for key in keys[:limit]:
            on_disk = all(key in disk for disk in self._disk.values())
            if not on_disk or key in self._moves.written_keys or key in self._loading:
                break
            count += 1
        return count

    def load(self, keys: list[bytes]) -> None:
        """Have the plan load blocks into host memory; `num_loadable` has said that it can. They belong to nobody else
        until `loaded` is called with them."""
        # What falls to disk for want of host blocks must not push out of it what is about to be read.
        for key in keys:
            self._loading[key] = []
        for key in keys:
            for group, host in self._hosts.items():
                host_id = host.allocate()
                self._loading[key].append(host_id)
                self._moves.disk_load(group, key, host_id)
                self._disk[group].move_to_end(key)

    def loaded(self, keys: list[bytes], failed: set[bytes]) -> None:
        """Every rank has answered. What failed on any of them is a miss, and its files go."""
        for key in keys:
            unusable = key in failed or key in self._unwanted
            self._unwanted.discard(key)
            for host, host_id in zip(self._hosts.values(), self._loading.pop(key), strict=True):
                if not unusable:
                    host.register(host_id, key)
                host.release(host_id)
            if key in failed:
                logger.warning("cached block %s could not be read back from disk: it is computed again", key.hex())
                self.forget(key)

    def forget(self, key: bytes) -> None:
        """The files of this key are not to be found any more, nor what is being read from them."""
        if key in self._loading:
            self._unwanted.add(key)
        for group, disk in self._disk.items():
            if key in disk:
                del disk[key]
                self._moves.disk_drop(group, key)

    def check_integrity(self) -> dict[int, dict[int, int]]:
        """References that loads hold, per KV group and host block."""
        assert all(len(disk) <= self.disk_capacity for disk in self._disk.values())
        return {group: {host_ids[place]: 1 for host_ids in self._loading.values()}
                for place, group in enumerate(self._hosts)}

    def _fall_to_host(self, group: int, block_id: int, key: bytes) -> None:
        host = self._hosts[group]
        if host.find(key) is not None or not host.num_available():
            return
        host_id = host.allocate()
        self._moves.swap_out(group, block_id, host_id)
        host.register(host_id, key)
        # Not evicted before it is written: until then it is releasing.
        host.release(host_id, self._moves.step_id)

    def _fall_to_disk(self, group: int, host_id: int, key: bytes) -> None:
        disk = self._disk[group]
        # Where all that is there is being read, nothing may take its place.
        if not self.disk_capacity or key in disk or self.disk_capacity <= len(self._loading):
            return
        self._moves.disk_store(group, host_id, key)
        disk[key] = None
        self._keep_within_capacity(group)

    def _keep_within_capacity(self, group: int) -> None:
        disk = self._disk[group]
        while len(disk) > self.disk_capacity:
            oldest = next(key for key in disk if key not in self._loading)
            del disk[oldest]
            self._moves.disk_drop(group, oldest)
