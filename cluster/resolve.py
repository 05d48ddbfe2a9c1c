"""From a configuration and a model's files to the numbers that every process works with."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..protos.config import EngineConfig
from ..protos.errors import ConfigError
from ..protos.model import ModelConfig
from ..protos.request import EngineInfo, KVPool
from ..protos.step import RankConfig, RankReady
from .attention_pattern import apply_pattern, longest
from .block_space import BlockSpace
from .block_space.disk_keys import hash_key, stored_keys
from .block_space.sizing import bytes_to_keep, num_blocks, num_disk_blocks, num_host_blocks
from .block_space.sparsity import most_seqs
from .engine.engine import Engine
from .engine.transport import WorkerGroupLink
from .metrics import Metrics
from .policies import EVICTION, PREEMPTION, VICTIM, WATERMARK, Costs, pick
from .scheduler import Scheduler, SchedulerLimits


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration with every default decided."""

    config: EngineConfig
    model: ModelConfig
    device: str
    dtype: str
    max_model_len: int
    threads_per_rank: int

    @property
    def max_num_batched_tokens(self) -> int:
        return self.config.batched_tokens(self.device)

    def rank_config(self, rank: int, epoch: int) -> RankConfig:
        config = self.config
        return RankConfig(
            model=self.model, dtype=self.dtype, device=self.device, tp_size=config.tensor_parallel_size, rank=rank,
            epoch=epoch, block_size=config.block_size, max_model_len=self.max_model_len,
            max_num_seqs=config.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens,
            num_threads=self.threads_per_rank, step_timeout_s=config.step_timeout_s, lease_s=config.lease_s,
            quantization=config.quantization, kv_cache_dtype=config.kv_cache_dtype, kv_sparsity=config.sparsity,
            kv_disk_path=config.kv_disk_path and os.path.abspath(config.kv_disk_path),
            otlp_traces_endpoint=config.otlp_traces_endpoint)

    def blocks(self, ranks: list[RankReady]) -> tuple[list[int], list[int]]:
        """Usable device blocks and host blocks per KV group. Raises `ResourcesError`."""
        blocks = num_blocks(self.config, ranks, self.max_model_len, self.device)
        return blocks, num_host_blocks(self.config, ranks, blocks, self.device)

    def engine(
        self, ranks: list[RankReady], blocks: list[int], host_blocks: list[int], link: WorkerGroupLink, epoch: int,
        metrics: Metrics,
    ) -> Engine:
        """The engine of a worker group whose ranks are ready."""
        config = self.config
        stored, orphaned = stored_keys(ranks)
        space = BlockSpace(
            ranks[0].kv_groups, blocks, config.block_size, num_host_blocks=host_blocks,
            enable_prefix_caching=config.enable_prefix_caching, hash_key=hash_key(config.kv_disk_path),
            eviction_policy=config.eviction_policy, disk_capacity=num_disk_blocks(config, ranks),
            stored_keys=stored, orphaned_keys=orphaned, sparsity=config.sparsity)
        info = EngineInfo(
            epoch=epoch, max_model_len=self.max_model_len, vocab_size=self.model.vocab_size,
            max_num_seqs=most_seqs(config.sparsity, config.max_num_seqs, self.max_num_batched_tokens),
            kv_capacity_tokens=space.capacity_tokens, block_size=config.block_size,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_pools=[KVPool(num_blocks=count, window=group.window, num_sinks=group.num_sinks, residual=group.residual)
                      for count, group in zip(blocks, ranks[0].kv_groups, strict=True)],
            num_host_blocks=space.tiers.num_host_blocks, kernels=ranks[0].kernels,
            collectives=ranks[0].collectives, dtype=self.dtype, quantization=config.quantization,
            kv_cache_dtype=self.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
            tp_size=config.tensor_parallel_size, num_groups=config.num_worker_groups, kv_sparsity=config.sparsity)
        scheduler = Scheduler(
            space, SchedulerLimits(config.max_num_seqs, self.max_num_batched_tokens,
                                   config.mixed_prefill_tokens(self.device)), epoch=epoch,
            eos_token_ids=frozenset(self.model.eos_token_ids), num_ranks=len(ranks),
            preemption_mode=config.preemption_mode, victim_policy=config.victim_policy,
            watermark_policy=config.watermark_policy, costs=costs(ranks))
        block_bytes = [sum(rank.block_bytes[group] for rank in ranks) for group in range(len(blocks))]
        return Engine(scheduler, link, info, metrics, async_scheduling=config.async_scheduling,
                      step_timeout_s=config.step_timeout_s, check_integrity=config.check_integrity,
                      block_bytes=block_bytes)


def resolve(config: EngineConfig, model: ModelConfig, *, has_cuda: bool) -> Resolved:
    """Decide every default. Raises `ConfigError` where configuration and model do not go together."""
    if config.tensor_parallel_size > model.num_heads:
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} is above the model's {model.num_heads} query heads")
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("device='cuda', but there is no CUDA device: use device='cpu'")
    model = apply_pattern(config, model)
    most = longest(config, model)
    if config.max_model_len and most is not None and config.max_model_len > most:
        raise ConfigError(f"max_model_len={config.max_model_len} is above what the model was made for ({most} "
                          "positions): lower it, or see only the last tokens with attention_pattern streaming_llm or "
                          "lm_infinite and an attention_window within these positions", param="max_model_len")
    for key, registry in (("preemption_mode", PREEMPTION), ("victim_policy", VICTIM), ("eviction_policy", EVICTION),
                          ("watermark_policy", WATERMARK)):
        pick(registry, key, getattr(config, key))
    # A window that no sequence outgrows is none.
    length = config.max_model_len or model.max_position_embeddings
    if config.sparsity and any(window is not None and window < length for window in model.layer_windows):
        raise ConfigError(f"kv_sparsity={config.kv_sparsity!r} chooses among all tokens, and {model.path} has layers "
                          "that see the last ones only: use kv_sparsity='none'", param="kv_sparsity")
    device = config.device if config.device != "auto" else "cuda" if has_cuda else "cpu"
    if config.quantization != "none" and device == "cuda":
        raise ConfigError(f"quantization={config.quantization!r} is for processors: leave it out, or use device='cpu'",
                          param="quantization")
    cores = len(os.sched_getaffinity(0))
    return Resolved(
        config=config, model=model, device=device, dtype=model.torch_dtype if config.dtype == "auto" else config.dtype,
        max_model_len=length,
        threads_per_rank=config.threads_per_rank or max(
            1, cores // (config.tensor_parallel_size * config.num_worker_groups)))


def costs(ranks: list[RankReady]) -> Costs:
    """What the scheduler decides by: the slowest rank counts, for all wait for it."""
    return Costs(
        block_copy_s=max(bytes_to_keep(rank) / rank.costs.copy_bytes_per_s for rank in ranks),
        prefill_token_s=max(1 / rank.costs.prefill_tokens_per_s for rank in ranks))
