"""How many blocks a worker group's pools get."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter

from ...protos.config import EngineConfig
from ...protos.errors import ResourcesError
from ...protos.model import KVGroupSpec
from ...protos.step import RankReady
from .windows import enough_blocks

SHARE_OF_AVAILABLE = 0.5
"""Of the memory left after the weights: activations, other processes and the page cache need the rest."""
CPU_POOL_CAP_BYTES = 4 * 2**30
"""Of a rank on a CPU that was given no size: main memory belongs to others too."""

CPU_SWAP_CAP_BYTES = 2**30
"""Of a rank's host pool that was given no size: untouched pages cost nothing, touched ones are taken from others."""
SWAP_SHARE_OF_AVAILABLE = 0.1


def num_blocks(config: EngineConfig, ranks: list[RankReady], max_model_len: int, device: str) -> list[int]:
    """Usable blocks per KV group, the same on every rank: `num_blocks` if given, else what the tightest rank allows. A
    KV group with a window has no more than all sequences, running and cached, can together hold, and a residual no more
    than the running ones.

    Raises `ResourcesError` when that is less than one block, or more memory than there is.
    """
    # Ranks on the CPUs of one host share its memory; every GPU has its own.
    ranks_per_node = Counter(rank.node for rank in ranks) if device == "cpu" else Counter({r.node: 1 for r in ranks})
    # More than every sequence at its longest can never be used.
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    most = useful if config.num_blocks is None else config.num_blocks
    pools = _Pools(config, ranks[0].kv_groups, device)
    allowed = min(pools.largest(rank, rank.available_bytes // ranks_per_node[rank.node], most, 1) for rank in ranks)
    if config.num_blocks is not None:
        if config.num_blocks > allowed:
            raise ResourcesError(
                f"num_blocks={config.num_blocks} needs more memory than is left: at most {allowed} blocks fit")
        return pools.counts(config.num_blocks)
    budgets = []
    for rank in ranks:
        budget = config.kv_cache_memory_bytes
        if budget is None:
            budget = int(rank.available_bytes / ranks_per_node[rank.node] * SHARE_OF_AVAILABLE)
            budget = min(budget, CPU_POOL_CAP_BYTES) if device == "cpu" else budget
        budgets.append(pools.largest(rank, budget, most, 1))
    count = min(allowed, *budgets)
    if count < 1:
        fitting = min(rank.available_bytes // ranks_per_node[rank.node] // sum(rank.block_bytes) for rank in ranks)
        raise ResourcesError(
            f"no KV-cache block fits: a block takes {sum(ranks[0].block_bytes)} bytes a rank and {fitting} fit; free "
            "memory or set kv_cache_memory_bytes")
    return pools.counts(count)


def num_host_blocks(
    config: EngineConfig, ranks: list[RankReady], device_blocks: list[int], device: str
) -> list[int]:
    """Host blocks per KV group, the same on every rank: those of `swap_space_bytes`, by default no more than there are
    device blocks. Raises `ResourcesError` when a given size is more memory than there is."""
    ranks_per_node = Counter(rank.node for rank in ranks)
    pools = _Pools(config, ranks[0].kv_groups, device)
    counts = []
    for rank in ranks:
        free = rank.available_host_bytes // ranks_per_node[rank.node]
        if device == "cpu":
            # The pool that stands for a device's is taken from the same memory.
            free -= sum((n + 1) * b for n, b in zip(device_blocks, rank.block_bytes, strict=True))
        if config.swap_space_bytes is not None:
            if config.swap_space_bytes > free:
                raise ResourcesError(f"swap_space_bytes={config.swap_space_bytes} is more than the {max(0, free)} "
                                     "bytes of host memory that a rank may take: lower it")
            budget, most = config.swap_space_bytes, config.swap_space_bytes // min(rank.block_bytes)
        else:
            budget, most = min(int(max(0, free) * SWAP_SHARE_OF_AVAILABLE), CPU_SWAP_CAP_BYTES), max(device_blocks)
        counts.append(pools.largest(rank, budget, most, 0))
    count = min(counts)
    if config.swap_space_bytes and not count:
        raise ResourcesError(f"swap_space_bytes={config.swap_space_bytes} holds no block: one takes "
                             f"{max(sum(rank.block_bytes) for rank in ranks)} bytes")
    return pools.counts(count)


def num_disk_blocks(config: EngineConfig, ranks: list[RankReady]) -> int:
    """Blocks of every KV group that the disk tier may hold; 0: there is none. Raises `ResourcesError` when the size
    given holds no block."""
    if config.kv_disk_path is None:
        return 0
    size = max(bytes_to_keep(rank) for rank in ranks)
    if config.kv_disk_bytes < size:
        raise ResourcesError(f"kv_disk_bytes={config.kv_disk_bytes} holds no block: one takes {size} bytes")
    return config.kv_disk_bytes // size


def bytes_to_keep(rank: RankReady) -> int:
    """Of what one more full block takes on a rank, in all KV groups: a residual holds none."""
    return sum(size for size, group in zip(rank.block_bytes, rank.kv_groups, strict=True) if not group.residual)


class _Pools:
    """How many blocks the pools of all KV groups have, given how many those without a window have."""

    def __init__(self, config: EngineConfig, kv_groups: list[KVGroupSpec], device: str) -> None:
        # As many ended sequences as running ones keep what their next turn sees, but nothing in a residual.
        with_ended = config.max_num_seqs * (2 if config.enable_prefix_caching else 1)
        self._enough = [enough_blocks(group, config.block_size, config.max_num_seqs if group.residual else with_ended,
                                      config.batched_tokens(device)) for group in kv_groups]

    def counts(self, num_blocks: int) -> list[int]:
        return [num_blocks if enough is None else min(num_blocks, enough) for enough in self._enough]

    def largest(self, rank: RankReady, budget: int, most: int, num_null_blocks: int) -> int:
        """The largest argument of `counts`, at most `most`, for which the pools fit so many bytes of a rank, with the
        null blocks that each of them has besides."""

        def num_bytes(num_blocks: int) -> int:
            return sum((count + num_null_blocks) * size
                       for count, size in zip(self.counts(num_blocks), rank.block_bytes, strict=True))

        # `bisect` finds the first that does not fit.
        return max(0, bisect_right(range(most + 1), budget, key=num_bytes) - 1)
