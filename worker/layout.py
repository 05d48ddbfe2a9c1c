"""Which part of the model each tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..protos.errors import ConfigError
from ..protos.model import ModelConfig

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
        # Ranks meet after attention and again after the MLP, so that one with fewer heads cannot make up for it with
        # more columns: it would wait for the others first, and they for it afterwards.
        mlp = _cut(config.intermediate_size, _MLP_UNIT, tp_size)
        vocab = _cut(config.vocab_size, _VOCAB_UNIT, tp_size)
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


def _cut(total: int, unit: int, parts: int) -> list[range]:
    """`range(total)` in runs of about one length, cut at multiples of `unit`, or of the largest smaller power of two
    that leaves every run at least one unit. The last unit may be partial."""
    while -(-total // unit) < parts:
        unit //= 2
    units = _even(-(-total // unit), parts)
    return [range(run.start * unit, min(run.stop * unit, total)) for run in units]
