"""The table of families: supporting one more means one more spec file and one more name here."""

from __future__ import annotations

from ...protos.errors import ModelLoadError
from ...protos.model import ModelConfig
from .family import Family
from .llama import LLAMA

FAMILIES = {family.name: family for family in (LLAMA,)}


def family_of(config: ModelConfig) -> Family:
    """The spec that `config.family` names. Raises `ModelLoadError` if this version does not know it."""
    try:
        return FAMILIES[config.family]
    except KeyError:
        raise ModelLoadError(
            f"unknown model family '{config.family}'; known: {', '.join(FAMILIES)}") from None


def family_of_hf(architecture: str | None, model_type: str | None, path: str) -> Family:
    """The family of a `config.json` at `path`. Raises `ModelLoadError` that lists what is supported."""
    for family in FAMILIES.values():
        if architecture in family.architectures or (architecture is None and model_type in family.model_types):
            return family
    supported = sorted(name for family in FAMILIES.values() for name in family.architectures)
    found = architecture or f"model_type '{model_type}'"
    raise ModelLoadError(f"{path}: architecture {found} is not supported; supported: {', '.join(supported)}")


def family_of_gguf(architecture: str, path: str) -> Family:
    """The family of a GGUF file at `path`. Raises `ModelLoadError` that lists what is supported."""
    for family in FAMILIES.values():
        if architecture in family.gguf_architectures:
            return family
    supported = sorted(name for family in FAMILIES.values() for name in family.gguf_architectures)
    raise ModelLoadError(
        f"{path}: GGUF architecture '{architecture}' is not supported; supported: {', '.join(supported)}")
