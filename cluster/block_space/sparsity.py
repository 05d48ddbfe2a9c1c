"""When a sequence is compacted, to how many rows, and how many blocks that takes: from lengths alone.

What is compacted when depends on a sequence's own positions and on nothing else, so that one which is computed again
(after a preemption, or in a new Head) drops rows at the same positions as before.
"""

from __future__ import annotations

from ...protos.sparsity import KVSparsity


class Sparsity:
    """Of all sequences of a block space. `num_dropped`: how many rows a sequence has fewer than computed tokens."""

    def __init__(self, spec: KVSparsity, block_size: int) -> None:
        self.spec = spec
        self._block_size = block_size

    def next_compaction(self, num_prompt: int, num_computed: int, num_dropped: int) -> int | None:
        """Once so many tokens are computed the sequence is compacted; no step computes tokens before and after that.
        None: it never is."""
        spec = self.spec
        if num_computed < num_prompt and num_prompt > spec.budget:
            return num_prompt
        return spec.budget + spec.interval + num_dropped if spec.compacts_output else None

    def chunk(self, num_prompt: int, num_computed: int, num_dropped: int, most: int) -> int:
        """How many of the next `most` tokens one step may compute: the last `window` before a compaction in one."""
        stop = self.next_compaction(num_prompt, num_computed, num_dropped)
        if stop is None:
            return most
        num_tokens = min(most, stop - num_computed)
        num_left = stop - num_computed - num_tokens
        return max(0, num_tokens - (self.spec.window - num_left)) if 0 < num_left < self.spec.window else num_tokens

    def most_cached(self, num_prompt: int) -> int | None:
        """Most tokens that may be found in the prefix cache: the queries that score the first compaction are computed.
        None: any number."""
        stop = self.next_compaction(num_prompt, 0, 0)
        return None if stop is None else stop - self.spec.window

    def blocks_to_reach(self, num_prompt: int, num_computed: int, num_dropped: int, num_tokens: int) -> int:
        """Blocks that a sequence holds at once, at most, on its way from `num_computed` to `num_tokens` tokens."""
        stop = self.next_compaction(num_prompt, num_computed, num_dropped)
        if stop is None or num_tokens < stop:
            return self._blocks(num_tokens - num_dropped)
        most = self._blocks(stop - num_dropped) + self._blocks(self.spec.budget)
        if num_tokens == stop:
            return most
        rest = self.blocks_to_reach(num_prompt, stop, stop - self.spec.budget, min(
            num_tokens, stop + self.spec.interval) if self.spec.compacts_output else num_tokens)
        return max(most, rest)

    def longest(self, num_prompt: int, num_seqs: int, num_blocks: int, num_unsparse: int, most: int) -> int:
        """Tokens of each of `num_seqs` sequences, prompt included, for which a pool has blocks, at most `most`.
        `num_unsparse`: for how many it has while nothing is dropped."""
        spec = self.spec
        kept, full = self._blocks(spec.budget), self._blocks(spec.budget + spec.interval)
        is_long = num_prompt > spec.budget
        # The sequences are at the same length, or begin anew one after another, while the others decode.
        if spec.compacts_output:
            begins = self._blocks(max(num_prompt, spec.budget + spec.interval)) + kept
            if (num_seqs - 1) * (full + kept) + begins <= num_blocks:
                return most
        if not is_long:
            if not spec.compacts_output:
                return num_unsparse
            # Where queries are scored from the first on, prompts are not shared once they are computed again.
            fits = num_blocks // num_seqs * self._block_size if spec.keeps_scores else num_unsparse
            return min(fits, spec.budget + spec.interval)
        spare = num_blocks - self._blocks(num_prompt) - kept
        if spare < 0:
            return 0
        each = num_blocks // num_seqs
        if num_seqs > 1:
            each = min(each, spare // (num_seqs - 1))
        fits = num_prompt + each * self._block_size - spec.budget
        return min(fits, num_prompt + spec.interval) if spec.compacts_output else fits

    def _blocks(self, num_rows: int) -> int:
        return -(-num_rows // self._block_size)


def most_seqs(spec: KVSparsity | None, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Most sequences that may run at a time: one token of each, and a `window` of one of them, must fit a step, or the
    last in line would starve."""
    return min(max_num_seqs, max_num_batched_tokens - (spec.window if spec else 1) + 1)
