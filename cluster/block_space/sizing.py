"""How many blocks a worker group's pools get."""

from __future__ import annotations

from collections import Counter

from ...protos.config import EngineConfig
from ...protos.errors import ResourcesError
from ...protos.step import RankReady

SHARE_OF_AVAILABLE = 0.5
"""Of the memory left after the weights: activations, other processes and the page cache need the rest."""
CPU_POOL_CAP_BYTES = 4 * 2**30
"""Of a rank on a CPU that was given no size: main memory belongs to others too."""

CPU_SWAP_CAP_BYTES = 2**30
"""Of a rank's host pool that was given no size: untouched pages cost nothing, touched ones are taken from others."""
SWAP_SHARE_OF_AVAILABLE = 0.1


def num_blocks(config: EngineConfig, ranks: list[RankReady], max_model_len: int, device: str) -> list[int]:
    """Usable blocks per KV group, the same on every rank: `num_blocks` if given, else what the tightest rank allows.

    Raises `ResourcesError` when that is less than one block, or more memory than there is.
    """
    # Ranks on the CPUs of one host share its memory; every GPU has its own.
    ranks_per_node = Counter(rank.node for rank in ranks) if device == "cpu" else Counter({r.node: 1 for r in ranks})
    num_groups = len(ranks[0].kv_groups)
    allowed = min(rank.available_bytes // ranks_per_node[rank.node] // sum(rank.block_bytes) for rank in ranks)
    if config.num_blocks is not None:
        if config.num_blocks + 1 > allowed:
            raise ResourcesError(
                f"num_blocks={config.num_blocks} needs more memory than is left: at most {max(0, allowed - 1)} blocks "
                "fit")
        return [config.num_blocks] * num_groups
    budgets = []
    for rank in ranks:
        budget = config.kv_cache_memory_bytes
        if budget is None:
            budget = int(rank.available_bytes / ranks_per_node[rank.node] * SHARE_OF_AVAILABLE)
            budget = min(budget, CPU_POOL_CAP_BYTES) if device == "cpu" else budget
        budgets.append(budget // sum(rank.block_bytes))
    # More than every sequence at its longest can never be used.
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    count = min([useful, allowed - 1, *(budget - 1 for budget in budgets)])
    if count < 1:
        raise ResourcesError(
            f"no KV-cache block fits: a block takes {sum(ranks[0].block_bytes)} bytes a rank and {allowed} fit; free "
            "memory or set kv_cache_memory_bytes")
    return [count] * num_groups


def num_host_blocks(
    config: EngineConfig, ranks: list[RankReady], device_blocks: list[int], device: str
) -> list[int]:
    """Host blocks per KV group, the same on every rank: those of `swap_space_bytes`, by default no more than there are
    device blocks. Raises `ResourcesError` when a given size is more memory than there is."""
    ranks_per_node = Counter(rank.node for rank in ranks)
    counts = []
    for rank in ranks:
        size, free = sum(rank.block_bytes), rank.available_host_bytes // ranks_per_node[rank.node]
        if device == "cpu":
            # The pool that stands for a device's is taken from the same memory.
            free -= sum((n + 1) * b for n, b in zip(device_blocks, rank.block_bytes, strict=True))
        if config.swap_space_bytes is not None:
            if config.swap_space_bytes > free:
                raise ResourcesError(f"swap_space_bytes={config.swap_space_bytes} is more than the {max(0, free)} "
                                     "bytes of host memory that a rank may take: lower it")
            counts.append(config.swap_space_bytes // size)
        else:
            counts.append(min(int(max(0, free) * SWAP_SHARE_OF_AVAILABLE), CPU_SWAP_CAP_BYTES) // size)
    count = min(counts)
    if config.swap_space_bytes is None:
        count = min(count, *device_blocks)
    elif config.swap_space_bytes and not count:
        raise ResourcesError(f"swap_space_bytes={config.swap_space_bytes} holds no block: one takes "
                             f"{max(sum(rank.block_bytes) for rank in ranks)} bytes")
    return [count] * len(device_blocks)


def num_disk_blocks(config: EngineConfig, ranks: list[RankReady]) -> int:
    """Blocks of every KV group that the disk tier may hold; 0: there is none. Raises `ResourcesError` when the size
    given holds no block."""
    if config.kv_disk_path is None:
        return 0
    size = max(sum(rank.block_bytes) for rank in ranks)
    if config.kv_disk_bytes < size:
        raise ResourcesError(f"kv_disk_bytes={config.kv_disk_bytes} holds no block: one takes {size} bytes")
    return config.kv_disk_bytes // size
