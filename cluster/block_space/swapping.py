"""Moving the blocks of a whole sequence group between device and host. A block that another group holds stays."""

from __future__ import annotations

from collections import Counter

from .block_pool import BlockPool, State
from .plan_moves import PlanMoves
from .sequence_blocks import SequenceBlocks
from .windows import Need


class Swapper:
    """Every table entry has exactly one location. A block that several sequences of the group share is moved once."""

    def __init__(self, devices: list[BlockPool], hosts: list[BlockPool], moves: PlanMoves) -> None:
        self._devices = devices
        self._hosts = hosts
        self._moves = moves

    def num_to_swap_out(self, members: list[SequenceBlocks]) -> int | None:
        """Blocks that a swap-out would move, in the KV group that has the most; None: the host has no room for them.
        """
        most = 0
        for group, host in enumerate(self._hosts):
            own = self._exclusive(group, members)
            present = [host_id for block_id in own if (host_id := self._on_host(group, block_id)) is not None]
            # One that is cached there is not available any more once it is taken.
            taken = sum(host.states[host_id] is State.CACHED for host_id in present)
            if len(own) - len(present) + taken > host.num_available():
                return None
            most = max(most, len(own) - len(present))
        return most

    def swap_out(self, members: list[SequenceBlocks], busy_until: int) -> None:
        """Move what the group alone holds; `num_to_swap_out` has said that there is room. `busy_until` is the last plan
        in flight that names the group."""
        for group, (device, host) in enumerate(zip(self._devices, self._hosts, strict=True)):
            own = self._exclusive(group, members)
            target: dict[int, int] = {}
            # Those that are there already are taken before others are given out: an eviction must not take them.
            for block_id, count in own.items():
                if (host_id := self._on_host(group, block_id)) is not None:
                    target[block_id] = host_id
                    for _ in range(count):
                        host.take(host_id)
                        device.release(block_id, busy_until)
            for block_id, count in own.items():
                if block_id in target:
                    continue
                host_id = target[block_id] = host.allocate()
                for _ in range(count - 1):
                    host.take(host_id)
                    device.release(block_id)
                self._moves.swap_out(group, block_id, host_id)
                host.touch(host_id, self._moves.step_id)
                if (key := device.keys[block_id]) is not None:
                    host.register(host_id, key)
                device.empty(block_id, self._moves.step_id)
            for blocks in members:
                blocks.tables[group] = [-target[entry] if entry in target else entry for entry in blocks.tables[group]]

    def num_to_swap_in(self, members: list[SequenceBlocks]) -> Need:
        """Device blocks that a swap-in takes."""
        need = []
        for group, device in enumerate(self._devices):
            needed = 0
            for host_id in self._swapped(group, members):
                block_id = self._on_device(group, host_id)
                needed += block_id is None or device.states[block_id] in (State.CACHED, State.EMPTIED)
            need.append(needed)
        return need

    def swap_in(self, members: list[SequenceBlocks]) -> None:
        """Bring every block of the group back; the caller has checked that there is room."""
        for group, (device, host) in enumerate(zip(self._devices, self._hosts, strict=True)):
            swapped = self._swapped(group, members)
            target: dict[int, int] = {}
            for host_id, count in swapped.items():
                if (block_id := self._on_device(group, host_id)) is not None:
                    target[host_id] = block_id
                    for _ in range(count):
                        device.take(block_id)
            for host_id, count in swapped.items():
                if host_id in target:
                    continue
                block_id = target[host_id] = device.allocate()
                for _ in range(count - 1):
                    device.take(block_id)
                self._moves.swap_in(group, host_id, block_id)
                device.touch(block_id, self._moves.step_id)
                if (key := host.keys[host_id]) is not None:
                    device.register(block_id, key)
            for host_id, count in swapped.items():
                for _ in range(count):
                    host.release(host_id, self._moves.step_id)
            for blocks in members:
                blocks.tables[group] = [target[-entry] if entry < 0 else entry for entry in blocks.tables[group]]

    def _exclusive(self, group: int, members: list[SequenceBlocks]) -> Counter[int]:
        """Device blocks that nobody else holds, and how many entries of the group point at each."""
        entries = Counter(entry for blocks in members for entry in blocks.tables[group] if entry > 0)
        counts = self._devices[group].ref_counts
        return Counter({block_id: count for block_id, count in entries.items() if counts[block_id] == count})

    def _swapped(self, group: int, members: list[SequenceBlocks]) -> Counter[int]:
        return Counter(-entry for blocks in members for entry in blocks.tables[group] if entry < 0)

    def _on_host(self, group: int, block_id: int) -> int | None:
        """The host block that holds the same prefix already."""
        key = self._devices[group].keys[block_id]
        return None if key is None else self._hosts[group].find(key)

    def _on_device(self, group: int, host_id: int) -> int | None:
        key = self._hosts[group].keys[host_id]
        return None if key is None else self._devices[group].find(key)
