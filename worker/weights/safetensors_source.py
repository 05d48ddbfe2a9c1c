"""Weights in safetensors files: one, or several that `model.safetensors.index.json` lists."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...protos.errors import ModelLoadError
from .source import WeightSource

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsSource(WeightSource):
    """Opens every file of `directory`; the library maps them, and checks each one's size against its header.

    Names are given with `prefix`, whether the files have it or leave it off."""

    def __init__(self, directory: str, prefix: str = "") -> None:
        self._root, files = _files(directory)
        self._slices: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file, wanted in files.items():
            handle = _open(file)
            held = list(handle.keys())
            for name in wanted - set(held):
                raise ModelLoadError(f"{file}: tensor {name} is missing, though {self._root} says that it is there; "
                                     "fetch the file again")
            for name in held:
                view = handle.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise ModelLoadError(f"{file}: tensor {name} has dtype {view.get_dtype()}, supported are "
                                         f"{', '.join(_DTYPES)}; use the original weights or a .gguf file")
                self._slices[name], self._file_of[name] = view, file
        if not any(name.startswith(prefix) for name in self._slices):
            self._slices = {prefix + name: view for name, view in self._slices.items()}
            self._file_of = {prefix + name: file for name, file in self._file_of.items()}

    def names(self) -> Collection[str]:
        return self._slices.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def file_of(self, name: str) -> str:
        return self._file_of.get(name, self._root)

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:
        index = (rows or slice(None),) if columns is None else (rows or slice(None), columns)
        try:
            tensor: torch.Tensor = self._slices[name][index]
        except SafetensorError as error:
            raise ModelLoadError(f"{self.file_of(name)}: tensor {name} cannot be read: {error}") from error
        # It may be a view of the mapped file, which must not outlive the file nor be written to.
        return tensor.clone(memory_format=torch.contiguous_format)


def _files(directory: str) -> tuple[str, dict[str, set[str]]]:
    """The file to name in messages, and the safetensors files with the tensors that each is said to hold."""
    index = os.path.join(directory, _INDEX)
    single = os.path.join(directory, _SINGLE)
    if not os.path.isfile(index):
        if not os.path.isfile(single):
            raise ModelLoadError(f"{directory}: neither {_SINGLE} nor {_INDEX}; kvarto reads safetensors and GGUF, "
                                 "other formats must be converted first")
        return single, {single: set()}
    try:
        with open(index, encoding="utf-8") as file:
            files: dict[str, set[str]] = {}
            for name, shard in json.load(file)["weight_map"].items():
                files.setdefault(os.path.join(directory, shard), set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index}: not a usable index ({error!r}); fetch the file again") from None
    for shard_path in files:
        if not os.path.isfile(shard_path):
            raise ModelLoadError(f"{shard_path}: missing, though {index} lists it; fetch the file")
    return index, files


def _open(file: str) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file}: truncated or damaged ({error}); fetch the file again") from None
