"""Moves blocks between the device caches, the host pools and the disk, as plans say."""

from __future__ import annotations

import torch

from ..kernels import copy_blocks
from ..protos.step import BlockMoves
from .disk_tier import Bytes, DiskTier
from .pool_memory import empty_pool


class BlockMover:
    """The pools of every KV group on one rank: `[num_blocks, ...]`, block 0 of each is the null block."""

    def __init__(self, devices: list[torch.Tensor], num_host_blocks: list[int], disk: DiskTier | None) -> None:
        """`devices`: the cache of each KV group. `num_host_blocks`: of each, besides the null block."""
        pinned = devices[0].is_cuda
        self._devices = devices
        self._hosts = [
            empty_pool((count + 1, *device.shape[1:]), device.dtype, torch.device("cpu"), pinned=pinned)
            for device, count in zip(devices, num_host_blocks, strict=True)]
        # Per KV group [num_blocks, block_bytes], the same memory.
        self._host_bytes: list[Bytes] = [host.view(torch.uint8).flatten(1).numpy() for host in self._hosts]
        self._disk = disk
        self._stream: torch.cuda.Stream | None = None
        if pinned:
            self._stream = torch.cuda.Stream(devices[0].device)  # type: ignore[no-untyped-call]  # in the stubs

    def apply(self, moves: list[BlockMoves]) -> list[tuple[int, bytes]]:
        """Execute the moves of a plan, one `BlockMoves` per KV group or none. Returns (KV group, key) of the files
        that could not be loaded; what their host blocks hold is undefined.

        On CUDA the copies are only queued; the current stream waits for them. Raises `ValueError` for blocks outside
        their pool.
        """
        if self._stream is None:
            return self._apply(moves)
        # The file system reads and writes host blocks that copies of earlier plans may not be done with.
        if any(group.disk_stores or group.disk_loads for group in moves):
            self._stream.synchronize()
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            failed = self._apply(moves)
        current.wait_stream(self._stream)
        return failed

    def synchronize(self) -> None:
        """Wait until every copy is done."""
        if self._stream is not None:
            self._stream.synchronize()

    def _apply(self, moves: list[BlockMoves]) -> list[tuple[int, bytes]]:
        failed = []
        for group, wanted in enumerate(moves):
            device, host = self._devices[group], self._hosts[group]
            self._store(group, wanted)
            self._copy(device, host, wanted.swap_outs)
            failed += self._load(group, wanted.disk_loads)
            self._copy(host, device, wanted.swap_ins)
            self._copy(device, device, wanted.copies)
        return failed

    def _store(self, group: int, moves: BlockMoves) -> None:
        if moves.disk_drops or moves.disk_stores:
            disk = self._disk_tier()
            for key in moves.disk_drops:
                disk.drop(group, key)
            for block_id, key in moves.disk_stores:
                disk.store(group, key, self._host_bytes[group][block_id])

    def _load(self, group: int, loads: list[tuple[bytes, int]]) -> list[tuple[int, bytes]]:
        if not loads:
            return []
        disk = self._disk_tier()
        return [(group, key) for key, block_id in loads if not disk.load(group, key, self._host_bytes[group][block_id])]

    def _disk_tier(self) -> DiskTier:
        if self._disk is None:
            raise ValueError("a plan moves blocks to or from the disk, but this rank has no kv_disk_path")
        return self._disk

    def _copy(self, source: torch.Tensor, destination: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
        if self._stream is None:
            copy_blocks(source, destination, pairs)
            return
        for from_block, to_block in pairs:
            destination[to_block].copy_(source[from_block], non_blocking=True)
