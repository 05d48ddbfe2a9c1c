"""Weights in a GGUF file, presented as if they were a Hugging Face checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ...kernels import QuantizedWeight
from ...protos.errors import ModelLoadError
from ...protos.model import ModelConfig
from ..families import TensorNames, family_of
from ..families.gguf_header import GGUFTensor, read_gguf_header
from .gguf_codes import KINDS, quantized_weight
from .source import WeightSource

# gguf dequantizes 16 rows at a time; at this row length its temporaries stay in the cache, and it runs twice as fast.
_ROW_ELEMENTS = 2048
_T = TypeVar("_T", bound=np.generic)
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class _Entry:
    tensor: GGUFTensor
    interleaved: bool
    """Rows of each head lie in rotary pairs (0, d/2, 1, d/2 + 1, ...) and are put back in order when read."""
    transposed: bool
    """The checkpoint that this stands for holds columns first."""
    offset: float
    """Was added to every element when the file was made, and is taken off again."""


class GGUFSource(WeightSource):
    """Maps the file; `read` dequantizes only the blocks that the slice touches, to float32."""

    def __init__(self, config: ModelConfig) -> None:
        header = read_gguf_header(config.path)
        self._path = config.path
        self._head_dim = config.head_dim
        self._entries: dict[str, _Entry] = {}
        family = family_of(config)
        if family.gguf is None:
            raise ModelLoadError(f"{config.path}: GGUF files of {family.name} are not supported")
        layout = family.gguf
        parts = {layout.names.of(field.name): field.name for field in fields(TensorNames)}
        for tensor in header.tensors.values():
            module, _, kind = tensor.name.rpartition(".")
            layer = _LAYER.search(module)
            part = parts.get(_LAYER.sub("{i}", module, count=1))
            if part is None:
                continue
            pattern = family.hf_names.of(part) or ""
            for expert, held in enumerate(_experts(tensor) if "{e}" in pattern else [tensor]):
                self._entries[f"{pattern.format(i=layer and layer[0], e=expert)}.{kind}"] = _Entry(
                    held, interleaved=layout.interleaves_rope and part in ("q", "k"),
                    transposed=part in family.transposed and kind == "weight",
                    offset=1.0 if family.norm == "rms_plus_one" and part.endswith("_norm") else 0.0)
        for kind_of, name in {entry.tensor.kind: entry.tensor.name for entry in self._entries.values()}.items():
            self._check_kind(kind_of, name)
        self._bytes: npt.NDArray[np.uint8] = np.memmap(config.path, np.uint8, "r")

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self._entries[name]
        return entry.tensor.shape[::-1] if entry.transposed else entry.tensor.shape

    def file_of(self, name: str) -> str:  # noqa: ARG002
        return self._path

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:
        entry = self._entries[name]
        if entry.transposed:
            rows, columns = columns, rows
        values = self._values(entry, rows, columns)
        if entry.offset:
            values = values - np.float32(entry.offset)
        return torch.from_numpy(np.ascontiguousarray(values.T if entry.transposed else values))

    def read_quantized(self, name: str, kind: str, rows: slice | None = None,
                       columns: slice | None = None) -> QuantizedWeight | None:
        entry = self._entries[name]
        if KINDS.get(entry.tensor.kind) != kind or entry.transposed or entry.offset:
            return None
        blocks, inner_rows, inner_columns = self._blocks(entry, rows, columns)
        if inner_columns.start or inner_columns.stop % GGML_QUANT_SIZES[entry.tensor.kind][0]:
            return None
        return quantized_weight((self._in_order(blocks) if entry.interleaved else blocks)[inner_rows],
                                entry.tensor.kind)

    def _values(self, entry: _Entry, rows: slice | None, columns: slice | None) -> npt.NDArray[np.float32]:
        """The slice as the file has it, rows in order: an array of its own."""
        tensor = entry.tensor
        if len(tensor.shape) == 1:
            data = self._bytes[tensor.offset:tensor.offset + tensor.num_bytes]
            values = _dequantize(data[None], tensor.kind)[0]
            if entry.interleaved:
                values = self._in_order(values)
            whole: npt.NDArray[np.float32] = values[rows or slice(None)]
            return whole

        # Cut on whole heads and quantization blocks first, on the exact borders once the numbers are there.
        data, inner_rows, inner_columns = self._blocks(entry, rows, columns)
        values = _dequantize(data, tensor.kind)
        if entry.interleaved:
            values = self._in_order(values)
        part: npt.NDArray[np.float32] = values[inner_rows, inner_columns]
        return part

    def _blocks(self, entry: _Entry, rows: slice | None, columns: slice | None,
                ) -> tuple[npt.NDArray[np.uint8], slice, slice]:
        """`[R, row_bytes]`, the heads and quantization blocks that hold a slice of a matrix, as the file has them, and
        the slice as seen from their start."""
        tensor = entry.tensor
        block_size, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        num_rows, num_columns = tensor.shape
        outer_rows, inner_rows = _widen(rows, num_rows, self._head_dim if entry.interleaved else 1)
        outer_columns, inner_columns = _widen(columns, num_columns, block_size)
        data = self._bytes[tensor.offset:tensor.offset + tensor.num_bytes].reshape(num_rows, -1)[
            outer_rows, outer_columns.start // block_size * block_bytes:outer_columns.stop // block_size * block_bytes]
        return data, inner_rows, inner_columns

    def _in_order(self, values: npt.NDArray[_T]) -> npt.NDArray[_T]:
        pairs = values.reshape(-1, self._head_dim // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def _check_kind(self, kind: GGMLQuantizationType, name: str) -> None:
        try:
            dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError:
            raise ModelLoadError(f"{self._path}: tensor {name} is of type {kind.name}, which cannot be dequantized; "
                                 "use another quantization of the model") from None


def _experts(tensor: GGUFTensor) -> list[GGUFTensor]:
    """The tensors of the experts, which lie one after another in one."""
    count, *shape = tensor.shape
    size = tensor.num_bytes // max(1, count)
    return [replace(tensor, shape=tuple(shape), offset=tensor.offset + expert * size, num_bytes=size)
            for expert in range(count)]


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
