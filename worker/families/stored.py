"""Where the parts of a model lie in the tensors of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from ...protos.model import ModelConfig
from .family import Family, TensorNames

_NORMS = ("attention_norm", "mlp_norm", "final_norm", "attention_post_norm", "mlp_post_norm", "q_norm", "k_norm")


def part_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Whole shape of every part that a family can have, out_features first."""
    hidden, vocab, mlp = config.hidden_size, config.vocab_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.total_num_kv_heads * config.head_dim
    norms: dict[str, tuple[int, ...]] = dict.fromkeys(_NORMS, (hidden,))
    return norms | {
        "embedding": (vocab, hidden), "lm_head": (vocab, hidden), "positions": (config.max_position_embeddings, hidden),
        "q": (q_rows, hidden), "k": (kv_rows, hidden), "v": (kv_rows, hidden), "o": (hidden, q_rows),
        "gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp), "router": (config.num_experts, hidden),
        "q_norm": (config.head_dim,), "k_norm": (config.head_dim,),
    }


def row_runs(family: Family, config: ModelConfig, part: str, rows: range) -> list[slice]:
    """The rows of the stored tensor that hold `rows` of `part`, in order. Rows of q, k and v are whole heads."""
    together = _one_tensor_with(family.hf_names, part)
    if len(together) > 1 and part in ("q", "k", "v") and family.qkv_order == "kv_heads":
        return _head_runs(config, part, rows)
    shapes = part_shapes(config)
    before = sum(shapes[other][0] for other in together[:together.index(part)])
    return [slice(before + rows.start, before + rows.stop)]


def expected_shapes(family: Family, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that the files of this model must hold, by its Hugging Face name, with its whole shape.

    An iterator, so that a damaged number of layers ends at the first tensor that is not there.
    """
    names, shapes, biased = family.hf_names, part_shapes(config), family.biased(config)
    for part in (field.name for field in fields(TensorNames)):
        pattern = names.of(part)
        if pattern is None or (part == "lm_head" and config.tie_word_embeddings):
            continue
        together = _one_tensor_with(names, part)
        if part != together[0]:
            continue
        shape = (sum(shapes[other][0] for other in together), *shapes[part][1:])
        has_bias = part in biased or (part in _NORMS and family.norm == "layer")
        for layer in range(config.num_layers if "{i}" in pattern else 1):
            for expert in range(config.num_experts if "{e}" in pattern else 1):
                module = pattern.format(i=layer, e=expert)
                yield f"{module}.weight", shape[::-1] if part in family.transposed else shape
                if has_bias:
                    yield f"{module}.bias", shape[:1]


def _one_tensor_with(names: TensorNames, part: str) -> tuple[str, ...]:
    return tuple(field.name for field in fields(names) if names.of(field.name) == names.of(part))


def _head_runs(config: ModelConfig, part: str, rows: range) -> list[slice]:
    ratio, dim = config.num_heads // config.total_num_kv_heads, config.head_dim
    heads_per_group = ratio if part == "q" else 1
    first = {"q": 0, "k": ratio, "v": ratio + 1}[part]
    runs: list[slice] = []
    for head in range(rows.start // dim, rows.stop // dim):
        group, place = divmod(head, heads_per_group)
        start = (group * (ratio + 2) + first + place) * dim
        if runs and runs[-1].stop == start:
            runs[-1] = slice(runs[-1].start, start + dim)
        else:
            runs.append(slice(start, start + dim))
    return runs
