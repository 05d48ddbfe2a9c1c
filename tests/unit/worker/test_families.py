"""What `read_model_config` makes of a Hugging Face directory."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from transformers import GenerationConfig, LlamaConfig

from kvarto.protos.errors import ModelLoadError
from kvarto.protos.model import RopeScaling
from kvarto.worker.families import expected_shapes, family_of, read_model_config

LLAMA_JSON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "torch_dtype": "bfloat16",
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def directory(tmp_path):
    def write(changes=None, without=(), generation=None):
        values = {**LLAMA_JSON, **(changes or {})}
        for key in without:
            del values[key]
        (tmp_path / "config.json").write_text(json.dumps(values))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return str(tmp_path)
    return write


def test_config_of_transformers_4_is_read(directory):
    config = read_model_config(directory())
    assert (config.format, config.family) == ("hf", "llama")
    assert (config.num_layers, config.num_heads, config.total_num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert (config.rope_theta, config.torch_dtype) == (5000.0, "bfloat16")
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert not config.tie_word_embeddings


def test_config_of_transformers_5_is_read(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 7000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=32, rope_parameters=scaling,
                dtype="float16", tie_word_embeddings=True, attention_bias=True,
                architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[5, 6], bos_token_id=3).save_pretrained(tmp_path)
    config = read_model_config(str(tmp_path))
    assert config.rope_theta == 7000.0
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                              original_max_position_embeddings=64)
    assert (config.torch_dtype, config.head_dim, config.total_num_kv_heads) == ("float16", 32, 1)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (True, True, False)
    assert (config.bos_token_id, config.eos_token_ids) == (3, (5, 6))


def test_rope_scaling_of_transformers_4_is_read(directory):
    config = read_model_config(directory({"rope_scaling": {"type": "linear", "factor": 4}}))
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    assert config.rope_theta == 5000.0


@pytest.mark.parametrize(("in_config", "generation", "expected"), [
    (2, None, (2,)),
    ([2, 3], None, (2, 3)),
    (2, {"eos_token_id": [4, 2]}, (4, 2)),
    ([2, 3], {"eos_token_id": 4}, (4,)),
    (2, {"temperature": 0.6}, (2,)),
    (None, None, ()),
])
def test_eos_ids_come_from_generation_config_where_it_has_them(directory, in_config, generation, expected):
    assert read_model_config(directory({"eos_token_id": in_config}, generation=generation)).eos_token_ids == expected


def test_missing_kv_heads_mean_one_per_query_head(directory):
    assert read_model_config(directory(without=["num_key_value_heads"])).total_num_kv_heads == 4


def test_model_type_decides_where_no_architecture_is_named(directory):
    assert read_model_config(directory(without=["architectures"])).family == "llama"


def test_path_becomes_absolute(directory, monkeypatch):
    monkeypatch.chdir(directory())
    assert read_model_config(".").path == directory()


@pytest.mark.parametrize(("changes", "without", "message"), [
    ({"architectures": ["BertModel"]}, (), r"BertModel is not supported; supported: .*LlamaForCausalLM"),
    ({}, ("hidden_size",), "'hidden_size' is missing"),
    ({"num_hidden_layers": "two"}, (), "'num_hidden_layers' must be an integer of at least 1, got 'two'"),
    ({"num_hidden_layers": 0}, (), "'num_hidden_layers' must be an integer"),
    ({"rms_norm_eps": float("nan")}, (), "'rms_norm_eps' must be a positive, finite number"),
    ({"rope_theta": float("inf")}, (), "'rope_theta' must be a positive, finite number"),
    ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, (), "'ntk' is not supported; supported: default"),
    ({"rope_scaling": {"rope_type": "linear"}}, (), "'factor' is missing"),
    ({"rope_scaling": "linear"}, (), "'rope_scaling' must be an object"),
    ({"hidden_act": "gelu"}, (), "'gelu' is not supported"),
    ({"torch_dtype": "int8"}, (), "dtype 'int8' is not supported"),
    ({"quantization_config": {"quant_method": "gptq"}}, (), "pre-quantized"),
    ({"num_key_value_heads": 3}, (), "cannot share 3 KV heads"),
    ({"num_attention_heads": 5}, (), "does not divide by 5 heads"),
    ({"head_dim": 12}, (), "head_dim 12 is not supported"),
    ({"eos_token_id": 100}, (), r"\[100\] lie outside the vocabulary of 100"),
    ({"eos_token_id": "</s>"}, (), "'eos_token_id' must be a token id"),
    ({"tie_word_embeddings": "yes"}, (), "'tie_word_embeddings' must be true or false"),
    ({"architectures": "LlamaForCausalLM"}, (), "'architectures' must be a list of strings"),
])
def test_a_bad_config_is_refused_with_its_file_and_key(directory, changes, without, message):
    path = directory(changes, without)
    with pytest.raises(ModelLoadError, match=message) as caught:
        read_model_config(path)
    assert path in caught.value.message


def test_windows_of_transformers_4_configs_are_read(directory):
    def windows(architecture, num_layers, **changes):
        return read_model_config(directory({"architectures": [architecture], "num_hidden_layers": num_layers,
                                            "hidden_act": None, "query_pre_attn_scalar": 16, **changes})).layer_windows

    assert windows("MistralForCausalLM", 2) == (4096, 4096)
    assert windows("MistralForCausalLM", 2, sliding_window=None) == ()
    assert windows("MistralForCausalLM", 2, sliding_window=32) == (32, 32)
    assert windows("MixtralForCausalLM", 2, **EXPERTS) == ()
    assert windows("Qwen2ForCausalLM", 3, sliding_window=64, use_sliding_window=False) == ()
    assert windows("Qwen2ForCausalLM", 3, sliding_window=64, use_sliding_window=True,
                   max_window_layers=1) == (None, 64, 64)
    assert windows("Gemma2ForCausalLM", 3, sliding_window=64) == (64, None, 64)
    assert windows("Gemma3ForCausalLM", 7, sliding_window=64) == (64, 64, 64, 64, 64, None, 64)
    assert windows("Gemma3ForCausalLM", 3, sliding_window=64, sliding_window_pattern=2) == (64, None, 64)
    assert windows("Gemma3ForCausalLM", 2, sliding_window=64,
                   layer_types=["full_attention", "sliding_attention"]) == (None, 64)
    assert windows("LlamaForCausalLM", 2, sliding_window=64) == ()


def test_gemma3_of_transformers_4_is_read(directory):
    config = read_model_config(directory({
        "architectures": ["Gemma3ForCausalLM"], "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 32, "query_pre_attn_scalar": 64, "sliding_window": 512, "rope_theta": 2e6,
        "rope_local_base_freq": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}))
    assert (config.rope_theta, config.local_rope_theta) == (2e6, 300.0)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert (config.attention_scale, config.attention_softcap, config.final_softcap) == (0.125, None, None)
    assert (config.activation, config.tie_word_embeddings) == ("gelu_pytorch_tanh", True)


def test_gemma2_has_soft_caps_unless_they_are_null(directory):
    gemma = {"architectures": ["Gemma2ForCausalLM"], "hidden_act": None, "query_pre_attn_scalar": 16,
             "sliding_window": 64}
    caps = [(config.attention_softcap, config.final_softcap) for config in (
        read_model_config(directory(gemma)),
        read_model_config(directory(gemma | {"attn_logit_softcapping": None, "final_logit_softcapping": 20.0})))]
    assert caps == [(50.0, 30.0), (None, 20.0)]


def test_phi3_of_transformers_4_is_read(directory):
    config = read_model_config(directory({
        "architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5, "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2, 3, 4, 5]}}))
    assert config.rotary_dim == 8
    assert config.rope_scaling.kind == "longrope"
    assert config.rope_scaling.original_max_position_embeddings == 32
    assert config.rope_scaling.long_frequency_factors == (2.0, 3.0, 4.0, 5.0)
    assert config.rope_scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))


def test_yarn_reaches_as_far_as_it_stretches(directory):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = read_model_config(directory({"rope_scaling": scaling}))
    assert config.max_position_embeddings == 256
    assert config.rope_scaling.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(("architecture", "changes", "message"), [
    ("MistralForCausalLM", {"attention_bias": True}, "'attention_bias' True is not supported for mistral; .*: False"),
    ("MistralForCausalLM", {"layer_types": ["full_attention"] * 2}, "'layer_types' .* for mistral; supported: nothing"),
    ("Qwen2ForCausalLM", {"attention_bias": True}, "'attention_bias' True is not supported for qwen2"),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "layer_types": ["odd", "even"]}, "'layer_types' must name 2"),
    ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' True"),
    ("GPT2LMHeadModel", {"add_cross_attention": True}, "'add_cross_attention' True is not supported for gpt2"),
    ("GPTBigCodeForCausalLM", {"scale_attn_weights": False}, "'scale_attn_weights' False is not supported"),
    ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, r"'mlp_only_layers' \[0\] is not supported for qwen3_moe"),
    ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}, "'decoder_sparse_step' 2 is not supported"),
    ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "cannot go to 9 of 4 experts"),
    ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' True"),
    ("Gemma3ForCausalLM", {"sliding_window": None}, "'sliding_window' is missing"),
    ("Gemma3ForCausalLM", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
     "'rope_type' 'yarn' is not supported for sliding_attention"),
    ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, r"'partial_rotary_factor' 0\.5 is not supported for llama"),
    ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
     "'short_factor' must be a list of 8 positive, finite numbers"),
    ("FalconForCausalLM", {"new_decoder_architecture": False, "alibi": True}, "'alibi' True is not supported"),
    ("FalconForCausalLM", {"new_decoder_architecture": False, "parallel_attn": False}, "'parallel_attn' False"),
    ("FalconForCausalLM", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
     "'num_ln_in_parallel_attn' 1 is not supported for falcon_40b"),
    ("MptForCausalLM", {}, "architecture MptForCausalLM is not supported"),
    ("Gemma3ForConditionalGeneration", {}, "Gemma3ForConditionalGeneration is not supported"),
])
def test_what_a_family_does_not_compute_is_refused_by_name(directory, architecture, changes, message):
    needed = EXPERTS | {"query_pre_attn_scalar": 16, "sliding_window": 64, "moe_intermediate_size": 32, "n_embd": 64,
                        "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 64, "layer_norm_epsilon": 1e-5,
                        "hidden_act": None}
    with pytest.raises(ModelLoadError, match=message):
        read_model_config(directory({"architectures": [architecture]} | needed | changes))


def test_missing_path_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="no such file or directory"):
        read_model_config(str(tmp_path / "nowhere"))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match="neither a directory nor a"):
        read_model_config(str(tmp_path / "model.bin"))


def test_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        read_model_config(str(tmp_path))


def test_directory_with_only_a_gguf_names_it(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"name it: .*tiny\.gguf"):
        read_model_config(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": "\\ud800'])
def test_malformed_json_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json: "):
        read_model_config(str(tmp_path))


def test_expected_shapes_cover_every_tensor(directory):
    config = read_model_config(directory({"attention_bias": True}))
    shapes = dict(expected_shapes(family_of(config), config))
    assert len(shapes) == 2 * (9 + 4) + 3
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (32, 64)
    assert shapes["model.layers.1.self_attn.k_proj.bias"] == (32,)
    assert shapes["lm_head.weight"] == (100, 64)


def test_reading_a_config_does_not_import_torch():
    script = "import sys; from kvarto.worker.families import read_model_config; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0
