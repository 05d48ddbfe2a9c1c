"""Which patterns go with which models and settings, and how long a sequence may then be."""

from __future__ import annotations

import pytest

from kvarto.cluster.attention_pattern import apply_pattern, longest
from kvarto.cluster.resolve import resolve
from kvarto.protos.config import EngineConfig
from kvarto.protos.errors import ConfigError
from kvarto.protos.model import ModelConfig, RopeScaling

SIZES = {"path": "/m", "format": "hf", "family": "llama", "hidden_size": 8, "intermediate_size": 8, "num_layers": 3,
         "num_heads": 2, "total_num_kv_heads": 2, "head_dim": 4, "vocab_size": 10, "max_position_embeddings": 100,
         "norm_eps": 1e-5}
GEMMA = {"layer_windows": (8, None, 8)}


def config(pattern="streaming_llm", window=32, sinks=None, **more) -> EngineConfig:
    return EngineConfig.parse({"model": "/m", "attention_pattern": pattern, "attention_window": window,
                               "attention_sinks": sinks, **more})


@pytest.mark.parametrize(("pattern", "sinks", "expected", "distance"), [
    ("streaming_llm", None, 4, "cache"), ("streaming_llm", 7, 7, "cache"), ("lm_infinite", None, 10, "ceiling"),
    ("sliding_window", None, 0, "true"), ("longformer", 5, 5, "true"), ("streaming_llm", 0, 0, "cache")])
def test_full_layers_get_the_pattern(pattern, sinks, expected, distance):
    model = apply_pattern(config(pattern, 32, sinks), ModelConfig(**SIZES))
    assert (model.layer_windows, model.layer_sinks, model.sink_distance) == ((32,) * 3, (expected,) * 3, distance)


def test_layers_with_a_window_keep_it():
    model = apply_pattern(config(), ModelConfig(**SIZES | GEMMA))
    assert (model.layer_windows, model.layer_sinks) == ((8, 32, 8), (0, 4, 0))


def test_no_pattern_changes_nothing():
    model = ModelConfig(**SIZES)
    assert apply_pattern(EngineConfig.parse({"model": "/m"}), model) is model


@pytest.mark.parametrize(("changes", "message"), [
    ({"layer_windows": (8, 8, 8)}, "every layer of /m has a window"),
    ({"learned_positions": True}, "learned its positions")])
def test_models_that_a_pattern_does_not_go_with(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        apply_pattern(config(), ModelConfig(**SIZES | changes))
    assert caught.value.param == "attention_pattern"


@pytest.mark.parametrize(("values", "message"), [
    ({"attention_window": 8}, "attention_window goes with an attention_pattern"),
    ({"attention_sinks": 8}, "attention_sinks goes with an attention_pattern"),
    ({"attention_pattern": "lm_infinite"}, "'lm_infinite' needs attention_window"),
    ({"attention_pattern": "sliding_window", "attention_window": 8, "attention_sinks": 1}, "has no sinks"),
    ({"attention_pattern": "longformer", "attention_window": 8}, "needs attention_sinks"),
    ({"attention_pattern": "windowed"}, "attention_pattern: Input should be 'model', 'sliding_window'"),
    ({"attention_pattern": "lm_infinite", "attention_window": 0}, "attention_window: Input should be greater than 0")])
def test_settings_that_do_not_go_together(values, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.parse({"model": "/m", **values})


@pytest.mark.parametrize(("pattern", "window", "sinks", "changes", "limit"), [
    ("streaming_llm", 96, 4, {}, None), ("streaming_llm", 97, 4, {}, 100), ("lm_infinite", 90, None, {}, None),
    ("sliding_window", 100, None, {}, None), ("longformer", 8, 2, {}, 100),
    ("streaming_llm", 32, None, GEMMA, None),
    ("streaming_llm", 32, None, {"rope_scaling": RopeScaling(kind="dynamic", factor=2.0)}, 100),
    ("sliding_window", 32, None, {"learned_positions": True}, 100)])
def test_how_long_a_sequence_may_be(pattern, window, sinks, changes, limit):
    settings = config(pattern, window, sinks)
    assert longest(settings, apply_pattern(settings, ModelConfig(**SIZES | changes))) == limit


def test_max_model_len_beyond_the_positions_needs_a_pattern():
    model = ModelConfig(**SIZES)
    assert resolve(config(max_model_len=20_000), model, has_cuda=False).max_model_len == 20_000
    with pytest.raises(ConfigError, match=r"made for \(100 positions\).*streaming_llm") as caught:
        resolve(EngineConfig.parse({"model": "/m", "max_model_len": 101}), model, has_cuda=False)
    assert caught.value.param == "max_model_len"
