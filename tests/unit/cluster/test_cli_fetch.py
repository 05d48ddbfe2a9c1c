"""`kvarto fetch`, without a network."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kvarto.cluster import model_hub
from kvarto.cluster.cli.app import app

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "rope_theta": 1e4, "torch_dtype": "float32", "tie_word_embeddings": True}


def run(*args):
    return CliRunner().invoke(app, ["fetch", *args])


def model(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def test_the_path_of_a_model_that_is_here_is_all_that_is_printed(tmp_path):
    result = run(str(model(tmp_path / "llama")))
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/llama\n")


def test_a_hub_id_is_fetched_and_its_folder_printed(tmp_path, monkeypatch):
    folder, asked = model(tmp_path / "snapshot"), []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    monkeypatch.chdir(tmp_path)
    assert (run("org/model").stdout, asked) == (f"{folder}\n", ["org/model"])


def test_an_alias_that_is_in_the_cache_is_not_fetched_again(tmp_path, monkeypatch):
    source = model_hub.cache_folder() / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not source.exists():
        pytest.skip(f"{source} is not there: no test before this one has used the model")
    monkeypatch.setattr(model_hub, "_download", lambda *_: pytest.fail("fetched again"))
    assert run("smollm2-135m").stdout == f"{source}\n"


@pytest.mark.parametrize(("name", "says"), [
    ("./none", "there is no model at"), ("nonsense", "unknown model 'nonsense'"), ("", "is empty")])
def test_what_is_no_model_is_exit_code_2_and_one_line(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    result = run(name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_that_could_not_be_served_fails_here_already(tmp_path):
    result = run(str(model(tmp_path / "odd", architectures=["OddForCausalLM"], model_type="odd")))
    assert result.exit_code == 2
    assert "odd" in result.stderr.lower()
