"""`kvarto generate`, `chat` and `bench` with a tiny random model in this process."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvarto.cluster.cli.app import app

TEXT = "the quick brown fox jumps over the lazy dog"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
ENGINE = ["--device", "cpu", "--dtype", "float32", "--num-blocks", "40", "--threads-per-rank", "1"]
GREEDY = ["--temperature", "0", "--max-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Every weight random; a byte-level BPE trained on one sentence."""
    folder = tmp_path_factory.mktemp("model")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(model):
    """Transformers' greedy continuation of a text by 6 tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def expected(text):
        prompt = tokenizer(text, return_tensors="pt").input_ids
        tokens = reference.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1]:]
        return tokenizer.decode(tokens)

    return expected


@pytest.fixture
def run(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    monkeypatch.setenv("KVARTO_CACHE", str(tmp_path))
    yield lambda *args, **options: CliRunner().invoke(app, [str(arg) for arg in args], **options)
    torch.set_num_threads(threads)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([{"prompt": [5 + i] * (10 + i), "output_len": 6 + i} for i in range(8)]))
    return path


def test_one_prompt_is_continued(run, model, expected):
    result = run("generate", model, TEXT, *GREEDY, *ENGINE)
    assert result.exit_code == 0, result.output
    assert (result.stdout, result.stderr) == (expected(TEXT) + "\n", "")


def test_several_prompts_are_continued_in_order_and_stdin_is_one_of_them(run, model, expected):
    result = run("generate", model, "the dog", "-", *GREEDY, *ENGINE, input="a fox\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"==> prompt 1 <==\n{expected('the dog')}\n==> prompt 2 <==\n{expected('a fox')}\n")


def test_completions_of_a_prompt_differ_and_a_seed_repeats_them(run, model):
    args = ["generate", model, "the dog", "--n", "2", "--seed", "7", "--max-tokens", "6", *ENGINE]
    first, second = run(*args).stdout, run(*args).stdout
    assert first == second
    one, two = first.removeprefix("==> completion 1 <==\n").split("==> completion 2 <==\n")
    assert one != two


def test_a_prompt_that_cannot_be_served_is_named(run, model):
    result = run("generate", model, "the dog", "fox" * 400, *ENGINE)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: prompt 2: ")


def test_chat_uses_the_models_template(run, model, expected):
    result = run("chat", model, "--system", "be", *GREEDY, *ENGINE, input="fox\ndog\n")
    assert result.exit_code == 0, result.output
    first = expected("<system>be<user>fox<assistant>")
    second = expected(f"<system>be<user>fox<assistant>{first}<user>dog<assistant>")
    assert result.stdout == f"{first}\n{second}\n"


def test_throughput_is_one_json_line(run, model, trace):
    result = run("bench", "throughput", "--model", model, "--trace", trace, *ENGINE)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert list(report) == ["out_tok_per_s", "total_tok_per_s", "seconds", "num_requests", "kv_waste",
                            "num_preemptions", "start_s"]
    num_in, num_out = sum(range(10, 18)), sum(range(6, 14))
    assert report["out_tok_per_s"] * report["seconds"] == pytest.approx(num_out, rel=0.02)
    assert report["total_tok_per_s"] * report["seconds"] == pytest.approx(num_in + num_out, rel=0.02)
    assert (report["num_requests"], report["num_preemptions"]) == (8, 0)
    assert 0 < report["kv_waste"] < 1
    assert "8/8" in result.stderr


def test_throughput_tells_where_its_time_went(run, model, trace, tmp_path):
    result = run("bench", "throughput", "--model", model, "--trace", trace, *ENGINE, "--profile", tmp_path / "t.json")
    assert result.exit_code == 0, result.output
    shares = json.loads(result.stdout)["profile"]
    *parts, beside = shares
    assert sum(shares[part] for part in parts) == pytest.approx(1, abs=0.01)
    assert all(shares[part] > 0 for part in ("GEMM", "attention", "sampling", "scheduling", "batch", "rest", beside))
    names = {event["name"] for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]}
    assert names >= {"schedule", "forward", "linear", "best_tokens", "sample", "detokenize", "send deltas"}


def test_a_profile_of_other_processes_is_refused(run, model, trace, tmp_path):
    result = run("bench", "throughput", "--model", model, "--trace", trace, *ENGINE, "--tensor-parallel-size", "2",
                 "--profile", tmp_path / "t.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--executor inline" in result.stderr


def test_throughput_counts_preemptions(run, model, trace):
    result = run("bench", "throughput", "--model", model, "--trace", trace, *ENGINE, "--num-blocks", "6",
                 "--max-model-len", "64")
    assert json.loads(result.stdout)["num_preemptions"] > 0, result.stderr


def test_a_token_out_of_the_vocabulary_is_refused(run, model, trace):
    trace.write_text(json.dumps([{"prompt": [5], "output_len": 2}, {"prompt": [300], "output_len": 2}]))
    result = run("bench", "throughput", "--model", model, "--trace", trace, *ENGINE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "prompt 1: " in result.stderr


def test_latency_is_one_json_line(run, model):
    result = run("bench", "latency", "--model", model, "--input-len", 20, "--output-len", 5, *ENGINE)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ttft_ms"] > 0
    assert report["tpot_ms"] > 0
    assert {key: report[key] for key in ("input_len", "output_len", "num_iters")} == {
        "input_len": 20, "output_len": 5, "num_iters": 3}


def test_prefix_finds_all_full_blocks_of_the_shared_tokens_but_the_first_time(run, model):
    result = run("bench", "prefix", "--model", model, *ENGINE, "--prefix-len", 40, "--own-len", 5, "--output-len", 3,
                 "--num-requests", 4, "--num-rounds", 2)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    # Two of the prefix's blocks of 16 are full; the first request of a round computes them for the other three.
    assert report["hit_share"] == pytest.approx(3 * 32 / (4 * 45), abs=1e-5)
    assert report["out_tok_per_s_with"] / report["out_tok_per_s_without"] == pytest.approx(report["speedup"], rel=0.01)


def test_sampling_counts_the_blocks_that_sharing_saves(run, model):
    result = run("bench", "sampling", "--model", model, *ENGINE, "--n", 4, "--beam-width", 2, "--input-len", 32,
                 "--output-len", 8, "--num-requests", 2, "--num-rounds", 1)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    # Of a request, in the step of its prompt: four tables with the same two blocks. In each of the seven steps after it
    # every table has a third block of its own.
    assert report["parallel"]["blocks_saved"] == pytest.approx(1 - (2 + 7 * 6) / (8 + 7 * 12), abs=1e-5)
    assert 0 < report["beams"]["blocks_saved"] <= 0.5
    assert report["parallel"]["tok_per_s_shared"] > 0


@pytest.mark.parametrize("command", ["prefix", "sampling"])
def test_the_prefix_cache_is_not_a_choice_where_the_benchmark_makes_it(run, model, command):
    result = run("bench", command, "--model", model, "--no-enable-prefix-caching")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: enable_prefix_caching cannot be set here")
