"""What the decoder asks of a model's files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch

from ...kernels import QuantizedWeight
from ...protos.errors import ModelLoadError
from ...protos.model import ModelConfig
from ..families import expected_shapes, family_of


class WeightSource(ABC):
    """The tensors of one model, under their Hugging Face names whatever the file format.

    Opening one reads headers only. It may be read from several threads.
    """

    @abstractmethod
    def names(self) -> Collection[str]:
        """Every tensor that the files hold."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor. `name` must be one of `names()`."""

    @abstractmethod
    def file_of(self, name: str) -> str:
        """The file that holds `name`, or would hold it; for messages."""

    @abstractmethod
    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:
        """`tensor[rows, columns]`, reading no more of the file than that takes.

        `rows` cuts the first dimension and `columns` the second; both have a start and a stop inside the shape and no
        step. Returns a contiguous tensor on the CPU that the caller owns, in the dtype of the file; float32 where the
        file is quantized. Raises `ModelLoadError` when the bytes cannot be read.
        """

    def read_quantized(self, name: str, kind: str, rows: slice | None = None,  # noqa: ARG002
                       columns: slice | None = None) -> QuantizedWeight | None:  # noqa: ARG002
        """The same slice of a weight as codes of `kind`, where the file holds it so; None where it does not, or where
        the slice cuts a group of them."""
        return None


def check_tensors(source: WeightSource, config: ModelConfig) -> None:
    """Raises `ModelLoadError` unless `source` holds every tensor of the model in its shape."""
    names = source.names()
    for name, shape in expected_shapes(family_of(config), config):
        if name not in names:
            raise ModelLoadError(f"{source.file_of(name)}: tensor {name} is missing; the model's files are incomplete "
                                 "or do not belong to its configuration, fetch them again")
        if source.shape(name) != shape:
            raise ModelLoadError(f"{source.file_of(name)}: tensor {name} has shape {list(source.shape(name))}, the "
                                 f"model's configuration asks for {list(shape)}")
