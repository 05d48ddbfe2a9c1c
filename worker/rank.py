"""One rank: its part of the model, its blocks and its sequences. Executes plans; knows no socket and no Ray."""

from __future__ import annotations

import os
import platform
import time

import torch

from ..kernels import backend
from ..protos.errors import ConfigError
from ..protos.spans import Span
from ..protos.step import RankConfig, RankCosts, RankReady, SequenceFork, StepPlan, StepResult
from .batch import SequenceTable, StepLayout, build, lay_out
from .block_mover import BlockMover
from .collectives import Communicator
from .costs import measure_costs
from .decoder import Decoder
from .disk_tier import DiskTier
from .fingerprint import fingerprint
from .kv_groups import block_bytes, cache_shape, kv_dtype
from .layout import TPLayout
from .memory import available_bytes
from .pool_memory import empty_pool, populate
from .recorded_forward import Best
from .sampling import Sampler
from .sparsity import Sparsity
from .step_sampling import SampledRows, StepSampling
from .weights import open_weights


class Rank:
    """Load, then `measure`, `ready`, `allocate`, then `execute` plans in order. All ranks of a group execute the same
    plans."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        """Reads this rank's slices of the weights. Raises `ModelLoadError` when they cannot be read, and `ConfigError`
        when `kv_disk_path` cannot be used."""
        self._config = config
        self._comm = comm
        self._device = torch.device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._layout = TPLayout.of(config.model, config.tp_size, config.rank)
        torch.set_num_threads(config.num_threads)
        source = open_weights(config.model)
        self._decoder = Decoder.load(
            config.model, self._layout, source, self._dtype, self._device, comm, config.max_model_len,
            config.kv_cache_dtype, config.quantization)
        groups = self._decoder.kv_groups
        self._block_bytes = [
            block_bytes(config.model, self._layout, group, config.block_size, self._dtype, config.kv_cache_dtype)
            for group in groups]
        self._disk: DiskTier | None = None
        if config.kv_disk_path is not None:
            stored = [size for size, group in zip(self._block_bytes, groups, strict=True) if not group.residual]
            self._disk = DiskTier(config.kv_disk_path, fingerprint(config, groups, source), stored)
        # Forks of a plan take their rows before its ends give theirs back.
        self._table = SequenceTable(2 * config.max_num_seqs, config.max_model_len, config.block_size, len(groups),
                                    has_residual=groups[-1].residual)
        vocab = self._layout.vocab
        sampler = Sampler(comm, vocab_start=vocab.start, local_vocab=len(vocab))
        self._sampling = StepSampling(self._decoder, sampler, self._table, self._device)
        self._sparsity: Sparsity | None = None
        if config.kv_sparsity is not None:
            if len(groups) > 1 or groups[0].window is not None:
                raise ConfigError("kv_sparsity does not go with layers that have a window", param="kv_sparsity")
            self._sparsity = Sparsity(
                config.kv_sparsity, self._layout, config.model.total_num_kv_heads, comm, self._table)

    def measure(self) -> RankCosts:
        """Time copies and a forward pass, which takes some tenths of a second. All ranks of a group at once."""
        return measure_costs(self._decoder, self._config, self._dtype, self._device)

    def ready(self, costs: RankCosts) -> RankReady:
        """What the Head needs to size the pools and to schedule. `costs`: what `measure` found."""
        return RankReady(
            rank=self._config.rank, kv_groups=self._decoder.kv_groups, block_bytes=self._block_bytes,
            available_bytes=available_bytes(self._device), available_host_bytes=available_bytes(torch.device("cpu")),
            kernels=backend(self._device.type), collectives=self._comm.name, node=platform.node(), pid=os.getpid(),
            costs=costs, stored_keys=[] if self._disk is None else self._disk.keys())

    def allocate(self, num_blocks: list[int], num_host_blocks: list[int]) -> None:
        """Make the pools: per KV group so many blocks on the device and in host memory (which may be none), and the
        null block before them."""
        config = self._config
        self._caches = [
            empty_pool(
                cache_shape(config.model, self._layout, group, count + 1, config.block_size, self._dtype,
                            config.kv_cache_dtype),
                kv_dtype(group, self._dtype, config.kv_cache_dtype), self._device)
            for group, count in zip(self._decoder.kv_groups, num_blocks, strict=True)]
        if self._device.type == "cpu":
            for cache in self._caches:
                populate(cache)
        self._mover = BlockMover(self._caches, num_host_blocks, self._disk)
        if backend(self._device.type).startswith("native"):
            self._decoder.record(self._caches, config.max_num_batched_tokens, config.max_num_seqs)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Every rank returns the same, except for its failed loads and its times."""
        started = time.perf_counter()
        result = StepResult(epoch=plan.epoch, step_id=plan.step_id, rank=self._config.rank)
        if plan.moves:
            with Span("move blocks"):
                result.failed_loads = self._mover.apply(plan.moves)
            result.move_seconds = time.perf_counter() - started
        for fork in plan.forks:
            self._fork(fork)
        for seq_id in plan.suspends:
            self._suspend(seq_id)
        for seq_id in plan.ends:
            self._end(seq_id)
        for start in plan.starts:
            self._table.start(start)
            self._sampling.start(start)
            if self._sparsity is not None:
                self._sparsity.start(start)
        if plan.steps:
            with Span("build batch"):
                layout = lay_out(plan.steps, self._table)
                rows = self._sampling.rows(plan, layout)
            hidden, best = self._forward(plan, layout, rows)
            for sibling in plan.siblings:
                self._fork(sibling)
            with Span("sample"):
                self._sampling.finish(plan, layout, rows, hidden, best, result)
        result.seconds = time.perf_counter() - started
        return result

    def close(self) -> None:
        """Leave the group: collectives that wait for this rank fail."""
        self._comm.close()

    def _forward(self, plan: StepPlan, layout: StepLayout, rows: SampledRows) -> tuple[torch.Tensor, Best | None]:
        """Compute the step, and compact what it says. Returns what `Decoder.forward` returns."""
        with Span("build batch"):
            batch = build(layout, self._table, self._device, rows.hidden_rows if rows.take_the_best else None)
        observer = self._sparsity.observer(plan.steps, layout, batch) if self._sparsity is not None else None
        hidden, best = self._decoder.forward(batch, self._caches, observer)
        self._table.num_computed[layout.rows] = layout.ends
        if self._sparsity is not None and observer is not None:
            self._sparsity.finish(plan.steps, observer, self._caches[0])
        return hidden, best

    def _fork(self, fork: SequenceFork) -> None:
        if self._sparsity is not None:
            self._sparsity.fork(fork)
            if self._sparsity.is_suspended(fork.seq_id):
                return
        self._table.fork(fork)
        self._sampling.fork(fork)

    def _suspend(self, seq_id: int) -> None:
        if self._sparsity is None:
            raise ValueError(f"sequence {seq_id} cannot be suspended: nothing is kept of it")
        self._sparsity.suspend(seq_id)
        self._table.end(seq_id)
        self._sampling.end(seq_id)

    def _end(self, seq_id: int) -> None:
        suspended = self._sparsity is not None and self._sparsity.is_suspended(seq_id)
        if self._sparsity is not None:
            self._sparsity.end(seq_id)
        if not suspended:
            self._table.end(seq_id)
            self._sampling.end(seq_id)
