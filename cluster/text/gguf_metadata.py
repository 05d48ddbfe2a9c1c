"""The key-value section of a GGUF file, and nothing else of it.

`gguf.GGUFReader` makes a numpy view of every string of the vocabulary, which takes seconds; this takes a tenth of one.
"""

from __future__ import annotations

import mmap
import struct

from ...protos.errors import ModelLoadError

Value = int | float | bool | str | list["Value"]

_SUPPORTED_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LENGTH = struct.Struct("<Q")


def read_metadata(path: str) -> dict[str, Value]:
    """Every key of the GGUF file at `path` with its value. Raises `ModelLoadError` when it is not one or is damaged."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).metadata(path)
    except (struct.error, UnicodeDecodeError, _DamagedError) as error:
        raise ModelLoadError(f"{path} is damaged: its metadata cannot be read ({error}); fetch it again") from None
    except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
        raise ModelLoadError(f"{path} cannot be read: {error}") from None


class _DamagedError(Exception):
    pass


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = 0

    def metadata(self, path: str) -> dict[str, Value]:
        magic = bytes(self._data[:4])
        if magic != b"GGUF":
            raise ModelLoadError(f"{path} is not a GGUF file: it begins with {magic!r}")
        self._position = 4
        version = self._scalar("I")
        if version not in _SUPPORTED_VERSIONS:
            raise ModelLoadError(f"{path} is GGUF version {version}; versions 2 and 3, little-endian, are supported")
        self._scalar("Q")  # number of tensors
        num_keys = int(self._scalar("Q"))
        return {self._string(): self._value(int(self._scalar("I"))) for _ in range(num_keys)}

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, count = int(self._scalar("I")), int(self._scalar("Q"))
            if item_kind in _SCALARS:
                return self._scalars(_SCALARS[item_kind], count)
            return [self._value(item_kind) for _ in range(count)]
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        raise _DamagedError(f"unknown value type {kind} at byte {self._position}")

    def _string(self) -> str:
        start = self._position + 8
        end = start + _LENGTH.unpack_from(self._data, self._position)[0]
        if end > len(self._data):
            raise _DamagedError(f"a string at byte {start} goes beyond the end of the file")
        self._position = end
        return str(self._data[start:end], "utf-8")

    def _scalar(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack_from("<" + code, self._data, self._position)[0]
        self._position += struct.calcsize("<" + code)
        return value

    def _scalars(self, code: str, count: int) -> list[Value]:
        num_bytes = count * struct.calcsize("<" + code)
        if self._position + num_bytes > len(self._data):
            raise _DamagedError(f"an array at byte {self._position} goes beyond the end of the file")
        values = struct.unpack_from(f"<{count}{code}", self._data, self._position)
        self._position += num_bytes
        return list(values)
