"""The slots of device and host blocks and the files of the disk tier, as numbers, and the moves between them."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Collection

from kvarto.protos.step import BlockMoves

MOVE_ORDER = ("disk_drops", "disk_stores", "swap_outs", "disk_loads", "swap_ins", "copies")
"""The contract's. The mutation script changes it (`KVARTO_MOVE_ORDER`) to see that it matters."""


class ModelledMemory:
    """Per KV group `devices` and `hosts`, lists of blocks of `block_size` numbers (0: unwritten), and `disks`. Executes
    moves as both ranks of a group would, and raises `AssertionError` where one breaks the contract."""

    def __init__(
        self, block_size: int, num_blocks: list[int], num_host_blocks: list[int], rng: random.Random,
        seen: Counter[str], *, disk_capacity: int, corruption: float,
    ) -> None:
        """`corruption`: how probable it is that a file cannot be loaded, on each of the two ranks. What happens is
        counted in `seen`."""
        self.block_size = block_size
        self.devices, self.hosts = (
            [[[0] * block_size for _ in range(count + 1)] for count in counts]
            for counts in (num_blocks, num_host_blocks))
        self.disks: list[dict[bytes, list[int]]] = [{} for _ in num_blocks]
        self.seen = seen
        self._contents: list[dict[bytes, list[int]]] = [{} for _ in num_blocks]
        self._rng = rng
        self._disk_capacity = disk_capacity
        self._corruption = corruption
        self._move_order = os.environ.get("KVARTO_MOVE_ORDER", ",".join(MOVE_ORDER)).split(",")

    def check(self, group: int, moves: BlockMoves, survivors: set[int]) -> None:
        """The rule of `BlockMoves`, word for word, as far as a rank can know it. (Which blocks a plan *releases* it
        cannot: those of an ended sequence may have been free since the last result.)"""
        swap_outs, swap_ins, copies = dict(moves.swap_outs), dict(moves.swap_ins), moves.copies
        to_device = [*(new for _, new in moves.swap_ins), *(new for _, new in copies)]
        to_host = [*(new for _, new in moves.swap_outs), *(new for _, new in moves.disk_loads)]
        for used, pool in (([*swap_outs, *to_device, *(old for old, _ in copies)], self.devices[group]),
                           ([*swap_ins, *to_host, *(old for old, _ in moves.disk_stores)], self.hosts[group])):
            assert all(1 <= block < len(pool) for block in used), "a block id is out of range"
        assert len(set(to_device)) == len(to_device), "a device block is brought two contents"
        assert len(set(to_host)) == len(to_host), "a host block is brought two contents"
        read = survivors.union(old for old, _ in copies)
        assert not read & set(to_device), "a plan overwrites a device block that it reads"
        assert not swap_ins.keys() & set(to_host), "a plan overwrites a host block that it reads"

    def move(
        self, group: int, moves: BlockMoves, failed: tuple[list[tuple[int, bytes]], ...], corrupt: Collection[bytes],
    ) -> None:
        """All moves of a KV group, those of one kind in any order. Adds to the loads that failed on each rank."""
        device, host = self.devices[group], self.hosts[group]
        for kind in self._move_order:
            for move in self._rng.sample(getattr(moves, kind), len(getattr(moves, kind))):
                self.seen[kind] += 1
                if kind == "disk_drops":
                    self.disks[group].pop(move, None)
                elif kind == "disk_stores":
                    self._store(group, *move)
                elif kind == "disk_loads":
                    self._load(group, *move, failed, corrupt)
                else:
                    source = host if kind == "swap_ins" else device
                    target = host if kind == "swap_outs" else device
                    target[move[1]] = list(source[move[0]])
        assert len(self.disks[group]) <= self._disk_capacity, "the disk tier is over its capacity"

    def _store(self, group: int, block: int, key: bytes) -> None:
        contents = list(self.hosts[group][block])
        assert all(contents), "a block with an unwritten slot falls to disk"
        assert self._contents[group].setdefault(key, contents) == contents, "a key has two contents"
        self.disks[group][key] = contents

    def _load(
        self, group: int, key: bytes, block: int, failed: tuple[list[tuple[int, bytes]], ...],
        corrupt: Collection[bytes],
    ) -> None:
        disk = self.disks[group]
        bad = [key not in disk or self._rng.random() < self._corruption for _ in failed]
        bad[1] |= key in corrupt
        for rank, is_bad in enumerate(bad):
            if is_bad:
                failed[rank].append((group, key))
        self.hosts[group][block] = [0] * self.block_size if any(bad) else list(disk[key])
        if any(bad):
            self.seen["failed_loads"] += 1
            disk.pop(key, None)
