"""From a configuration and a model to numbers."""

from __future__ import annotations

import os

import msgspec
import pytest

from kvarto.cluster.metrics import Metrics
from kvarto.cluster.resolve import costs, resolve
from kvarto.protos.config import EngineConfig
from kvarto.protos.errors import ConfigError
from kvarto.protos.model import KVGroupSpec, ModelConfig
from kvarto.protos.request import AddRequest, KVPool
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.sparsity import KVSparsity
from kvarto.protos.step import RankCosts, RankReady

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


def test_a_rank_is_told_where_the_disk_tier_is(tmp_path):
    assert resolved(kv_disk_path=str(tmp_path)).rank_config(0, epoch=1).kv_disk_path == str(tmp_path)


@pytest.mark.parametrize("key", ["victim_policy", "eviction_policy", "watermark_policy"])
def test_an_unknown_policy_is_refused_before_anything_is_loaded(key):
    with pytest.raises(ConfigError, match=f"^{key}: there is no policy 'nonsense'"):
        resolved(**{key: "nonsense"})


# -- a worker group --------------------------------------------------------------------------------------------------


def rank(number=0, *, block_bytes=(10,), copy=1e3, prefill=100.0, stored=()):
    return RankReady(
        rank=number, kv_groups=[KVGroupSpec(layer_ids=(0,))] * len(block_bytes), block_bytes=list(block_bytes),
        available_bytes=10**6, available_host_bytes=10**5, kernels="native", node="a", pid=1,
        costs=RankCosts(copy_bytes_per_s=copy, prefill_tokens_per_s=prefill), stored_keys=[list(s) for s in stored])


def engine(*ranks, **config):
    class Link:
        max_in_flight = 2

    ranks = ranks or (rank(),)
    num_groups = len(ranks[0].block_bytes)
    return resolved(**config).engine(list(ranks), [50] * num_groups, [20] * num_groups, Link(), 3, Metrics())


def info(**config):
    return engine(**config).info


def test_frontends_are_told_what_the_pool_holds():
    assert (info().kv_pools, info().num_host_blocks, info().kv_capacity_tokens) == ([KVPool(num_blocks=50)], 20, 800)


@pytest.mark.parametrize(("kv_cache_dtype", "told"), [("auto", "float32"), ("int8", "int8")])
def test_frontends_are_told_the_dtype_of_the_cache(kv_cache_dtype, told):
    assert info(kv_cache_dtype=kv_cache_dtype, dtype="float32").kv_cache_dtype == told


def test_frontends_are_told_how_many_sequences_a_step_really_holds():
    assert info(max_num_seqs=64, max_num_batched_tokens=32).max_num_seqs == 32


@pytest.mark.parametrize(("device", "has_cuda", "tokens"), [("cpu", True, 256), ("auto", False, 256),
                                                            ("cuda", True, 2048)])
def test_steps_are_short_on_a_processor(device, has_cuda, tokens):
    assert resolved(device=device, has_cuda=has_cuda).rank_config(0, 1).max_num_batched_tokens == tokens
    config = resolved(device=device, has_cuda=has_cuda).config
    assert config.mixed_prefill_tokens("cpu") == 128
    assert config.mixed_prefill_tokens("cuda") is None
    given = resolved(device=device, has_cuda=has_cuda, max_num_batched_tokens=77)
    assert given.rank_config(0, 1).max_num_batched_tokens == 77


def test_both_pools_are_sized():
    assert resolved(num_blocks=50).blocks([rank()]) == ([50], [50])


def test_the_slowest_rank_counts():
    found = costs([rank(0, copy=1000.0, prefill=50.0), rank(1, copy=500.0, prefill=100.0)])
    assert (found.block_copy_s, found.prefill_token_s) == (10 / 500, 1 / 50)


def test_the_largest_slice_of_a_block_counts():
    assert costs([rank(0, block_bytes=(10,)), rank(1, block_bytes=(40,))]).block_copy_s == 40 / 1000


