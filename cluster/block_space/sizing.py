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
