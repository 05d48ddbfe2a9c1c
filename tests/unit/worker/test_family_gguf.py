"""Every family's GGUF files, written as llama.cpp's converter does, against the model in Transformers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from kvarto.protos.errors import ModelLoadError
from kvarto.worker.families import read_model_config

_spec = importlib.util.spec_from_file_location("family_models", Path(__file__).with_name("family_models.py"))
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

GEMMA = models.GEMMA | {"query_pre_attn_scalar": 16, "num_hidden_layers": 6}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 5.0, 9.0]}
# By a name of the variant: architecture, class, what differs from its defaults.
MODELS = {
    "mistral": (gguf.MODEL_ARCH.LLAMA, *models.MODELS["mistral"]),
    "mixtral": (gguf.MODEL_ARCH.LLAMA, *models.MODELS["mixtral"]),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, *models.MODELS["qwen2"]),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, *models.MODELS["qwen3"]),
    "qwen3moe": (gguf.MODEL_ARCH.QWEN3MOE, *models.MODELS["qwen3_moe-normalized"]),
    "gpt2": (gguf.MODEL_ARCH.GPT2, *models.MODELS["gpt2"]),
    "starcoder": (gguf.MODEL_ARCH.STARCODER, *models.MODELS["gpt_bigcode-mqa"]),
    "phi3": (gguf.MODEL_ARCH.PHI3, *models.MODELS["phi3"]),
    "phi3-partial": (gguf.MODEL_ARCH.PHI3, "Phi3", models.GQA | {"hidden_size": 112, "rope_parameters": HALF}),
    "phi3-long": (gguf.MODEL_ARCH.PHI3, "Phi3", models.GQA | {
        "original_max_position_embeddings": 64, "rope_parameters": LONG}),
    "gemma2": (gguf.MODEL_ARCH.GEMMA2, "Gemma2", GEMMA | {
        "attn_logit_softcapping": None, "final_logit_softcapping": 3.0}),
    "gemma3": (gguf.MODEL_ARCH.GEMMA3, "Gemma3", GEMMA),
}


def tensors_of(directory, arch, config):
    """The checkpoint's tensors as the converter writes them: (name, values)."""
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    experts: dict[str, list[np.ndarray]] = {}
    for hf_name, tensor in sorted(load_file(directory / "model.safetensors").items()):
        values = tensor
        heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
        for part, count in heads.items():
            if arch == gguf.MODEL_ARCH.LLAMA and part in hf_name:
                values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if arch == gguf.MODEL_ARCH.GPT2 and re.search(r"(c_attn|c_proj|c_fc)\.weight", hf_name):
            values = values.T
        if arch in (gguf.MODEL_ARCH.GEMMA2, gguf.MODEL_ARCH.GEMMA3) and hf_name.endswith("norm.weight"):
            values = values + 1
        merged = re.sub(r"experts\.\d+\.", "experts.", hf_name)
        if merged != hf_name:
            experts.setdefault(names.get_name(merged, (".weight",)), []).append(values)
        else:
            yield names.get_name(hf_name, (".weight", ".bias")), np.ascontiguousarray(values)
    yield from ((name, np.stack(parts)) for name, parts in experts.items())


def write(directory, arch, model, extra=None) -> str:
    config, path = model.config, str(directory / "model.gguf")
    name = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "n_inner", None) or config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_eos_token_id(2)
    if hasattr(config, "num_key_value_heads"):
        writer.add_head_count_kv(config.num_key_value_heads)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    if hasattr(config, "layer_norm_epsilon"):
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rope = config.rope_parameters
        rope = rope.get("full_attention", rope)
        writer.add_rope_freq_base(rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            head_dim = config.hidden_size // config.num_attention_heads
            writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
        if rope["rope_type"] == "longrope":
            original = config.original_max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(original)
            factor = np.sqrt(1 + np.log(config.max_position_embeddings / original) / np.log(original))
            writer.add_rope_scaling_attn_factors(float(factor))
            for kind in ("short", "long"):
                writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if getattr(config, "num_local_experts", None):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for tensor_name, values in tensors_of(directory, arch, config):
        writer.add_tensor(tensor_name, values)
    for tensor_name, values in (extra or {}).items():
        writer.add_tensor(tensor_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path, name, tp_size):
    arch, class_name, settings = MODELS[name]
    model = models.make(tmp_path, class_name, settings)
    config = read_model_config(write(tmp_path, arch, model))
    # Gemma 2 has one wherever the file does not say, which the kernels do not compute yet.
    config = msgspec.structs.replace(config, attention_softcap=None)
    for logits in models.on_ranks(tp_size, lambda comm: models.Driver(config, comm).step(models.PROMPTS, [0, 0, 0])):
        for rows, prompt in zip(logits, models.PROMPTS, strict=True):
            torch.testing.assert_close(rows, models.expected_logits(model, prompt), atol=1e-4, rtol=1e-5)


def test_gemma2_without_a_word_on_soft_caps_has_them(tmp_path):
    model = models.make(tmp_path, "Gemma2", models.GEMMA | {"final_logit_softcapping": None})
    config = read_model_config(write(tmp_path, gguf.MODEL_ARCH.GEMMA2, model))
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)
    assert config.layer_windows == (64, None, 64)


def test_a_bias_that_the_family_does_not_know_is_refused(tmp_path):
    arch, class_name, settings = MODELS["mixtral"]
    model = models.make(tmp_path, class_name, settings)
    path = write(tmp_path, arch, model, extra={"blk.0.attn_q.bias": np.zeros(56, np.float32)})
    with pytest.raises(ModelLoadError, match=r"model\.gguf: tensor blk\.0\.attn_q\.bias is not supported for mixtral"):
        read_model_config(path)


def test_experts_of_a_family_without_any_are_refused(tmp_path):
    model = models.make_model(tmp_path, "qwen2")
    model.config.num_local_experts, model.config.num_experts_per_tok = 4, 2
    with pytest.raises(ModelLoadError, match="GGUF architecture 'qwen2' with experts is not supported"):
        read_model_config(write(tmp_path, gguf.MODEL_ARCH.QWEN2, model))
