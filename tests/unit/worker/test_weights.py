"""Safetensors files: slices of what was saved, and errors that name the tensor and the file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvarto.protos.errors import ModelLoadError
from kvarto.protos.model import ModelConfig
from kvarto.worker.families import expected_shapes, family_of
from kvarto.worker.weights import open_weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Q = "model.layers.1.self_attn.q_proj.weight"


def config(path, tied=False) -> ModelConfig:
    return ModelConfig(
        path=str(path), format="hf", family="llama", hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        total_num_kv_heads=2, head_dim=8, vocab_size=40, max_position_embeddings=64, norm_eps=1e-5, rope_theta=1e4,
        tie_word_embeddings=tied)


def random_tensors(model: ModelConfig, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in expected_shapes(family_of(model), model)}


def save_shards(path, tensors, index=None) -> None:
    names = sorted(tensors)
    halves = [names[::2], names[1::2]]
    for shard, half in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in half}, path / shard)
    weight_map = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map} if index is None else index))


@pytest.fixture
def single(tmp_path):
    save_file(random_tensors(config(tmp_path)), tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    save_shards(tmp_path, random_tensors(config(tmp_path)))
    return tmp_path


@pytest.mark.parametrize(("rows", "columns"), [
    (None, None), (slice(3, 11), None), (None, slice(2, 9)), (slice(8, 16), slice(0, 5)), (slice(0, 32), slice(15, 16)),
])
def test_a_slice_is_what_torch_would_cut(single, rows, columns):
    whole = load_file(single / SINGLE)[Q]
    expected = whole[rows or slice(None), columns or slice(None)]
    assert torch.equal(open_weights(config(single)).read(Q, rows, columns), expected)


def test_a_vector_is_cut_by_rows(single):
    whole = load_file(single / SINGLE)["model.norm.weight"]
    source = open_weights(config(single))
    assert torch.equal(source.read("model.norm.weight"), whole)
    assert torch.equal(source.read("model.norm.weight", slice(4, 9)), whole[4:9])


def test_a_read_tensor_belongs_to_the_caller(single):
    source = open_weights(config(single))
    source.read(Q).zero_()
    assert source.read(Q).abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_file_is_kept(tmp_path, dtype):
    save_file(random_tensors(config(tmp_path), dtype), tmp_path / SINGLE)
    assert open_weights(config(tmp_path)).read(Q, slice(0, 4)).dtype == dtype


def test_shards_read_as_one(sharded):
    source = open_weights(config(sharded))
    saved = load_file(sharded / SHARDS[0]) | load_file(sharded / SHARDS[1])
    assert set(source.names()) == set(saved)
    for name, tensor in saved.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.read(name), tensor)


def test_a_tied_model_needs_no_lm_head(tmp_path):
    save_file(random_tensors(config(tmp_path, tied=True)), tmp_path / SINGLE)
    open_weights(config(tmp_path, tied=True))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: tensor lm_head\.weight is missing"):
        open_weights(config(tmp_path))


def test_a_wrong_shape_is_refused(tmp_path):
    tensors = random_tensors(config(tmp_path))
    tensors[Q] = torch.zeros(32, 17)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: tensor .*q_proj\.weight has shape \[32, 17\].*16\]"):
        open_weights(config(tmp_path))


def test_an_unsupported_dtype_is_refused(tmp_path):
    tensors = random_tensors(config(tmp_path))
    tensors[Q] = tensors[Q].to(torch.int8)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(ModelLoadError, match=r"q_proj\.weight has dtype I8"):
        open_weights(config(tmp_path))


@pytest.mark.parametrize("kept", [-1, 4000, 100, 8, 3, 0])
def test_a_truncated_file_is_refused(single, kept):
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(data[:kept])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: truncated or damaged"):
        open_weights(config(single))


def test_a_damaged_header_is_refused(single):
    data = bytearray((single / SINGLE).read_bytes())
    data[8:40] = b"\xff" * 32
    (single / SINGLE).write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: truncated or damaged"):
        open_weights(config(single))


def test_a_missing_shard_is_refused(sharded):
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(ModelLoadError, match=rf"{SHARDS[1]}: missing, though .*{INDEX} lists it"):
        open_weights(config(sharded))


def test_a_tensor_missing_from_its_shard_is_refused(tmp_path):
    tensors = random_tensors(config(tmp_path))
    save_shards(tmp_path, tensors, {"weight_map": dict.fromkeys(tensors, SHARDS[0])})
    with pytest.raises(ModelLoadError, match=rf"{SHARDS[0]}: tensor .* is missing"):
        open_weights(config(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_unusable_index_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ModelLoadError, match=rf"{INDEX}: not a usable index"):
        open_weights(config(sharded))


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"neither model\.safetensors nor"):
        open_weights(config(tmp_path))
