"""`kvarto serve` with what cannot be served: one clear line, an exit code, nothing started, nothing left."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kvarto.cluster.model_hub import resolve_model


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvarto", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("error: ")
    for word in words:
        assert word in last_line


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_path_that_is_not_there() -> None:
    assert_refused(serve("/no/such/model"), "/no/such/model")


def test_an_alias_that_does_not_exist() -> None:
    assert_refused(serve("smollm9"), "smollm2-135m")


def test_an_architecture_that_is_not_supported(hf_folder: Path) -> None:
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba", "architectures": ["Mamba"]}))
    assert_refused(serve(str(hf_folder)), "Mamba", "LlamaForCausalLM")


def test_more_ranks_than_query_heads() -> None:
    assert_refused(serve("smollm2-135m", "--tensor-parallel-size", "10"), "9 query heads")


def test_an_unknown_key_in_the_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "kvarto.yaml").write_text("no_such_key: 1\n")
    assert_refused(serve("smollm2-135m", "--config", str(tmp_path / "kvarto.yaml")), "no_such_key")


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(serve("smollm2-135m", "--port", str(port), "--grpc-port", "0"), str(port), "free it")


@pytest.mark.slow
def test_weights_that_are_cut_short(tmp_path: Path) -> None:
    whole = Path(resolve_model("smollm2-135m")).read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    assert_refused(serve(str(cut), "--port", "0", "--grpc-port", "null"), "cut.gguf")
    assert not left_behind()


@pytest.mark.slow
def test_more_cpus_than_the_cluster_has() -> None:
    result = serve("smollm2-135m", "--port", "0", "--grpc-port", "null", "--cpus-per-rank", "512")
    assert_refused(result, "512 CPU", "the Ray cluster has")
    assert not left_behind()


def left_behind() -> list[str]:
    """Ray's processes that have no living driver any more."""
    return [
        process.info["name"] for process in psutil.process_iter(["name", "ppid"])
        if process.info["name"].startswith(("ray::", "raylet", "gcs_server")) and process.info["ppid"] == 1]
