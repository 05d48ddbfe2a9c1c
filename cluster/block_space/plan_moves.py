"""The block moves of the plan that is being made."""

from __future__ import annotations

from ...protos.step import BlockMoves


class PlanMoves:
    """Collects moves per KV group until the plan is sent, and knows which host blocks they write."""

    def __init__(self, num_groups: int) -> None:
        self.step_id = 0
        """Of the plan being made."""
        self._num_groups = num_groups
        self._clear()

    def _clear(self) -> None:
        self.groups = [BlockMoves() for _ in range(self._num_groups)]
        self.written_hosts: list[set[int]] = [set() for _ in range(self._num_groups)]
        """Host blocks that are a destination: nothing in the same plan may count on their contents."""
        self.written_keys: set[bytes] = set()
        """Keys whose files the plan writes."""
        self.swapped_in: list[dict[int, int]] = [{} for _ in range(self._num_groups)]
        """Device block -> host block that it is filled from."""
        self.any = False
        """Whether there is any move yet."""

    def swap_out(self, group: int, device_id: int, host_id: int) -> None:
        self.groups[group].swap_outs.append((device_id, host_id))
        self.written_hosts[group].add(host_id)
        self.any = True

    def swap_in(self, group: int, host_id: int, device_id: int) -> None:
        self.groups[group].swap_ins.append((host_id, device_id))
        self.swapped_in[group][device_id] = host_id
        self.any = True

    def copy(self, group: int, source_id: int, device_id: int) -> None:
        """Copy-on-write. Of a block that this plan brings in, the copy is brought in too: no kind of move may wait for
        another's result within its own kind's destinations."""
        if (host_id := self.swapped_in[group].get(source_id)) is not None:
            self.swap_in(group, host_id, device_id)
        else:
            self.groups[group].copies.append((source_id, device_id))
            self.any = True

    def disk_store(self, group: int, host_id: int, key: bytes) -> None:
        self.groups[group].disk_stores.append((host_id, key))
        self.written_keys.add(key)
        self.any = True

    def disk_load(self, group: int, key: bytes, host_id: int) -> None:
        self.groups[group].disk_loads.append((key, host_id))
        self.written_hosts[group].add(host_id)
        self.any = True

    def disk_drop(self, group: int, key: bytes) -> None:
        """A file that this very plan was to write is not written: drops come before stores."""
        moves = self.groups[group]
        if key in self.written_keys:
            moves.disk_stores = [store for store in moves.disk_stores if store[1] != key]
        moves.disk_drops.append(key)
        self.any = True

    def take(self) -> list[BlockMoves]:
        """The moves of the plan, [] for none; the next plan's begin empty."""
        groups = self.groups if self.any else []
        self._clear()
        self.step_id += 1
        return groups
