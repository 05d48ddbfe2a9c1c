"""The header of a GGUF file: its scalars and where its tensors lie.

`gguf.GGUFReader` makes a Python object of every token and merge, which takes seconds for a file whose weights load in
one; nothing here needs those arrays, so they are stepped over.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from ...protos.errors import ModelLoadError

_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H", GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.FLOAT32: "<f", GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q", GGUFValueType.FLOAT64: "<d",
}
_MAX_DIMS = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is in the order of torch, rows first; `offset` counts from the file's start."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """`values` holds strings and scalars; arrays (vocabulary, merges) are left out."""

    path: str
    values: dict[str, object]
    tensors: dict[str, GGUFTensor]


def read_gguf_header(path: str) -> GGUFHeader:
    """Parse the header and check that every tensor lies inside the file. Raises `ModelLoadError`."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        raise ModelLoadError(f"{path}: damaged GGUF header ({error}); fetch the file again") from None


def _parse(path: str, data: mmap.mmap) -> GGUFHeader:
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    version, num_tensors, num_values = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"version {version}, known are 2 and 3, little-endian")
    cursor = _Cursor(data, 24)
    values: dict[str, object] = {}
    for _ in range(num_values):
        key = cursor.text()
        kind = GGUFValueType(cursor.integer("<I"))
        if kind == GGUFValueType.ARRAY:
            cursor.skip_array()
        elif kind == GGUFValueType.STRING:
            values[key] = cursor.text()
        else:
            values[key] = cursor.number(_SCALARS[kind])
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = values.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    tensors = {}
    for name, kind_of, shape, offset in infos:
        block_size, block_bytes = GGML_QUANT_SIZES[kind_of]
        if shape[-1] % block_size:
            raise ValueError(f"tensor {name}: rows of {shape[-1]} do not divide into {kind_of.name} blocks")
        num_bytes = math.prod(shape) // block_size * block_bytes
        if start + offset + num_bytes > len(data):
            raise ModelLoadError(f"{path}: truncated: tensor {name} ends at byte {start + offset + num_bytes}, the "
                                 f"file has {len(data)}; fetch it again")
        tensors[name] = GGUFTensor(name, kind_of, shape, start + offset, num_bytes)
    return GGUFHeader(path, values, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.text()
    num_dims = cursor.integer("<I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ValueError(f"tensor {name} has {num_dims} dimensions")
    dims = [cursor.integer("<Q") for _ in range(num_dims)]
    kind = GGMLQuantizationType(cursor.integer("<I"))
    return name, kind, tuple(reversed(dims)), cursor.integer("<Q")


class _Cursor:
    """Reads forward through the header; runs into `struct.error` or `ValueError` where the file ends too early."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self._data = data
        self.offset = offset

    def number(self, layout: str) -> int | float | bool:
        value: int | float | bool = struct.unpack_from(layout, self._data, self.offset)[0]
        self.offset += struct.calcsize(layout)
        return value

    def integer(self, layout: str) -> int:
        return int(self.number(layout))

    def text(self) -> str:
        (length,) = struct.unpack_from("<Q", self._data, self.offset)
        start = self.offset + 8
        if start + length > len(self._data):
            raise ValueError("a string runs past the end of the file")
        self.offset = start + length
        return self._data[start:self.offset].decode()

    def skip_array(self) -> None:
        kind, count = struct.unpack_from("<IQ", self._data, self.offset)
        self.offset += 12
        if kind != GGUFValueType.STRING:
            self.offset += count * struct.calcsize(_SCALARS[GGUFValueType(kind)])
            return
        unpack, data, offset = struct.Struct("<Q").unpack_from, self._data, self.offset
        for _ in range(count):
            offset += 8 + unpack(data, offset)[0]
        self.offset = offset
