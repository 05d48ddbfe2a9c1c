"""The table of families: supporting one more means one more spec file and one more name here."""

from __future__ import annotations

from ...protos.errors import ModelLoadError
from ...protos.model import ModelConfig
from .falcon import FALCON, FALCON_40B
from .family import Family, GGUFLayout
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3
from .gpt2 import GPT2
from .gpt_bigcode import GPT_BIGCODE
from .llama import LLAMA
from .metadata import Metadata
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE

FAMILIES = {family.name: family for family in (
    LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, PHI3, GPT2, GPT_BIGCODE,
    FALCON, FALCON_40B)}


def family_of(config: ModelConfig) -> Family:
    """The spec that `config.family` names. Raises `ModelLoadError` if this version does not know it."""
    try:
        return FAMILIES[config.family]
    except KeyError:
        raise ModelLoadError(
            f"unknown model family '{config.family}'; known: {', '.join(FAMILIES)}") from None


def family_of_hf(architecture: str | None, meta: Metadata) -> Family:
    """The family of a `config.json`. Raises `ModelLoadError` that lists what is supported."""
    model_type = meta.text("model_type", "")
    for family in FAMILIES.values():
        named = architecture in family.architectures or (architecture is None and model_type in family.model_types)
        if named and all(meta.has(key, value) for key, value in family.when.items()):
            return family
    supported = sorted({name for family in FAMILIES.values() for name in family.architectures})
    found = architecture or f"model_type '{model_type}'"
    raise ModelLoadError(f"{meta.path}: architecture {found} is not supported; supported: {', '.join(supported)}")


def family_of_gguf(architecture: str, path: str, *, has_experts: bool) -> tuple[Family, GGUFLayout]:
    """The family of a GGUF file at `path`, and how the file holds it: one architecture may be a family with experts
    and one without. Raises `ModelLoadError` that lists what is supported."""
    readable = [(family, family.gguf) for family in FAMILIES.values() if family.gguf is not None]
    for family, layout in readable:
        if architecture in layout.architectures and family.has_experts == has_experts:
            return family, layout
    supported = sorted({name for _, layout in readable for name in layout.architectures})
    experts = " with experts" if has_experts else ""
    raise ModelLoadError(
        f"{path}: GGUF architecture '{architecture}'{experts} is not supported; supported: {', '.join(supported)}")
