"""A rank that executes plans on a model of memory: who wrote which token into which slot. The scheduler's oracle."""

from __future__ import annotations

from kvarto.protos.step import PromptLogprobs, SampledToken, StepPlan, StepResult, TokenLogprobs

VOCAB = 50


def next_token(tokens: list[int]) -> int:
    """The token that follows `tokens`, whoever computes it: a stand-in for greedy decoding."""
    value = 17
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return value % VOCAB


def generate(prompt: list[int], max_tokens: int, eos: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt):]


class MemoryModelRank:
    """Raises `AssertionError` when a sequence would read a slot that does not hold its own token."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self.block_size = block_size
        self.memory: dict[int, tuple[int, int]] = {}
        self.num_blocks = num_blocks
        self.sequences: dict[int, dict] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for seq_id in plan.ends:
            del self.sequences[seq_id]
        for start in plan.starts:
            assert start.seq_id not in self.sequences
            self.sequences[start.seq_id] = {
                "tokens": list(start.token_ids), "computed": 0, "table": [],
                "prompt": list(start.token_ids) if len(start.token_ids) == start.num_prompt_tokens else []}
        sampled, prompt_logprobs = [], []
        written: set[int] = set()
        for step in plan.steps:
            sequence = self.sequences[step.seq_id]
            if step.new_block_ids:
                sequence["table"].extend(step.new_block_ids[0])
            tokens, table, begin = sequence["tokens"], sequence["table"], sequence["computed"]
            end = begin + step.num_tokens
            assert step.num_tokens > 0 and end <= len(tokens)
            for position in range(end):
                block = table[position // self.block_size]
                assert 1 <= block <= self.num_blocks
                slot = block * self.block_size + position % self.block_size
                if position < begin:
                    assert self.memory[slot] == (step.seq_id, tokens[position]), "reads what it did not write"
                else:
                    assert slot not in written, "two sequences write the same slot"
                    written.add(slot)
                    self.memory[slot] = (step.seq_id, tokens[position])
            sequence["computed"] = end
            if known := sequence["prompt"][begin + 1: end + 1]:
                prompt_logprobs.append(PromptLogprobs(seq_id=step.seq_id, first=begin + 1, positions=[
                    TokenLogprobs(token_id=token, logprob=0.0, rank=1, top_token_ids=[], top_logprobs=[])
                    for token in known]))
            if end == len(tokens):
                token = next_token(tokens)
                tokens.append(token)
                sampled.append(SampledToken(seq_id=step.seq_id, token_id=token))
        return StepResult(epoch=plan.epoch, step_id=plan.step_id, tokens=sampled, prompt_logprobs=prompt_logprobs)