def test_the_scheduler_decides_by_the_measured_costs():
    scheduler = engine(rank(0, prefill=50.0), rank(1)).scheduler
    assert scheduler.preemptor.costs == costs([rank(0, prefill=50.0), rank(1)])


def test_the_estimate_of_a_swap_is_the_time_that_its_bytes_take():
    scheduler = engine(rank(block_bytes=(10, 30), copy=1000.0), max_num_batched_tokens=256).scheduler
    params = SamplingParams(max_tokens=5)
    group = scheduler.add(AddRequest(request_id="a", prompt_token_ids=[1] * 64, params=params), b"o", 5)
    scheduler.schedule()
    scheduler.preemptor.preempt(group)
    record, = scheduler.preemptor.records
    # Four blocks of 40 bytes, out and back.
    assert record.choice.swap_s == pytest.approx(2 * 4 * 40 / 1000)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_the_preemption_mode_that_was_given_is_used(mode):
    scheduler = engine(preemption_mode=mode).scheduler
    group = scheduler.add(AddRequest(request_id="a", prompt_token_ids=[1] * 9, params=SamplingParams()), b"o", 5)
    scheduler.schedule()
    scheduler.preemptor.preempt(group)
    assert group.status.value == {"swap": "swapped", "recompute": "waiting"}[mode]


@pytest.mark.parametrize("enabled", [True, False])
def test_blocks_are_cached_where_that_is_enabled(enabled):
    assert engine(enable_prefix_caching=enabled).scheduler.space.enable_prefix_caching is enabled


def test_what_every_rank_has_on_disk_is_known_after_a_restart(tmp_path):
    keys = [bytes([i]) * 16 for i in range(3)]
    group = engine(rank(0, stored=[keys]), rank(1, stored=[keys[:2]]), kv_disk_path=str(tmp_path), kv_disk_bytes=1000)
    tiers = group.scheduler.space.tiers
    assert (tiers.disk_capacity, tiers.num_on_disk, tiers.num_loadable(keys[:2])) == (100, 2, 2)


def test_prefix_keys_outlive_a_restart_with_a_disk_tier(tmp_path):
    roots = {engine(kv_disk_path=path).scheduler.space.prefix_keys.root("") for path in [str(tmp_path)] * 2}
    assert len(roots) == 1


def test_prefix_keys_are_new_without_one():
    assert len({engine().scheduler.space.prefix_keys.root("") for _ in range(2)}) == 2


def test_blocks_are_priced_over_all_ranks():
    group = engine(rank(0, block_bytes=(10,)), rank(1, block_bytes=(5,)))
    assert group._accounting._block_bytes == [15]


SPARSE = {"kv_sparsity": "snapkv", "kv_sparsity_budget": 64}


def test_ranks_scheduler_and_frontends_are_told_what_is_dropped():
    group = engine(**SPARSE)
    wanted = KVSparsity(policy="snapkv", budget=64, interval=64, window=32)
    assert (resolved(**SPARSE).rank_config(0, 3).kv_sparsity, group.info.kv_sparsity) == (wanted, wanted)
    assert group.scheduler.space.sparsity.spec == wanted


def test_a_step_holds_the_queries_that_score_a_prompt_beside_the_running_sequences():
    assert info(**SPARSE, max_num_seqs=64, max_num_batched_tokens=50).max_num_seqs == 50 - 31


@pytest.mark.parametrize(("max_model_len", "refused"), [(2048, True), (512, False)])
def test_sparsity_is_refused_by_name_where_layers_have_a_window(max_model_len, refused):
    model = msgspec.structs.replace(MODEL, layer_windows=(512,))
    config = EngineConfig.parse({"model": "m", "max_model_len": max_model_len} | SPARSE)
    if not refused:
        assert resolve(config, model, has_cuda=False).model is model
        return
    with pytest.raises(ConfigError, match="kv_sparsity='snapkv'") as caught:
        resolve(config, model, has_cuda=False)
    assert caught.value.param == "kv_sparsity"
