"""One rank's share of every weight, read from disk and packed for the kernels."""

from __future__ import annotations

import torch

from ..kernels import PackedLinear, pack_linear
from ..protos.model import ModelConfig
from .families import family_of, row_runs
from .layout import TPLayout
from .norms import Norm
from .weights import WeightSource


class ShardReader:
    """Reads the parts of `TensorNames` for the rank of `layout`, and nothing of the other ranks'."""

    def __init__(self, config: ModelConfig, layout: TPLayout, source: WeightSource, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.family = family_of(config)
        self._config = config
        self._biased = self.family.biased(config)
        self._source = source
        self._dtype = dtype
        self._device = device
        self._holds_row_parallel_bias = layout.rank == 0
        q = range(layout.q_heads.start * config.head_dim, layout.q_heads.stop * config.head_dim)
        kv = range(layout.kv_heads.start * config.head_dim, layout.kv_heads.stop * config.head_dim)
        mlp, vocab = layout.mlp_columns, layout.vocab
        self._rows = {"q": q, "k": kv, "v": kv, "gate": mlp, "up": mlp, "embedding": vocab, "lm_head": vocab}
        self._columns = {"o": q, "down": mlp}

    def norm(self, part: str, layer: int = 0) -> Norm:
        """A norm, which every rank holds."""
        kind = self.family.norm
        return Norm(kind, self._read(part, layer), self._read(part, layer, kind="bias") if kind == "layer" else None,
                    self._config.norm_eps)

    def optional_norm(self, part: str, layer: int) -> Norm | None:
        """The same; None where the family has no such norm."""
        return None if self.family.hf_names.of(part) is None else self.norm(part, layer)

    def positions(self, count: int) -> torch.Tensor | None:
        """`[count, hidden_size]`, the first learned positions; None where the family has rotary ones."""
        return None if self.family.hf_names.positions is None else self._read("positions", rows=range(count))

    def rows(self, part: str) -> torch.Tensor:
        """This rank's rows of one weight: `[local_rows, in_features]`."""
        return self._read(part, rows=self._rows[part])

    def replicated(self, part: str, layer: int) -> PackedLinear:
        """A weight that every rank holds."""
        return pack_linear(self._read(part, layer))

    def column_parallel(self, parts: tuple[str, ...], layer: int = 0, expert: int = 0) -> PackedLinear:
        """This rank's rows of several weights that read the same input, stacked into one."""
        weights = [self._read(part, layer, expert, rows=self._rows[part]) for part in parts]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if not set(parts) & set(self._biased):
            return pack_linear(weight)
        biases = [self._read(part, layer, expert, "bias", rows=self._rows[part]) if part in self._biased
                  else weight.new_zeros(len(self._rows[part])) for part in parts]
        return pack_linear(weight, torch.cat(biases))

    def row_parallel(self, part: str, layer: int, expert: int = 0) -> PackedLinear:
        """This rank's columns of one weight; the outputs of all ranks add up to the whole, bias included."""
        weight = self._read(part, layer, expert, columns=self._columns[part])
        if part not in self._biased or not self._holds_row_parallel_bias:
            return pack_linear(weight)
        return pack_linear(weight, self._read(part, layer, expert, "bias"))

    def _read(self, part: str, layer: int = 0, expert: int = 0, kind: str = "weight", rows: range | None = None,
              columns: range | None = None) -> torch.Tensor:
        name = f"{str(self.family.hf_names.of(part)).format(i=layer, e=expert)}.{kind}"
        cut = None if columns is None else slice(columns.start, columns.stop)
        runs = [None] if rows is None else row_runs(self.family, self._config, part, rows)
        if kind == "weight" and part in self.family.transposed:
            pieces = [self._source.read(name, cut, run).T for run in runs]
        else:
            pieces = [self._source.read(name, run, cut) for run in runs]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return tensor.to(self._device, self._dtype)
