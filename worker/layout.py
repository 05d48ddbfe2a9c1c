"""Which part of the model each tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..protos.errors import ConfigError
from ..protos.model import ModelConfig
from .families import family_of

_MLP_UNIT = 32
_VOCAB_UNIT = 64


@dataclass(frozen=True, slots=True)
class TPLayout:
    """The ranges, in the whole model, of what `rank` holds.

    `num_heads` is a multiple of `num_kv_heads`: local query head h reads local KV head `h // (num_heads //
    num_kv_heads)`. With no more ranks than KV heads, each KV head lives on one rank with all of its query heads.
    With more, every rank holds one KV head and some of the query heads that read it.
    """

    tp_size: int
    rank: int
    q_heads: range
    kv_heads: range
    mlp_columns: range
    """Of every expert, where there are several."""
    vocab: range

    @classmethod
    def of(cls, config: ModelConfig, tp_size: int, rank: int) -> TPLayout:
        """The layout of `rank` among `tp_size`. Raises `ConfigError` when there is nothing left to split."""
        if not 0 <= rank < tp_size:
            raise ConfigError(f"rank {rank} is not one of {tp_size} ranks")
        limits = {"attention heads": config.num_heads, "MLP columns": config.intermediate_size,
                  "vocabulary rows": config.vocab_size}
        for name, limit in limits.items():
            if tp_size > limit:
                raise ConfigError(f"tensor_parallel_size {tp_size} is more than the model's {limit} {name}; use at "
                                  f"most {min(limits.values())}", param="tensor_parallel_size")
        heads = _split_heads(config.num_heads, config.total_num_kv_heads, tp_size)
        held = [config.num_layers * _attention_bytes(config, len(q), len(kv)) for q, kv in heads]
        matrices = 3 if family_of(config).gated else 2
        mlp_column = matrices * max(1, config.num_experts) * config.hidden_size * config.num_layers
        vocab_row = config.hidden_size
        mlp_share = _fill(held, mlp_column * config.intermediate_size + vocab_row * config.vocab_size)
        mlp = _cut(config.intermediate_size, _MLP_UNIT, mlp_share)
        held = [size + mlp_column * len(columns) for size, columns in zip(held, mlp, strict=True)]
        # The vocabulary is cut last: it is the finest unit, and evens out what the MLP columns could not.
        vocab = _cut(config.vocab_size, _VOCAB_UNIT, _fill(held, vocab_row * config.vocab_size))
        return cls(tp_size, rank, *heads[rank], mlp[rank], vocab[rank])

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        return len(self.q_heads)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank, replicated ones included."""
        return len(self.kv_heads)

    @property
    def kv_head_of(self) -> tuple[int, ...]:
        """For each local query head, the local KV head that it reads."""
        ratio = self.num_heads // self.num_kv_heads
        return tuple(head // ratio for head in range(self.num_heads))


def _attention_bytes(config: ModelConfig, num_heads: int, num_kv_heads: int) -> int:
    """Weight elements of one layer's q, k, v and o; every weight has one dtype, so elements stand for bytes."""
    return 2 * (num_heads + num_kv_heads) * config.head_dim * config.hidden_size


def _even(total: int, parts: int) -> list[range]:
    """`range(total)` in `parts` runs whose lengths differ by one at most, the longer ones first."""
    sizes = [total // parts + (part < total % parts) for part in range(parts)]
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _split_heads(num_heads: int, num_kv_heads: int, tp_size: int) -> list[tuple[range, range]]:
    """Per rank its query heads and its KV heads."""
    ratio = num_heads // num_kv_heads
    if tp_size <= num_kv_heads:
        return [(range(kv.start * ratio, kv.stop * ratio), kv) for kv in _even(num_kv_heads, tp_size)]
    return [(range(kv_head * ratio + q.start, kv_head * ratio + q.stop), range(kv_head, kv_head + 1))
            for kv_head, replicas in enumerate(_even(tp_size, num_kv_heads))
            for q in _even(ratio, len(replicas))]


def _fill(held: list[int], amount: int) -> list[float]:
    """How much of `amount` each rank gets so that the totals come out level, as far as `amount` goes."""
    level, lowest = 0.0, sorted(held)
    for count in range(1, len(lowest) + 1):
        level = (amount + sum(lowest[:count])) / count
        if count == len(lowest) or level <= lowest[count]:
            break
    return [max(0.0, level - size) for size in held]


def _cut(total: int, unit: int, shares: list[float]) -> list[range]:
    """`range(total)` in runs proportional to `shares`, cut at multiples of `unit`, or of the largest smaller power of
    two that leaves every run at least one unit. The last unit may be partial."""
    parts = len(shares)
    while -(-total // unit) < parts:
        unit //= 2
    num_units = -(-total // unit)
    cuts = [round(num_units * share / sum(shares)) for share in accumulate(shares, initial=0.0)]
    for part in range(1, parts):
        cuts[part] = min(max(cuts[part], cuts[part - 1] + 1), num_units - (parts - part))
    return [range(start * unit, min(stop * unit, total)) for start, stop in pairwise(cuts)]
