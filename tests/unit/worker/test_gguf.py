"""GGUF files against gguf's own reader and dequantizer."""

from __future__ import annotations

import contextlib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from kvarto.protos.errors import ModelLoadError
from kvarto.worker.families import read_model_config
from kvarto.worker.weights import gguf_source, open_weights

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 512, 2, 4, 2, 64, 96
SHAPES = {
    "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD_DIM, HIDDEN), "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP),
}
DOWN, Q, K = (f"model.layers.1.{name}.weight" for name in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj"))
QUANTIZED = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]


def all_shapes(output: bool = False) -> dict[str, tuple[int, ...]]:
    shapes = {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    shapes |= {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    return shapes | ({"output.weight": (VOCAB, HIDDEN)} if output else {})


def write(path, kind=Kind.F32, arch="llama", without=(), shapes=None, extra=(), raw=(), metadata=None) -> str:
    """A llama of random weights; `extra` are further float32 tensors, `raw` quantized ones that replace those of
    their name, `metadata` calls on the writer."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_token_list([f"token {index}" for index in range(VOCAB)])
    writer.add_token_scores([0.5] * VOCAB)
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    for name, value in (metadata or {}).items():
        getattr(writer, name)(value)
    for name, shape in (shapes or all_shapes()).items():
        if name not in without and name not in [name for name, _, _ in raw]:
            values = random.standard_normal(shape, dtype=np.float32)
            stored = Kind.F32 if len(shape) == 1 else kind
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    for name, values in extra:
        writer.add_tensor(name, values)
    for name, values, raw_kind in raw:
        writer.add_tensor(name, values, raw_dtype=raw_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def oracle(path: str, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def unpermuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    # The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    dim = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, dim, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def open_file(path: str):
    return open_weights(read_model_config(path))


@pytest.fixture(scope="module")
def q8(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "q8.gguf", Kind.Q8_0)


def test_metadata_becomes_the_config(q8):
    config = read_model_config(q8)
    assert (config.format, config.family, config.path) == ("gguf", "llama", q8)
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (HIDDEN, MLP, LAYERS)
    assert (config.num_heads, config.total_num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.vocab_size, config.max_position_embeddings) == (VOCAB, 128)
    assert (config.rope_theta, config.rope_scaling, config.norm_eps) == (5000.0, None, pytest.approx(1e-5))
    assert (config.bos_token_id, config.eos_token_ids, config.torch_dtype) == (1, (2,), "float32")
    assert config.tie_word_embeddings and not config.attention_bias and not config.mlp_bias


def test_end_of_turn_is_an_eos_too(tmp_path):
    path = write(tmp_path / "a.gguf", metadata={"add_eot_token_id": 7})
    assert read_model_config(path).eos_token_ids == (2, 7)


def test_an_output_tensor_means_untied(tmp_path):
    assert not read_model_config(write(tmp_path / "a.gguf", shapes=all_shapes(output=True))).tie_word_embeddings


def test_explicit_head_dim_is_taken(tmp_path):
    path = write(tmp_path / "a.gguf", metadata={"add_key_length": 32, "add_rope_dimension_count": 32})
    assert read_model_config(path).head_dim == 32


def test_half_precision_files_keep_their_dtype(tmp_path):
    assert read_model_config(write(tmp_path / "a.gguf", Kind.BF16)).torch_dtype == "bfloat16"


def test_linear_rope_scaling_is_read(tmp_path):
    path = write(tmp_path / "a.gguf", metadata={
        "add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 4.0})
    scaling = read_model_config(path).rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


def test_frequency_factors_are_read(tmp_path):
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    scaling = read_model_config(write(tmp_path / "a.gguf", extra=[("rope_freqs.weight", factors)])).rope_scaling
    assert scaling.kind == "factors"
    assert scaling.frequency_factors == tuple(factors.tolist())


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_tensor_equals_gguf_dequantize(tmp_path, kind):
    path = write(tmp_path / "a.gguf", kind)
    source = open_file(path)
    assert len(source.names()) == len(all_shapes())
    for name, expected in [
        (DOWN, oracle(path, "blk.1.ffn_down.weight")),
        ("model.embed_tokens.weight", oracle(path, "token_embd.weight")),
        ("model.norm.weight", oracle(path, "output_norm.weight")),
        ("model.layers.0.input_layernorm.weight", oracle(path, "blk.0.attn_norm.weight")),
        (Q, unpermuted(oracle(path, "blk.1.attn_q.weight"), HEADS)),
        (K, unpermuted(oracle(path, "blk.1.attn_k.weight"), KV_HEADS)),
    ]:
        assert source.shape(name) == expected.shape
        assert np.array_equal(source.read(name).numpy(), expected)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K, Kind.IQ4_XS], ids=lambda kind: kind.name)
def test_kinds_that_gguf_can_only_read_are_read(tmp_path, kind):
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    data = random.integers(0, 64, (HIDDEN, MLP // block_size * block_bytes), dtype=np.uint8)
    path = write(tmp_path / "a.gguf", raw=[("blk.1.ffn_down.weight", data, kind)])
    assert np.array_equal(open_file(path).read(DOWN, slice(5, 50)).numpy(), gguf.quants.dequantize(data, kind)[5:50])


@pytest.mark.parametrize(("rows", "columns"), [
    (slice(7, 31), None), (None, slice(32, 96)), (None, slice(40, 41)), (slice(1, 2), slice(31, 65)),
    (slice(0, HIDDEN), slice(500, 512)),
])
def test_a_slice_is_what_numpy_would_cut(q8, rows, columns):
    expected = oracle(q8, "blk.1.ffn_down.weight")[rows or slice(None), columns or slice(None)]
    read = open_file(q8).read(DOWN, rows, columns)
    assert np.array_equal(read.numpy(), expected)
    assert read.is_contiguous()


@pytest.mark.parametrize("rows", [slice(64, 192), slice(0, 64), slice(192, 256), slice(10, 100)])
def test_rotary_order_is_restored_under_row_slices(q8, rows):
    expected = unpermuted(oracle(q8, "blk.1.attn_q.weight"), HEADS)[rows]
    assert np.array_equal(open_file(q8).read(Q, rows).numpy(), expected)


@pytest.mark.parametrize(("kind", "quantization"), [(Kind.Q8_0, "int8"), (Kind.Q4_0, "int4"), (Kind.Q4_1, "int4")])
def test_codes_are_read_as_they_are_stored(tmp_path, kind, quantization):
    source = open_file(write(tmp_path / "a.gguf", kind))
    for name, rows, columns in ((DOWN, None, None), (DOWN, slice(7, 31), slice(32, 96)), (Q, slice(10, 100), None),
                                (K, None, None), ("model.embed_tokens.weight", slice(64, 96), None)):
        found = source.read_quantized(name, quantization, rows, columns)
        assert found.kind == quantization
        assert torch.equal(found.dequantized(), source.read(name, rows, columns))
    assert source.read_quantized(DOWN, {"int8": "int4", "int4": "int8"}[quantization]) is None
    assert source.read_quantized(DOWN, quantization, columns=slice(32, 80)) is None
    assert source.read_quantized(DOWN, quantization, columns=slice(16, 64)) is None


def test_floats_are_not_stored_as_codes(tmp_path):
    assert open_file(write(tmp_path / "a.gguf", Kind.F16)).read_quantized(DOWN, "int8") is None


def test_rotary_order_of_a_bias_is_restored(tmp_path):
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    biases = {f"blk.{layer}.{name}.bias": np.zeros(SHAPES[name][0], np.float32)
              for layer in range(LAYERS) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    path = write(tmp_path / "a.gguf", extra=(biases | {"blk.1.attn_q.bias": bias}).items())
    source = open_file(path)
    name = Q.replace("weight", "bias")
    assert np.array_equal(source.read(name).numpy(), unpermuted(bias, HEADS))
    assert np.array_equal(source.read(name, slice(64, 128)).numpy(), unpermuted(bias, HEADS)[64:128])


def test_only_the_blocks_of_the_slice_are_dequantized(q8, monkeypatch):
    source, seen = open_file(q8), []

    def spy(data, kind):
        seen.append(data.size)
        return gguf.quants.dequantize(data, kind)

    monkeypatch.setattr(gguf_source, "dequantize", spy)
    block_bytes = gguf.GGML_QUANT_SIZES[Kind.Q8_0][1]
    source.read(DOWN, slice(8, 24))
    source.read(DOWN, columns=slice(64, 128))
    source.read(Q, slice(64, 128))
    assert seen == [16 * MLP // 32 * block_bytes, HIDDEN * 2 * block_bytes, 64 * HIDDEN // 32 * block_bytes]


def test_a_read_tensor_belongs_to_the_caller(q8):
    source = open_file(q8)
    for name in (DOWN, "model.norm.weight"):
        source.read(name).zero_()
        assert source.read(name).abs().sum() > 0
        assert source.read(name).dtype == torch.float32


@pytest.mark.parametrize(("options", "message"), [
    ({"arch": "bert"}, "GGUF architecture 'bert' is not supported; supported: .*llama"),
    ({"without": ("blk.1.ffn_down.weight",)}, r"tensor model\.layers\.1\.mlp\.down_proj\.weight is missing"),
    ({"without": ("blk.0.attn_q.weight",)}, r"tensor blk\.0\.attn_q\.weight is missing"),
    ({"without": ("token_embd.weight",)}, r"tensor token_embd\.weight is missing"),
    ({"metadata": {"add_rope_dimension_count": 32}}, "rotary positions on 32 of 64 dimensions"),
    ({"metadata": {"add_rope_scaling_type": gguf.RopeScalingType.YARN}}, "rope scaling 'yarn' is not supported"),
    ({"extra": [("rope_freqs.weight", np.full(32, np.nan, np.float32))]}, "divisor that is not a positive, finite"),
    ({"extra": [("rope_freqs.weight", np.ones(3, np.float32))]}, r"rope_freqs\.weight must be float32 \[32\]"),
    ({"shapes": {**all_shapes(), "blk.1.ffn_up.weight": (MLP, 64)}}, r"up_proj\.weight has shape \[512, 64\]"),
])
def test_a_bad_file_is_refused_with_its_name(tmp_path, options, message):
    path = write(tmp_path / "bad.gguf", **options)
    with pytest.raises(ModelLoadError, match=message) as caught:
        open_file(path)
    assert path in caught.value.message


def test_a_missing_key_is_refused(tmp_path, q8):
    target = tmp_path / "a.gguf"
    data = Path(q8).read_bytes()
    target.write_bytes(data.replace(b"llama.block_count", b"llama.block_xxxxx"))
    with pytest.raises(ModelLoadError, match=r"a\.gguf: key 'llama\.block_count' is missing"):
        read_model_config(str(target))


def test_a_non_finite_value_is_refused(tmp_path, q8):
    target = tmp_path / "a.gguf"
    data = Path(q8).read_bytes()
    epsilon = np.float32(1e-5).tobytes()
    assert data.count(epsilon) == 1
    target.write_bytes(data.replace(epsilon, np.float32("inf").tobytes()))
    with pytest.raises(ModelLoadError, match="layer_norm_rms_epsilon' must be a positive, finite number"):
        read_model_config(str(target))


def test_a_file_cut_in_its_tensors_is_refused(tmp_path, q8):
    target = tmp_path / "a.gguf"
    target.write_bytes(Path(q8).read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match=r"a\.gguf: truncated: tensor \S+ ends at byte \d+"):
        read_model_config(str(target))


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 24, 60, 300, 700, 1500, 2500])
def test_a_file_cut_in_its_header_is_refused(tmp_path, q8, kept):
    target = tmp_path / "a.gguf"
    target.write_bytes(Path(q8).read_bytes()[:kept])
    with pytest.raises(ModelLoadError, match=r"a\.gguf: (damaged GGUF header|key|truncated)"):
        read_model_config(str(target))


@pytest.mark.parametrize("value", [b"\xff\xfe\xff\xff", b"\x00\x00\x00\x00", b"\x00\x00\x00\x80"])
def test_a_damaged_header_is_read_or_refused_and_nothing_else(tmp_path, q8, value):
    target, whole = tmp_path / "a.gguf", Path(q8).read_bytes()
    for offset in range(0, 3500, 13):
        target.write_bytes(whole[:offset] + value + whole[offset + len(value):])
        with contextlib.suppress(ModelLoadError):
            open_file(str(target))
