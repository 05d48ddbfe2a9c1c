"""Attention patterns on a whole model: StreamingLLM and LM-Infinite against their papers' formulas on dense tensors,
sliding windows and Longformer's global tokens against Transformers given the mask."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from kvarto.cluster.attention_pattern import apply_pattern
from kvarto.protos.config import EngineConfig
from kvarto.worker.collectives import SingleRank
from kvarto.worker.families import read_model_config

_spec = importlib.util.spec_from_file_location("family_models", Path(__file__).with_name("family_models.py"))
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

SETTINGS = models.GQA | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48,
                         "num_hidden_layers": 2, "tie_word_embeddings": False}
NUM_TOKENS = 52
SEQUENCE = [(13 * place + 7) % models.VOCAB for place in range(NUM_TOKENS)]
# Steps that cut the sequence in chunks smaller and larger than the windows, and decodes.
STEPS = [9, 20, 1, 1, 1, 3, 1, 1, 12, 1, 1, 1]
# Windows and sinks: within a block of 8, of a block, across blocks, and more sinks than the window has rows.
SHAPES = [(5, 1), (8, 8), (11, 4), (20, 3), (4, 9)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    return path, models.make(path, "Llama", SETTINGS)


def positions_in_cache(window: int, num_sinks: int) -> Tensor:
    """StreamingLLM, section 3.2: the cache of query p holds the first tokens and the last ones; a token's position is
    its place in it. `[p, j]`: distance from j to p, NaN where j is not in the cache."""
    distances = torch.full((NUM_TOKENS, NUM_TOKENS), torch.nan)
    for p in range(NUM_TOKENS):
        cache = [j for j in range(p + 1) if j < num_sinks or j > p - window]
        for place, j in enumerate(cache):
            distances[p, j] = len(cache) - 1 - place
    return distances


def capped_distances(window: int, num_sinks: int) -> Tensor:
    """LM-Infinite, section 4: the lambda-shaped mask, and no distance above the ceiling."""
    p, j = torch.arange(NUM_TOKENS)[:, None], torch.arange(NUM_TOKENS)
    visible = (j <= p) & ((j < num_sinks) | (p - j < window))
    return torch.where(visible, (p - j).clamp(max=window).float(), torch.nan)


def dense_logits(model, distances: Tensor) -> Tensor:
    """The Llama forward pass in float64, written out, where key j seems `distances[p, j]` away from query p."""
    config = model.config
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // num_heads
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    frequencies = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2).double() / dim)
    angles = distances.nan_to_num().double()[..., None] * frequencies  # [p, j, dim / 2]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weights[name]

    x = weights["model.embed_tokens.weight"][torch.tensor(SEQUENCE)]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        normed = norm(x, f"{prefix}.input_layernorm.weight")
        query, key, value = (
            (normed @ weights[f"{prefix}.self_attn.{part}_proj.weight"].T).view(NUM_TOKENS, heads, dim)
            for part, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)))
        key, value = (part.repeat_interleave(num_heads // num_kv_heads, 1) for part in (key, value))
        # Turning the query by the distance, and the key not at all, is what rotary positions come to.
        first, second = query.chunk(2, -1)
        k_first, k_second = key.chunk(2, -1)
        even = torch.einsum("phd,jhd->hpjd", first, k_first) + torch.einsum("phd,jhd->hpjd", second, k_second)
        odd = torch.einsum("phd,jhd->hpjd", first, k_second) - torch.einsum("phd,jhd->hpjd", second, k_first)
        scores = (even * angles.cos() + odd * angles.sin()).sum(-1) * dim**-0.5
        probabilities = scores.masked_fill(distances.isnan(), -torch.inf).softmax(-1)
        attended = torch.einsum("hpj,jhd->phd", probabilities, value).flatten(1)
        x = x + attended @ weights[f"{prefix}.self_attn.o_proj.weight"].T
        normed = norm(x, f"{prefix}.post_attention_layernorm.weight")
        gate, up = (normed @ weights[f"{prefix}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[f"{prefix}.mlp.down_proj.weight"].T
    return (norm(x, "model.norm.weight") @ weights["lm_head.weight"].T).float()


def patterned(path, pattern: str, window: int, num_sinks: int | None, **changes):
    config = EngineConfig.parse({"model": str(path), "attention_pattern": pattern, "attention_window": window,
                                 "attention_sinks": num_sinks})
    return apply_pattern(config, msgspec.structs.replace(read_model_config(str(path)), **changes))


def paged_logits(path, pattern: str, window: int, num_sinks: int | None) -> Tensor:
    driver = models.Driver(patterned(path, pattern, window, num_sinks), SingleRank(), NUM_TOKENS)
    assert [group.window for group in driver.decoder.kv_groups] == [window]
    rows, done = [], 0
    for count in STEPS:
        rows += driver.step([SEQUENCE[done: done + count]], [done])
        done += count
    assert done == NUM_TOKENS
    return torch.cat(rows)


def test_the_dense_formula_is_that_of_transformers_where_nothing_is_hidden(saved):
    _, model = saved
    distances = capped_distances(NUM_TOKENS, 0)
    torch.testing.assert_close(dense_logits(model, distances), models.expected_logits(model, SEQUENCE), atol=1e-4,
                               rtol=1e-5)


@pytest.mark.parametrize(("window", "num_sinks"), SHAPES)
@pytest.mark.parametrize(("pattern", "distances"), [
    ("streaming_llm", positions_in_cache), ("lm_infinite", capped_distances)])
def test_far_sinks_are_where_the_papers_put_them(saved, pattern, distances, window, num_sinks):
    path, model = saved
    expected = dense_logits(model, distances(window, num_sinks))
    torch.testing.assert_close(paged_logits(path, pattern, window, num_sinks), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("window", "num_sinks"), [(window, sinks) for window, sinks in SHAPES if sinks > 1])
def test_positions_matter(saved, window, num_sinks):
    """The patterns differ from each other (with more than one sink), so that the test above could not pass with the
    wrong one."""
    _, model = saved
    streaming, infinite = (dense_logits(model, distances(window, num_sinks))
                           for distances in (positions_in_cache, capped_distances))
    assert (streaming - infinite).abs().max() > 1e-3


@pytest.mark.parametrize(("window", "num_sinks"), [*SHAPES, (7, None)])
def test_windows_and_global_tokens_are_a_mask(saved, window, num_sinks):
    path, model = saved
    p, j = torch.arange(NUM_TOKENS)[:, None], torch.arange(NUM_TOKENS)
    visible = (j <= p) & ((p - j < window) | (j < (num_sinks or 0)))
    mask = torch.zeros(1, 1, NUM_TOKENS, NUM_TOKENS).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = model(torch.tensor([SEQUENCE]), attention_mask=mask, use_cache=False).logits[0]
    logits = paged_logits(path, "longformer" if num_sinks else "sliding_window", window, num_sinks)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
