"""Every family against Transformers: logits of a ragged batch of prompts and of decode steps, greedy tokens, on one to
three ranks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from kvarto.kernels.row_reference import ACTIVATIONS
from kvarto.worker.collectives import SingleRank
from kvarto.worker.families import FAMILIES, read_model_config
from kvarto.worker.kv_groups import kv_groups
from kvarto.worker.weights.safetensors_source import SafetensorsSource

_spec = importlib.util.spec_from_file_location("family_models", Path(__file__).with_name("family_models.py"))
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

NUM_TOKENS = 12
LONG_FACTORS = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [2.0, 3.0, 5.0, 9.0], "original_max_position_embeddings": 16}
REPLICATED = re.compile(r"norm|ln_|wpe|moe\.gate")


@pytest.fixture(scope="module", params=models.MODELS)
def saved(request, tmp_path_factory):
    """(directory, what Transformers continues the prompts with, its logits there)."""
    path = tmp_path_factory.mktemp(request.param)
    model = models.make_model(path, request.param)
    sequences = [list(prompt) for prompt in models.PROMPTS]
    for sequence in sequences:
        for _ in range(NUM_TOKENS):
            sequence.append(int(models.expected_logits(model, sequence)[-1].argmax()))
    return path, sequences, [models.expected_logits(model, sequence) for sequence in sequences]


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_logits_and_greedy_tokens_equal_those_of_transformers(saved, tp_size):
    path, expected_sequences, expected = saved
    config = read_model_config(str(path))
    ranks = models.on_ranks(
        tp_size, lambda comm: models.Driver(config, comm).generate(models.PROMPTS, NUM_TOKENS))
    for sequences, logits in ranks:
        assert sequences == expected_sequences
        for rows, expected_rows in zip(logits, expected, strict=True):
            torch.testing.assert_close(rows, expected_rows, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    x = torch.linspace(-6, 6, 500)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), atol=1e-6, rtol=1e-5)
    assert {activation for family in FAMILIES.values() for activation in family.activations} == set(ACTIVATIONS)


def test_every_family_has_a_model():
    assert {name.split("-")[0] for name in models.MODELS} >= set(FAMILIES) - {"llama"}


def check_whole_sequence(path, model, num_tokens, max_model_len):
    """Transformers is asked for the whole sequence at once: its frequencies follow the length of what it computes."""
    sequence = [(7 * place + 3) % models.VOCAB for place in range(num_tokens)]
    driver = models.Driver(read_model_config(str(path)), SingleRank(), max_model_len)
    first = driver.step([sequence[:9]], [0])[0]
    rest = driver.step([sequence[9:]], [9])[0]
    torch.testing.assert_close(torch.cat((first, rest)), models.expected_logits(model, sequence), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("num_tokens", "max_model_len"), [(16, 16), (17, 17), (40, 64)])
def test_longrope_takes_the_divisors_of_max_model_len(tmp_path, num_tokens, max_model_len):
    settings = models.GQA | {"max_position_embeddings": 128, "original_max_position_embeddings": 16}
    model = models.make(tmp_path, "Phi3", settings | {"rope_parameters": dict(LONG_FACTORS)})
    check_whole_sequence(tmp_path, model, num_tokens, max_model_len)


@pytest.mark.parametrize("length", [16, 24, 48])
def test_dynamic_scaling_is_that_of_a_sequence_of_max_model_len(tmp_path, length):
    scaling = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
    model = models.make(tmp_path, "Llama", models.GQA | {"max_position_embeddings": 16, "rope_parameters": scaling})
    assert read_model_config(str(tmp_path)).max_position_embeddings == 48
    check_whole_sequence(tmp_path, model, length, length)


def test_gpt2_files_may_leave_the_prefix_off(tmp_path):
    model = models.make_model(tmp_path, "gpt2")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
              tmp_path / "model.safetensors")
    check_whole_sequence(tmp_path, model, 20, 64)


@pytest.mark.parametrize(("name", "windows"), [
    ("mistral", [None]), ("mistral-windowed", [5]), ("gemma2-windowed", [None, 9]), ("gemma3-windowed", [None, 4]),
    ("qwen2-windowed", [None, 8]), ("phi3-windowed", [11])])
def test_kv_groups_are_the_windows_that_a_sequence_outgrows(tmp_path, name, windows):
    models.make_model(tmp_path, name)
    config = read_model_config(str(tmp_path))
    groups = kv_groups(config, models.MAX_MODEL_LEN)
    assert [group.window for group in groups] == windows
    assert sorted(layer for group in groups for layer in group.layer_ids) == list(range(config.num_layers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen3_moe"])
def test_half_precision_is_close(tmp_path, name, dtype):
    model = models.make_model(tmp_path, name)
    driver = models.Driver(read_model_config(str(tmp_path)), SingleRank(), dtype=dtype)
    for rows, prompt in zip(driver.step(models.PROMPTS, [0, 0, 0]), models.PROMPTS, strict=True):
        expected = models.expected_logits(model, prompt)
        assert rows.dtype == torch.float32
        assert (rows - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode-mha", "phi3", "mixtral", "falcon_40b"])
def test_a_rank_reads_its_own_slices_only(tmp_path, name, monkeypatch):
    models.make_model(tmp_path, name)
    config, counts = read_model_config(str(tmp_path)), []
    read = SafetensorsSource.read

    def counting(source, tensor_name, rows=None, columns=None):
        tensor = read(source, tensor_name, rows, columns)
        if not REPLICATED.search(tensor_name):
            counts.append(tensor.numel())
        return tensor

    monkeypatch.setattr(SafetensorsSource, "read", counting)
    models.on_ranks(3, lambda comm: models.Driver(config, comm))
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(counts) == sum(tensor.numel() for name, tensor in tensors.items() if not REPLICATED.search(name))
