"""For `kv_quality.py`: contexts of real text whose first tokens are a prompt, and whose rest is decoded teacher-forced
through a paged cache that KV sparsity keeps small, as a rank and its Head do it."""

from __future__ import annotations

import torch

from kvarto.cluster.block_space.sparsity import Sparsity as Lengths
from kvarto.cluster.launcher.model import load_model_config
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.sparsity import KVSparsity
from kvarto.protos.step import Compaction, SequenceStart, SequenceStep
from kvarto.worker.batch import SequenceTable, build, lay_out
from kvarto.worker.collectives import SingleRank
from kvarto.worker.decoder import Decoder
from kvarto.worker.kv_groups import cache_shape
from kvarto.worker.layout import TPLayout
from kvarto.worker.sparsity import Sparsity
from kvarto.worker.weights import open_weights

CPU = torch.device("cpu")


class SparseReader:
    """The model, and one sequence per context, which has two sets of blocks: compactions go from one to the other."""

    def __init__(self, model: str, dtype: torch.dtype, contexts: list[list[int]], num_prompt: int, block_size: int,
                 spec: KVSparsity | None) -> None:
        """Without `spec` nothing is dropped."""
        config = load_model_config(model)
        layout = TPLayout.of(config, 1, 0)
        self.contexts, self.num_prompt, self.block_size = contexts, num_prompt, block_size
        length = len(contexts[0])
        self.decoder = Decoder.load(config, layout, open_weights(config), dtype, CPU, SingleRank(), length)
        self.table = SequenceTable(len(contexts), length, block_size, 1)
        group, = self.decoder.kv_groups
        self.per_set = -(-length // block_size)
        shape = cache_shape(config, layout, group, 1 + 2 * self.per_set * len(contexts), block_size, dtype)
        self.cache = torch.zeros(shape, dtype=dtype)
        self.sparsity, self.lengths = None, None
        if spec is not None:
            self.sparsity = Sparsity(spec, layout, config.total_num_kv_heads, SingleRank(), self.table)
            self.lengths = Lengths(spec, block_size)
        self.sets = [0] * len(contexts)
        self.num_dropped = [0] * len(contexts)
        self.num_blocks = [0] * len(contexts)

    @torch.inference_mode()
    def logprobs(self) -> torch.Tensor:
        """`[num_contexts, length - num_prompt]`: of every token behind the prompt, given those before it."""
        hidden = []
        for number, tokens in enumerate(self.contexts):
            start = SequenceStart(seq_id=number, seq_index=0, token_ids=tokens, num_prompt_tokens=self.num_prompt,
                                  params=SamplingParams())
            self.table.start(start)
            if self.sparsity is not None:
                self.sparsity.start(start)
            hidden.append(self._step([number], 0, self.num_prompt)[-1:])
        rows = [self._score(torch.cat(hidden), self.num_prompt)]
        for place in range(self.num_prompt, len(self.contexts[0]) - 1):
            rows.append(self._score(self._step(list(range(len(self.contexts))), place, 1), place + 1))
        return torch.stack(rows, 1)

    @property
    def num_rows(self) -> int:
        """Rows that a sequence holds at the end."""
        return len(self.contexts[0]) - 1 - self.num_dropped[0]

    def _step(self, numbers: list[int], computed: int, num_tokens: int) -> torch.Tensor:
        steps = [self._draft(number, computed, num_tokens) for number in numbers]
        layout = lay_out(steps, self.table)
        batch = build(layout, self.table, CPU)
        observer = self.sparsity.observer(steps, layout, batch) if self.sparsity else None
        hidden, _ = self.decoder.forward(batch, [self.cache], observer)
        self.table.num_computed[layout.rows] = layout.ends
        if self.sparsity and observer:
            self.sparsity.finish(steps, observer, self.cache)
        return hidden

    def _draft(self, number: int, computed: int, num_tokens: int) -> SequenceStep:
        needed = -(-(computed + num_tokens - self.num_dropped[number]) // self.block_size)
        step = SequenceStep(seq_id=number, num_tokens=num_tokens)
        if needed > self.num_blocks[number]:
            step.new_block_ids = [self._blocks(number)[self.num_blocks[number]: needed]]
            self.num_blocks[number] = needed
        end = computed + num_tokens
        if self.lengths and end == self.lengths.next_compaction(self.num_prompt, computed, self.num_dropped[number]):
            budget = self.lengths.spec.budget
            self.sets[number] = 1 - self.sets[number]
            self.num_blocks[number] = -(-budget // self.block_size)
            self.num_dropped[number] = end - budget
            step.compaction = Compaction(
                num_kept=budget, new_block_ids=[self._blocks(number)[: self.num_blocks[number]]])
        return step

    def _blocks(self, number: int) -> list[int]:
        first = 1 + (2 * number + self.sets[number]) * self.per_set
        return list(range(first, first + self.per_set))

    def _score(self, hidden: torch.Tensor, place: int) -> torch.Tensor:
        wanted = torch.tensor([tokens[place] for tokens in self.contexts])
        return self.decoder.logits(hidden).float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
