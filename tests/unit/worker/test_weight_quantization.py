"""Decoders with weights of int8 and int4: logits are those of Transformers where the weights of its linear layers are
read back from codes and their inputs rounded, as the definition says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from kvarto.kernels import quantize_weight
from kvarto.protos.errors import ModelLoadError
from kvarto.worker.families import read_model_config

_spec = importlib.util.spec_from_file_location("family_models", Path(__file__).with_name("family_models.py"))
assert _spec and _spec.loader
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

GROUP = 32
# Ranks cut the columns of these at whole groups.
ALIGNED = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128}
LAYER = {"num_hidden_layers": 1}
CASES = {
    "llama": ("Llama", models.GQA | LAYER),
    "tied": ("Llama", models.GQA | LAYER | {"tie_word_embeddings": True}),
    "biased": ("Qwen2", models.GQA | LAYER),
    "fused": ("Phi3", models.GQA | LAYER | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}),
    "transposed": ("GPT2LMHead", models.GPT | {"n_layer": 1}),
    "parallel": ("Falcon", models.FALCON | LAYER),
}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Groups of 32 by 255 codes each, in numbers and not in bytes; the last group may be shorter."""
    parts = []
    for group in x.split(GROUP, -1):
        step = group.abs().amax(-1, keepdim=True) / 127
        parts.append((group / step.where(step > 0, 1.0)).round() * step)
    return torch.cat(parts, -1)


def simulate(model, quantization: str) -> None:
    """Gives Transformers' linear layers weights that codes can hold, and inputs that are rounded."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            weight = module.weight.detach()
            rows = weight.T if isinstance(module, Conv1D) else weight
            read_back = quantize_weight(rows, "int8" if module is head else quantization).dequantized()
            # A parameter of its own: tied embeddings stay as they are.
            module.weight = torch.nn.Parameter(read_back.T if isinstance(module, Conv1D) else read_back)
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))


def check(directory, model, quantization: str, tp_size: int) -> None:
    simulate(model, quantization)
    config = read_model_config(str(directory))
    drivers = models.on_ranks(tp_size, lambda comm: models.Driver(config, comm, quantization=quantization).generate(
        models.PROMPTS, 6))
    for sequences, logits in drivers:
        for tokens, ours in zip(sequences, logits, strict=True):
            expected = models.expected_logits(model, tokens)
            errors = (ours - expected).abs().amax(-1)
            # Where a last bit sends a code the other way, an activation moves by 1/127 of its group's largest.
            assert (errors < 1e-3).float().mean() >= 0.75
            assert errors.max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_definition(tmp_path, case, quantization):
    check(tmp_path, models.make(tmp_path, *CASES[case]), quantization, 1)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_add_up_to_them(tmp_path, tp_size, quantization):
    check(tmp_path, models.make(tmp_path, "Llama", ALIGNED), quantization, tp_size)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_experts_are_quantized_and_their_router_is_not(tmp_path, quantization):
    models.make(tmp_path, "Mixtral", ALIGNED | {"num_local_experts": 4, "num_experts_per_tok": 2})
    decoder = models.Driver(read_model_config(str(tmp_path)), models.SingleRank(), quantization=quantization).decoder
    experts = decoder._layers[0].mlp
    assert experts.router.kind == torch.float32
    assert {mlp.inner.kind for mlp in experts.experts} == {mlp.down.kind for mlp in experts.experts} == {quantization}
    assert decoder._lm_head.kind == "int8"


def test_a_weight_that_codes_cannot_hold_is_refused_with_its_file(tmp_path):
    models.make(tmp_path, "Llama", ALIGNED)
    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"{file}: tensor model.layers.0.mlp.up_proj.weight: the weight has "
                                             "elements that int4 cannot hold"):
        models.Driver(read_model_config(str(tmp_path)), models.SingleRank(), quantization="int4")


@pytest.mark.parametrize(("kind", "quantization"), [(Kind.Q8_0, "int8"), (Kind.Q4_0, "int4"), (Kind.Q4_1, "int4")])
def test_codes_of_gguf_stand_for_its_numbers(kind, quantization):
    from kvarto.worker.weights.gguf_codes import KINDS, quantized_weight

    random = np.random.default_rng(0)
    blocks = gguf.quants.quantize(random.standard_normal((8, 128), dtype=np.float32), kind)
    weight = quantized_weight(blocks, kind)
    assert KINDS[kind] == weight.kind == quantization
    assert np.array_equal(weight.dequantized().numpy(), gguf.quants.dequantize(blocks, kind))
