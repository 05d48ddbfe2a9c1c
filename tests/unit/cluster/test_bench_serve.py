"""`kvarto bench serve` and `sweep` against servers that only pretend."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from kvarto.cluster.cli.app import app
from kvarto.protos.errors import UnavailableError

_spec = importlib.util.spec_from_file_location("http_fake", Path(__file__).with_name("http_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


@pytest.fixture(scope="module")
def server():
    with fake.shared_server() as server:
        yield server


@pytest.fixture
def frontend(server):
    return server(fake.FakeFrontend(fake.make_config()))


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([{"prompt": [65 + i, 66, 67], "output_len": 3 + i} for i in range(6)]))
    return path


@pytest.fixture
def run(trace):
    return lambda command, *args: CliRunner().invoke(app, ["bench", command, "--trace", str(trace), *map(str, args)])


@pytest.fixture
def closed_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_run_is_one_json_line(run, frontend):
    result = run("serve", "--url", frontend.url, "--rate", 200, "--num-warm-up", 0, "--slo-ttft-ms", 60_000)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert (report["num_requests"], report["num_failed"], report["out_tok"]) == (6, 0, sum(range(3, 9)))
    assert (report["rate"], report["api"], report["itl_counts"], report["slo_attainment"]) == (200, "http", "tokens", 1)
    assert 0 < report["ttft_p50_ms"] <= report["ttft_p99_ms"]


def test_prompts_go_as_token_ids_greedily_past_the_end(run, frontend):
    run("serve", "--url", frontend.url, "--num-requests", 2, "--num-warm-up", 1)
    sent = [(prompt, params.max_tokens, params.temperature, params.ignore_eos)
            for prompt, params, _ in frontend.submitted.values()]
    assert sent[0] == ([67, 66, 65], 3, 0, True)
    assert sorted(sent[1:]) == [([65, 66, 67], 3, 0, True), ([66, 66, 67], 4, 0, True)]


def test_failed_requests_are_named_and_the_exit_code_says_so(run, frontend):
    frontend.failure, frontend.fail_after, frontend.fail_on = UnavailableError("rank 1 is dead"), 2, b"DBC"
    result = run("serve", "--url", frontend.url, "--num-warm-up", 0)
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["num_failed"], report["failures"]) == (1, {"rank 1 is dead": 1})
    assert result.stderr == "error: 1 of 6 requests failed, most of them with: rank 1 is dead\n"


def test_a_refused_request_is_named_with_its_status(run, frontend, trace):
    trace.write_text(json.dumps([{"prompt": [5], "output_len": 2}, {"prompt": [5] * 600, "output_len": 2}]))
    report = json.loads(run("serve", "--url", frontend.url, "--num-warm-up", 0).stdout)
    [(reason, count)] = report["failures"].items()
    assert reason.startswith("400: ")
    assert count == 1


def test_a_server_without_running_counts_has_its_pieces_counted_and_its_total_believed(run):
    """As llama.cpp's: one token a piece, and a last piece that has none."""

    async def complete(request):
        body = await request.json()

        async def events():
            for _ in range(body["max_tokens"] + 1):
                yield b'data: {"choices": [{"text": "x"}]}\r\n\r\n'
            usage = {"completion_tokens": body["max_tokens"]}
            yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def models(_):
        return JSONResponse({"data": [{"id": "m"}]})

    routes = [Route("/v1/completions", complete, methods=["POST"]), Route("/v1/models", models)]
    with fake.serving_app(Starlette(routes=routes)) as url:
        report = json.loads(run("serve", "--url", url, "--num-warm-up", 0).stdout)
    assert (report["num_failed"], report["out_tok"], report["itl_counts"]) == (0, sum(range(3, 9)), "pieces")


@pytest.mark.parametrize("command", [["serve"], ["sweep", "--rates", "1"]])
def test_nobody_at_the_address_is_a_clear_error(run, closed_url, command):
    result = run(*command, "--url", closed_url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: no server answers at {closed_url} (")
    assert "kvarto serve" in result.stderr


def test_nobody_at_the_grpc_port_is_a_clear_error(run, frontend, closed_url, monkeypatch):
    monkeypatch.setattr("kvarto.cluster.grpc.client.CONNECT_S", 0.2)
    port = closed_url.rpartition(":")[2]
    result = run("serve", "--url", frontend.url, "--grpc", "--grpc-port", port)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: no gRPC server answers at 127.0.0.1:{port}")
    assert "--grpc-port" in result.stderr


@pytest.mark.parametrize(("args", "message"), [
    (["serve", "--rate", "0"], "above 0"), (["serve", "--rate", "nan"], "above 0"),
    (["serve", "--slo-ttft-ms", "0"], "--slo-ttft-ms takes milliseconds above 0"),
    (["serve", "--slo-itl-ms", "inf"], "--slo-itl-ms takes milliseconds above 0"),
    (["sweep", "--rates", "1,x"], "--rates takes numbers"), (["sweep", "--rates", "1,0"], "above 0"),
    (["sweep", "--rates", "1,inf"], "no place for inf"),
    (["sweep", "--rates", "1", "--plot", "x.gif"], "ends with .svg or .png"),
    (["sweep", "--rates", "1", "--plot", "/no/such/x.svg"], "there is no folder /no/such")])
def test_bad_options_are_refused_before_anything_is_asked(run, closed_url, args, message):
    result = run(*args, "--url", closed_url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_engine_options_do_not_go_with_a_server(run, frontend):
    result = run("serve", "--url", frontend.url, "--block-size", 32)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: block_size cannot be set with --url")


def test_without_a_model_or_an_address_the_model_is_asked_for(run):
    result = run("serve")
    assert result.exit_code == 2
    assert "model" in result.stderr


def test_a_plot_without_matplotlib_says_what_to_install(run, closed_url, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("sweep", "--rates", "1", "--plot", "x.svg", "--url", closed_url)
    assert result.exit_code == 2
    assert "pip install 'kvarto[plot]'" in result.stderr


def test_a_sweep_is_a_table_a_plot_and_a_json_line(run, frontend, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "sweep.svg"
    result = run("sweep", "--rates", "100,400", "--url", frontend.url, "--num-warm-up", 0, "--plot", plot)
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout)["points"]
    assert [point["rate"] for point in points] == [100, 400]
    assert all(point["out_tok"] == sum(range(3, 9)) for point in points)
    assert "TTFT" in result.stderr
    assert "<svg" in plot.read_text()
    # The second rate's prompts are new to a prefix cache.
    prompts = [tuple(prompt) for prompt, _, _ in frontend.submitted.values()]
    assert len(set(prompts)) == 12
