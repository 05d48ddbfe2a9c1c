"""KV sparsity without a KV cache to speak of: Transformers in float64 keeps every key and value, and an attention
function beside it says, per layer and KV head, which of them are still seen."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import DynamicCache

WINDOW, KERNEL = 32, 7


class SparseOracle:
    """One policy on one model, whose attention it takes over. Sequences are computed one after another."""

    def __init__(self, model: Any, policy: str, budget: int, interval: int, *, int8: bool = False) -> None:
        self._model = model
        self._int8 = int8
        self._policy, self._budget, self._interval = policy, budget, interval
        transformers.AttentionInterface.register("sparse_oracle", self._attend)
        model.set_attn_implementation("sparse_oracle")

    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[list[int], list[torch.Tensor]]:
        """What the prompt is continued with, and the log probabilities of all tokens at each place."""
        self._begin()
        tokens: list[int] = []
        logprobs: list[torch.Tensor] = []
        new = prompt
        for _ in range(num_tokens):
            logprobs.append(self._advance(new, len(prompt)))
            new = [int(logprobs[-1].argmax())]
            tokens += new
        return tokens, logprobs

    def read(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """The log probability of each of `tokens` after the prompt and those before it."""
        self._begin()
        found: list[float] = []
        for new, target in zip([prompt, *([token] for token in tokens[:-1])], tokens, strict=True):
            found.append(float(self._advance(new, len(prompt))[target]))
        return found

    def _begin(self) -> None:
        self._cache = DynamicCache()
        self._num_tokens = 0
        # Per layer: [num_kv_heads, tokens]
        self._seen: dict[int, torch.Tensor] = {}
        self._totals: dict[int, torch.Tensor] = {}
        # Per layer: [num_kv_heads, queries, tokens], of the last forward pass.
        self._given: dict[int, torch.Tensor] = {}

    def _advance(self, new: list[int], num_prompt: int) -> torch.Tensor:
        with torch.no_grad():
            logits = self._model(torch.tensor([new]), past_key_values=self._cache).logits[0, -1]
        self._num_tokens += len(new)
        num_held = int(self._seen[0][0].sum())
        at_end_of_prompt = self._num_tokens == num_prompt and num_held > self._budget
        if at_end_of_prompt or (self._policy != "snapkv" and num_held == self._budget + self._interval):
            for layer, seen in self._seen.items():
                for head in range(len(seen)):
                    held = seen[head].nonzero()[:, 0].tolist()
                    kept = self._choose(layer, head, held)
                    assert len(kept) == self._budget
                    seen[head] = False
                    seen[head, kept] = True
        return logits.log_softmax(-1)

    def _choose(self, layer: int, head: int, held: list[int]) -> list[int]:
        def best(scores: dict[int, float], count: int) -> list[int]:
            return sorted(scores, key=lambda row: (-scores[row], row))[:count]

        given = self._given[layer][head]
        if self._policy == "tova":
            return best({row: float(given[-1, row]) for row in held}, self._budget)
        if self._policy == "h2o":
            latest = held[-(self._budget // 2):]
            total = self._totals[layer][head]
            return best({row: float(total[row]) for row in held[: -len(latest)]}, self._budget - len(latest)) + latest
        earlier, latest = held[:-WINDOW], held[-WINDOW:]
        raw = [float(given[-WINDOW:, row].sum()) for row in earlier]
        reach = KERNEL // 2
        pooled = {row: max(raw[max(0, i - reach): i + reach + 1]) for i, row in enumerate(earlier)}
        return best(pooled, self._budget - WINDOW) + latest

    def _attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any,
                scaling: float, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # query: [1, num_heads, queries, head_dim]; key, value: [1, num_kv_heads, tokens, head_dim]
        _, num_heads, num_queries, head_dim = query.shape
        _, num_kv_heads, num_tokens, _ = key.shape
        layer = module.layer_idx
        if self._int8:
            key, value = (_rounded(rows) for rows in (key, value))
        seen = torch.ones(num_kv_heads, num_tokens, dtype=torch.bool)
        total = torch.zeros(num_kv_heads, num_tokens, dtype=torch.float64)
        if layer in self._seen:
            before = self._seen[layer].shape[1]
            seen[:, :before], total[:, :before] = self._seen[layer], self._totals[layer]
        causal = torch.ones(num_queries, num_tokens, dtype=torch.bool).tril(num_tokens - num_queries)
        grouped = query.view(num_kv_heads, num_heads // num_kv_heads, num_queries, head_dim)
        scores = grouped @ key[0].transpose(-1, -2).unsqueeze(1) * scaling
        weights = scores.masked_fill(~(causal & seen[:, None, None]), float("-inf")).softmax(-1)
        self._given[layer] = weights.sum(1)
        self._seen[layer], self._totals[layer] = seen, total + weights.sum((1, 2))
        out = (weights @ value[0].unsqueeze(1)).view(1, num_heads, num_queries, head_dim)
        return out.transpose(1, 2), weights


def _rounded(rows: torch.Tensor) -> torch.Tensor:
    """To one of 255 levels, of a row's own largest element."""
    step = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / step).round() * step
