"""One rank's share of every weight, read from disk and packed for the kernels."""

from __future__ import annotations

import torch

from ..kernels import PackedLinear, pack_linear
from ..protos.model import ModelConfig
from .families import family_of
from .layout import TPLayout
from .weights import WeightSource


class ShardReader:
    """Reads the parts of `TensorNames` for the rank of `layout`, and nothing of the other ranks'."""

    def __init__(self, config: ModelConfig, layout: TPLayout, source: WeightSource, dtype: torch.dtype,
                 device: torch.device) -> None:
        family = family_of(config)
        self._names = family.hf_names
        self._biased = family.biased(config)
        self._source = source
        self._dtype = dtype
        self._device = device
        self._holds_row_parallel_bias = layout.rank == 0
        q = slice(layout.q_heads.start * config.head_dim, layout.q_heads.stop * config.head_dim)
        kv = slice(layout.kv_heads.start * config.head_dim, layout.kv_heads.stop * config.head_dim)
        mlp = slice(layout.mlp_columns.start, layout.mlp_columns.stop)
        vocab = slice(layout.vocab.start, layout.vocab.stop)
        self._rows = {"q": q, "k": kv, "v": kv, "gate": mlp, "up": mlp, "embedding": vocab, "lm_head": vocab}
        self._columns = {"o": q, "down": mlp}

    def whole(self, part: str, layer: int = 0) -> torch.Tensor:
        """A weight that every rank holds."""
        return self._read(part, layer, "weight")

    def rows(self, part: str, layer: int = 0) -> torch.Tensor:
        """This rank's rows of one weight: `[local_rows, in_features]`."""
        return self._read(part, layer, "weight", rows=self._rows[part])

    def column_parallel(self, parts: tuple[str, ...], layer: int = 0) -> PackedLinear:
        """This rank's rows of several weights that read the same input, stacked into one."""
        weight = self.rows(parts[0], layer) if len(parts) == 1 else torch.cat([self.rows(p, layer) for p in parts])
        if not set(parts) & set(self._biased):
            return pack_linear(weight)
        biases = [self._read(part, layer, "bias", rows=self._rows[part]) if part in self._biased
                  else weight.new_zeros(self._rows[part].stop - self._rows[part].start) for part in parts]
        return pack_linear(weight, torch.cat(biases))

    def row_parallel(self, part: str, layer: int) -> PackedLinear:
        """This rank's columns of one weight; the outputs of all ranks add up to the whole, bias included."""
        weight = self._read(part, layer, "weight", columns=self._columns[part])
        if part not in self._biased or not self._holds_row_parallel_bias:
            return pack_linear(weight)
        return pack_linear(weight, self._read(part, layer, "bias"))

    def _read(self, part: str, layer: int, kind: str, rows: slice | None = None,
              columns: slice | None = None) -> torch.Tensor:
        module: str = getattr(self._names, part)
        tensor = self._source.read(f"{module.format(i=layer)}.{kind}", rows, columns)
        return tensor.to(self._device, self._dtype)
