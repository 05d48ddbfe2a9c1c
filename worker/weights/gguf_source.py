"""Weights in a GGUF file, presented as if they were a Hugging Face checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ...protos.errors import ModelLoadError
from ...protos.model import ModelConfig
from ..families import TensorNames, family_of
from ..families.gguf_header import GGUFTensor, read_gguf_header
from .source import WeightSource

# gguf dequantizes 16 rows at a time; at this row length its temporaries stay in the cache, and it runs twice as fast.
_ROW_ELEMENTS = 2048
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class _Entry:
    tensor: GGUFTensor
    interleaved: bool
    """Rows of each head lie in rotary pairs (0, d/2, 1, d/2 + 1, ...) and are put back in order when read."""


class GGUFSource(WeightSource):
    """Maps the file; `read` dequantizes only the blocks that the slice touches, to float32."""

    def __init__(self, config: ModelConfig) -> None:
        header = read_gguf_header(config.path)
        self._path = config.path
        self._head_dim = config.head_dim
        self._entries: dict[str, _Entry] = {}
        family = family_of(config)
        parts = {getattr(family.gguf_names, field.name): field.name for field in fields(TensorNames)}
        for tensor in header.tensors.values():
            module, _, kind = tensor.name.rpartition(".")
            layer = _LAYER.search(module)
            part = parts.get(_LAYER.sub("{i}", module, count=1))
            if part is not None:
                hf_module = getattr(family.hf_names, part).format(i=layer and layer[0])
                self._entries[f"{hf_module}.{kind}"] = _Entry(
                    tensor, interleaved=family.gguf_interleaves_rope and part in ("q", "k"))
        for kind_of, name in {entry.tensor.kind: entry.tensor.name for entry in self._entries.values()}.items():
            self._check_kind(kind_of, name)
        self._bytes: npt.NDArray[np.uint8] = np.memmap(config.path, np.uint8, "r")

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].tensor.shape

    def file_of(self, name: str) -> str:  # noqa: ARG002
        return self._path

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:
        entry = self._entries[name]
        tensor = entry.tensor
        data = self._bytes[tensor.offset:tensor.offset + tensor.num_bytes]
        if len(tensor.shape) == 1:
            values = _dequantize(data[None], tensor.kind)[0]
            if entry.interleaved:
                values = self._in_order(values)
            return torch.from_numpy(np.array(values[rows or slice(None)]))

        # Cut on whole heads and quantization blocks first, on the exact borders once the numbers are there.
        block_size, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        num_rows, num_columns = tensor.shape
        outer_rows, inner_rows = _widen(rows, num_rows, self._head_dim if entry.interleaved else 1)
        outer_columns, inner_columns = _widen(columns, num_columns, block_size)
        data = data.reshape(num_rows, -1)[
            outer_rows, outer_columns.start // block_size * block_bytes:outer_columns.stop // block_size * block_bytes]
        values = _dequantize(data, tensor.kind)
        if entry.interleaved:
            values = self._in_order(values)
        return torch.from_numpy(np.ascontiguousarray(values[inner_rows, inner_columns]))

    def _in_order(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        pairs = values.reshape(-1, self._head_dim // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def _check_kind(self, kind: GGMLQuantizationType, name: str) -> None:
        try:
            dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError:
            raise ModelLoadError(f"{self._path}: tensor {name} is of type {kind.name}, which cannot be dequantized; "
                                 "use another quantization of the model") from None


def _widen(cut: slice | None, size: int, unit: int) -> tuple[slice, slice]:
    """The smallest run of whole units that holds `cut`, and `cut` as seen from its start."""
    start, stop = (cut.start, cut.stop) if cut is not None else (0, size)
    outer = slice(start // unit * unit, -(-stop // unit) * unit)
    return outer, slice(start - outer.start, stop - outer.start)


def _dequantize(data: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """`[R, row_bytes]` -> float32 `[R, row_elements]`, a copy."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    num_rows = data.shape[0]
    num_blocks = data.size // block_bytes
    per_row = max(1, _ROW_ELEMENTS // block_size)
    while num_blocks % per_row:
        per_row -= 1
    values = dequantize(np.array(data).reshape(-1, per_row * block_bytes), kind)
    return values.reshape(num_rows, -1)
