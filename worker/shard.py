"""One rank's share of every weight, read from disk and packed for the kernels."""

from __future__ import annotations

import torch

from ..kernels import PackedLinear, QuantizedWeight, pack_linear, quantize_weight
from ..protos.errors import ModelLoadError
from ..protos.model import ModelConfig
from .families import family_of, row_runs
from .layout import TPLayout
from .norms import Norm
from .weights import WeightSource


class ShardReader:
    """Reads the parts of `TensorNames` for the rank of `layout`, and nothing of the other ranks'."""

    def __init__(self, config: ModelConfig, layout: TPLayout, source: WeightSource, dtype: torch.dtype,
                 device: torch.device, quantization: str = "none") -> None:
        """`quantization` as in `RankConfig`."""
        self.family = family_of(config)
        self._config = config
        self._biased = self.family.biased(config)
        self._source = source
        self._dtype = dtype
        self._device = device
        self._quantization = quantization
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

    def lm_head(self, embedding: torch.Tensor) -> PackedLinear:
        """This rank's rows; `embedding` are those of the embedding, with which a model may tie them."""
        if not self._config.tie_word_embeddings:
            return self.column_parallel(("lm_head",))
        return pack_linear(embedding) if self._quantization == "none" else self.column_parallel(("embedding",))

    def replicated(self, part: str, layer: int) -> PackedLinear:
        """A weight that every rank holds, and holds as it is: of routers, which are small and choose."""
        return pack_linear(self._read(part, layer))

    def column_parallel(self, parts: tuple[str, ...], layer: int = 0, expert: int = 0) -> PackedLinear:
        """This rank's rows of several weights that read the same input, stacked into one."""
        weight = self._weight(parts, layer, expert, rows=[self._rows[part] for part in parts])
        if not set(parts) & set(self._biased):
            return pack_linear(weight)
        biases = [self._read(part, layer, expert, "bias", rows=self._rows[part]) if part in self._biased
                  else torch.zeros(len(self._rows[part]), dtype=self._dtype, device=self._device) for part in parts]
        return pack_linear(weight, torch.cat(biases))

    def row_parallel(self, part: str, layer: int, expert: int = 0) -> PackedLinear:
        """This rank's columns of one weight; the outputs of all ranks add up to the whole, bias included."""
        weight = self._weight((part,), layer, expert, columns=self._columns[part])
        if part not in self._biased or not self._holds_row_parallel_bias:
            return pack_linear(weight)
        return pack_linear(weight, self._read(part, layer, expert, "bias"))

    def _weight(self, parts: tuple[str, ...], layer: int, expert: int, rows: list[range] | None = None,
                columns: range | None = None) -> torch.Tensor | QuantizedWeight:
        """Of a linear layer, the parts one below the other: as `quantization` wants it."""
        of_parts = list(zip(parts, [None] * len(parts) if rows is None else rows, strict=True))
        if self._quantization == "none":
            weights = [self._read(part, layer, expert, rows=run, columns=columns) for part, run in of_parts]
            return weights[0] if len(weights) == 1 else torch.cat(weights)
        return QuantizedWeight.cat([self._quantized(part, layer, expert, run, columns) for part, run in of_parts])

    def _quantized(self, part: str, layer: int, expert: int, rows: range | None, columns: range | None,
                   ) -> QuantizedWeight:
        # What the LM head gets wrong is a wrong token: it keeps eight bits, as GGML's files have it too.
        kind = "int8" if part in ("embedding", "lm_head") else self._quantization
        name = self._name(part, layer, expert, "weight")
        cut = None if columns is None else slice(columns.start, columns.stop)
        runs = [None] if rows is None else row_runs(self.family, self._config, part, rows)
        if part not in self.family.transposed:
            stored = [self._source.read_quantized(name, kind, run, cut) for run in runs]
            if all(stored):
                return QuantizedWeight.cat([weight for weight in stored if weight is not None])
        try:
            return quantize_weight(self._read(part, layer, expert, rows=rows, columns=columns, dtype=torch.float32),
                                   kind)
        except ValueError as error:
            raise ModelLoadError(f"{self._source.file_of(name)}: tensor {name}: {error}; use another --quantization, "
                                 "or none") from None

    def _name(self, part: str, layer: int, expert: int, kind: str) -> str:
        return f"{str(self.family.hf_names.of(part)).format(i=layer, e=expert)}.{kind}"

    def _read(self, part: str, layer: int = 0, expert: int = 0, kind: str = "weight", rows: range | None = None,
              columns: range | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        name = self._name(part, layer, expert, kind)
        cut = None if columns is None else slice(columns.start, columns.stop)
        runs = [None] if rows is None else row_runs(self.family, self._config, part, rows)
        if kind == "weight" and part in self.family.transposed:
            pieces = [self._source.read(name, cut, run).T for run in runs]
        else:
            pieces = [self._source.read(name, run, cut) for run in runs]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return tensor.to(self._device, dtype or self._dtype)
