"""The model families that kvarto runs, and how their files are read. Torch is not imported here."""

from __future__ import annotations

from .family import Family, TensorNames
from .reading import read_model_config
from .stored import expected_shapes, row_runs
from .table import FAMILIES, family_of

__all__ = ["FAMILIES", "Family", "TensorNames", "expected_shapes", "family_of", "read_model_config", "row_runs"]
