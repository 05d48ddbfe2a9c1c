"""The configuration: what is refused, and whether the message says what to change."""

from __future__ import annotations

import pickle

import pytest

from kvarto.protos.config import EngineConfig, ServeConfig
from kvarto.protos.errors import ConfigError
from kvarto.protos.sparsity import KVSparsity


def message(cls=EngineConfig, **values):
    with pytest.raises(ConfigError) as caught:
        cls.parse({"model": "m"} | values)
    return caught.value.message


@pytest.mark.parametrize("key", [
    "tensor_parallel_size", "num_worker_groups", "max_model_len", "num_blocks", "kv_cache_memory_bytes",
    "kv_disk_bytes", "max_num_seqs", "max_num_batched_tokens", "max_num_mixed_prefill_tokens",
    "threads_per_rank", "cpus_per_rank",
    "placement_timeout_s", "step_timeout_s"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_number_that_must_be_positive_is_refused_by_name(key, value):
    assert message(**{key: value}).startswith(f"{key}: Input should be greater than 0")


def test_a_lease_shorter_than_a_few_renewals_is_refused():
    assert message(lease_s=1).startswith("lease_s: Input should be greater than or equal to 2")


@pytest.mark.parametrize(("key", "known"), [
    ("dtype", "bfloat16"), ("device", "cuda"), ("executor", "inline"), ("preemption_mode", "recompute")])
def test_a_word_that_is_not_known_is_refused_with_those_that_are(key, known):
    text = message(**{key: "nonsense"})
    assert text.startswith(f"{key}: ") and known in text


@pytest.mark.parametrize("value", [1, 4, 12, 24, 256])
def test_a_block_size_that_is_not_offered_is_refused_with_those_that_are(value):
    assert message(block_size=value) == f"block_size: must be 8, 16, 32, 64 or 128, got {value}"


@pytest.mark.parametrize("value", [8, 16, 32, 64, 128])
def test_the_block_sizes_that_are_offered_are_taken(value):
    assert EngineConfig.parse({"model": "m", "block_size": value}).block_size == value


def test_an_unknown_key_is_refused_with_the_known_ones():
    text = message(tensor_paralel_size=2)
    assert "'tensor_paralel_size'" in text and "tensor_parallel_size" in text.split("known keys:")[1]


def test_the_known_keys_of_a_server_include_its_own():
    assert "drain_timeout_s" in message(ServeConfig, nonsense=1)


def test_every_wrong_key_is_named_at_once():
    text = message(block_size=3, max_num_seqs=0)
    assert "block_size" in text and "max_num_seqs" in text


def test_a_missing_model_is_named():
    with pytest.raises(ConfigError, match="model: Field required"):
        EngineConfig.parse({})


def test_an_empty_model_is_refused():
    assert message(model="").startswith("model: ")


@pytest.mark.parametrize("values", [{"min_port": 5000}, {"max_port": 5000}])
def test_one_end_of_the_port_range_is_not_enough(values):
    assert "min_port and max_port go together" in message(**values)


def test_a_port_range_that_ends_before_it_begins_is_refused():
    assert "max_port (5000) is below min_port (5001)" in message(min_port=5001, max_port=5000)


@pytest.mark.parametrize("value", [1023, 65536])
def test_a_port_that_is_none_is_refused(value):
    assert message(min_port=value, max_port=value).startswith("min_port: ")


def test_several_worker_groups_in_one_process_are_refused_with_the_way_out():
    text = message(executor="inline", num_worker_groups=2)
    assert "executor='inline'" in text and "executor='ray'" in text


@pytest.mark.parametrize("value", [-1, "much"])
def test_swap_space_that_is_no_size_is_refused(value):
    assert message(swap_space_bytes=value).startswith("swap_space_bytes: ")


def test_swapping_without_host_memory_is_refused_with_the_way_out():
    assert message(preemption_mode="swap", swap_space_bytes=0) == (
        "configuration: preemption_mode='swap' needs host memory: leave swap_space_bytes unset or above 0")


@pytest.mark.parametrize("mode", ["auto", "recompute"])
def test_the_other_modes_need_no_host_memory(mode):
    assert EngineConfig.parse({"model": "m", "preemption_mode": mode, "swap_space_bytes": 0}).preemption_mode == mode


@pytest.mark.parametrize("values", [{"enable_prefix_caching": False}, {"swap_space_bytes": 0}])
def test_a_disk_tier_that_nothing_can_fall_to_is_refused_with_the_way_out(values):
    text = message(kv_disk_path="/tmp/kv", **values)
    assert "kv_disk_path" in text and "enable_prefix_caching=True and swap_space_bytes above 0" in text


@pytest.mark.parametrize("key", ["port", "grpc_port"])
@pytest.mark.parametrize("value", [-1, 65536])
def test_a_server_port_that_is_none_is_refused(key, value):
    assert message(ServeConfig, **{key: value}).startswith(f"{key}: ")


def test_a_port_of_zero_means_any():
    assert ServeConfig.parse({"model": "m", "port": 0}).port == 0


def test_a_negative_drain_time_is_refused():
    assert message(ServeConfig, drain_timeout_s=-1).startswith("drain_timeout_s: ")


def test_the_engine_refuses_what_only_a_server_knows():
    assert "unknown configuration key 'port'" in message(port=80)


def test_a_configuration_cannot_be_changed():
    config = EngineConfig.parse({"model": "m"})
    with pytest.raises(ValueError, match="frozen"):
        config.model = "other"


@pytest.mark.parametrize("cls", [EngineConfig, ServeConfig])
def test_every_key_is_documented(cls):
    assert all(field.description for field in cls.model_fields.values())


@pytest.mark.parametrize(("given", "name"), [({}, "m"), ({"served_model_name": "gpt"}, "gpt")])
def test_requests_use_the_served_name(given, name):
    assert ServeConfig.parse({"model": "m"} | given).public_name == name


SPARSE = {"kv_sparsity": "tova", "kv_sparsity_budget": 64}


def test_nothing_is_dropped_unless_that_is_asked_for():
    assert EngineConfig.parse({"model": "m"}).sparsity is None


@pytest.mark.parametrize(("policy", "window"), [("h2o", 1), ("snapkv", 32), ("tova", 1)])
def test_a_sparsity_says_what_is_kept_and_which_queries_score_it(policy, window):
    config = EngineConfig.parse({"model": "m"} | SPARSE | {"kv_sparsity": policy})
    assert config.sparsity == KVSparsity(policy=policy, budget=64, interval=64, window=window)


def test_an_interval_may_be_given():
    sparsity = EngineConfig.parse({"model": "m"} | SPARSE | {"kv_sparsity_interval": 7}).sparsity
    assert sparsity is not None and sparsity.interval == 7


def test_an_interval_that_would_not_count_is_refused():
    assert "kv_sparsity_interval goes with a kv_sparsity" in message(kv_sparsity_interval=7)
    assert "compacts once" in message(kv_sparsity="snapkv", kv_sparsity_budget=64, kv_sparsity_interval=7)


def test_a_sparsity_without_a_budget_is_refused_with_what_it_needs():
    assert "kv_sparsity='h2o' needs kv_sparsity_budget" in message(kv_sparsity="h2o")


def test_a_budget_without_a_sparsity_is_refused_with_the_choice():
    assert "kv_sparsity_budget goes with a kv_sparsity: choose h2o" in message(kv_sparsity_budget=64)


def test_a_budget_that_holds_next_to_nothing_is_refused():
    assert message(kv_sparsity="tova", kv_sparsity_budget=31).startswith("kv_sparsity_budget: ")


@pytest.mark.parametrize("values", [
    {"attention_pattern": "sliding_window", "attention_window": 64}, {"preemption_mode": "recompute"},
    {"swap_space_bytes": 0}, {"kv_disk_path": "/tmp/kv"}, {"kv_cache_dtype": "int4"}])
def test_what_does_not_go_with_sparsity_is_refused_by_name(values):
    text = message(**SPARSE, **values)
    assert "kv_sparsity='tova'" in text and next(iter(values)) in text


def test_a_step_that_cannot_hold_the_queries_that_score_a_prompt_is_refused():
    assert "max_num_batched_tokens must be at least 32" in message(
        **SPARSE | {"kv_sparsity": "snapkv"}, max_num_batched_tokens=31)
    assert "max_num_mixed_prefill_tokens must be at least 32" in message(
        **SPARSE | {"kv_sparsity": "snapkv"}, max_num_mixed_prefill_tokens=31)


@pytest.fixture
def variable(monkeypatch):
    """Sets KVARTO_API_KEY."""
    monkeypatch.delenv("KVARTO_API_KEY", raising=False)
    return lambda value: monkeypatch.setenv("KVARTO_API_KEY", value)


def test_the_api_key_is_the_environments_where_none_is_given(variable):
    assert ServeConfig.parse({"model": "m"}).api_key is None
    variable("of the environment")
    assert ServeConfig.parse({"model": "m"}).api_key == "of the environment"
    assert ServeConfig.parse({"model": "m", "api_key": "given"}).api_key == "given"


def test_the_key_that_the_environment_had_is_kept_where_the_configuration_goes(variable):
    variable("söcret")
    config = ServeConfig.parse({"model": "m"})
    variable("another")
    assert pickle.loads(pickle.dumps(config)).api_key == "söcret"
    assert config.model_copy(update={"port": 1}).api_key == "söcret"


@pytest.mark.parametrize("key", ["", " ", "secret\n", " secret"])
def test_an_api_key_that_nobody_could_send_is_refused_wherever_it_is_from(variable, key):
    assert message(ServeConfig, api_key=key).startswith("api_key: must not be empty, nor begin or end with white space")
    variable(key)
    assert "KVARTO_API_KEY unset" in message(ServeConfig)


def test_the_api_key_is_neither_in_a_refusal_nor_in_what_is_logged(variable):
    variable("söcret")
    assert "söcret" not in repr(ServeConfig.parse({"model": "m"}))
    assert "söcret" not in message(ServeConfig, port=-1)
