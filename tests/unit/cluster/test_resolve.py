"""From a configuration and a model to numbers."""

from __future__ import annotations

import os

import pytest

from kvarto.cluster.metrics import Metrics
from kvarto.cluster.resolve import resolve
from kvarto.protos.config import EngineConfig
from kvarto.protos.errors import ConfigError
from kvarto.protos.model import KVGroupSpec, ModelConfig
from kvarto.protos.step import RankReady

MODEL = ModelConfig(
    path="/m", format="hf", family="llama", hidden_size=8, intermediate_size=8, num_layers=1, num_heads=4,
    total_num_kv_heads=2, head_dim=2, vocab_size=300, max_position_embeddings=2048, norm_eps=1e-5, rope_theta=1e4,
    torch_dtype="bfloat16", eos_token_ids=(7,))


def resolved(has_cuda=False, **config):
    return resolve(EngineConfig.parse({"model": "m"} | config), MODEL, has_cuda=has_cuda)


@pytest.mark.parametrize(("has_cuda", "device"), [(False, "cpu"), (True, "cuda")])
def test_the_device_is_a_gpu_where_there_is_one(has_cuda, device):
    assert resolved(has_cuda).device == device


def test_a_device_that_was_given_is_kept():
    assert resolved(has_cuda=True, device="cpu").device == "cpu"


def test_a_gpu_that_is_not_there_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="use device='cpu'"):
        resolved(device="cuda")


@pytest.mark.parametrize(("given", "dtype"), [("auto", "bfloat16"), ("float32", "float32")])
def test_the_dtype_is_that_of_the_files_unless_given(given, dtype):
    assert resolved(dtype=given).dtype == dtype


@pytest.mark.parametrize(("given", "length"), [(None, 2048), (100, 100), (2048, 2048)])
def test_the_length_is_the_models_unless_given(given, length):
    assert resolved(max_model_len=given).max_model_len == length


def test_a_length_beyond_the_models_is_refused_with_the_models():
    with pytest.raises(ConfigError, match=r"max_model_len=2049.*2048"):
        resolved(max_model_len=2049)


def test_more_ranks_than_query_heads_are_refused():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=5.*4 query heads"):
        resolved(tensor_parallel_size=5)


def test_ranks_share_the_cores():
    assert resolved(tensor_parallel_size=2).threads_per_rank == max(1, len(os.sched_getaffinity(0)) // 2)


def test_threads_that_were_given_are_kept():
    assert resolved(threads_per_rank=3).threads_per_rank == 3


def test_a_rank_is_told_who_it_is():
    config = resolved(tensor_parallel_size=2).rank_config(1, epoch=9)
    assert (config.rank, config.epoch, config.tp_size) == (1, 9, 2)


def info(**config):
    ready = RankReady(rank=0, kv_groups=[KVGroupSpec(layer_ids=(0,))], block_bytes=[10], available_bytes=10**6,
                      kernels="native", node="a", pid=1)

    class Link:
        max_in_flight = 2

    return resolved(**config).engine([ready], [50], Link(), 3, Metrics()).info


def test_frontends_are_told_what_the_pool_holds():
    assert (info().num_blocks, info().kv_capacity_tokens) == (50, 800)


def test_frontends_are_told_how_many_sequences_a_step_really_holds():
    assert info(max_num_seqs=64, max_num_batched_tokens=32).max_num_seqs == 32
