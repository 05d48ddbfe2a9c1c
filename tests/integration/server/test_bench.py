"""`kvarto bench serve` over HTTP and gRPC against a real server with a tiny model of random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvarto.cluster.cli.server_process import ServerProcess

OUTPUT_LENS = [8, 13, 21, 34]


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("model")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog"], vocab_size=300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None, bos_token_id=None,
    )).save_pretrained(folder)
    with ServerProcess([str(folder), "--dtype", "float32", "--num-blocks", "60"]) as server:
        yield server


@pytest.fixture
def bench(tiny_server: ServerProcess, tmp_path: Path) -> Any:
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps([
        {"prompt": [3 * place, 2, 5, 7], "output_len": output_len} for place, output_len in enumerate(OUTPUT_LENS)]))

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvarto", "bench", *args, "--trace", str(trace), "--url", tiny_server.url,
                   "--grpc-port", str(tiny_server.grpc_port)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--grpc",)], ids=["http", "grpc"])
def test_every_token_is_counted_and_nothing_is_left_running(
    bench: Any, tiny_server: ServerProcess, flags: tuple[str, ...],
) -> None:
    result = bench("serve", "--rate", "20", "--slo-ttft-ms", "60000", "--num-warm-up", "1", *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["num_requests"], report["num_failed"], report["out_tok"]) == (4, 0, sum(OUTPUT_LENS))
    assert (report["itl_counts"], report["slo_attainment"]) == ("tokens", 1)
    assert 0 < report["itl_p50_ms"] <= report["longest_gap_ms"] < 1e3 * report["seconds"]
    # No bar where there is no terminal.
    assert result.stderr == ""
    status = httpx.get(f"{tiny_server.url}/v1/status", timeout=10).json()["groups"]["0"]
    assert (status["num_running"], status["num_waiting"]) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--grpc",)], ids=["http", "grpc"])
def test_refused_requests_are_failures_and_the_others_are_measured(bench: Any, tmp_path: Path, flags: Any) -> None:
    (tmp_path / "trace.json").write_text(json.dumps([
        {"prompt": [1, 2], "output_len": 4}, {"prompt": [1] * 300, "output_len": 4}]))
    result = bench("serve", "--num-warm-up", "0", *flags)
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert (report["num_failed"], report["out_tok"]) == (1, 4)
    assert result.stderr.startswith("error: 1 of 2 requests failed")
