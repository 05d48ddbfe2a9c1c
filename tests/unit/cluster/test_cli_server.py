"""`kvarto status` and `kvarto chat --url`, against a server with a frontend that only pretends."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvarto.cluster.cli.app import app
from kvarto.cluster.frontend_protocol import Health
from kvarto.protos.errors import UnavailableError

_spec = importlib.util.spec_from_file_location("http_fake", Path(__file__).with_name("http_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

GROUP = {"epoch": 3, "num_running": 5, "num_waiting": 8, "num_preemptions": 13, "num_steps": 21, "kv_waste": 0.034,
         "slots_used": 966, "slots_allocated": 1000, "since_progress_s": 0.0,
         "blocks": {"total": 240, "free": 110, "used": 120, "releasing": 10}}
INFO = {"epoch": 3, "max_model_len": 512, "vocab_size": 256, "max_num_seqs": 64, "kv_capacity_tokens": 3840,
        "block_size": 16, "kv_pools": [{"num_blocks": 240}, {"num_blocks": 60, "window": 512}],
        "kernels": "native-avx512", "collectives": "shared memory", "kv_cache_dtype": "int8",
        "dtype": "float32", "quantization": "int4", "tp_size": 2, "num_groups": 2}


class Frontend(fake.FakeFrontend):
    def __init__(self, **options):
        super().__init__(fake.make_config(**options), reply="Well met. ")
        self.body = {"draining": False, "num_groups": 2, "num_groups_alive": 1, "groups": {"0": GROUP}, "info": INFO}

    async def status(self):
        return self.body


@pytest.fixture(scope="module")
def server():
    with fake.shared_server() as server:
        yield server


@pytest.fixture
def frontend(server):
    return server(Frontend())


@pytest.fixture
def run(frontend):
    """Invoke a command against the server."""
    return lambda command, *args, **options: CliRunner().invoke(
        app, [command, "--url", frontend.url, *args], **options)


@pytest.fixture(scope="module")
def locked_url():
    with fake.running(Frontend(api_key="söcret")) as url:
        yield url


@pytest.fixture
def closed_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_status_shows_health_groups_and_capacity(run, frontend):
    result = run("status", env={"COLUMNS": "80"})
    assert result.exit_code == 0
    [title, *lines] = result.stdout.splitlines()
    assert title == f"{frontend.url}: ready"
    rows = [line.split() for line in lines]
    assert ["0", "3", "5", "8", "13", "██████▓░░░░░", "120/240", "3.4%"] in rows
    assert ["1", "down"] in rows
    assert "3,840 tokens of KV cache (int8) in 240 + 60 blocks of 16" in result.stdout
    said = " ".join(result.stdout.split())
    assert "tp_size 2, float32 (weights int4), kernels native-avx512, collectives shared memory" in said


def test_status_says_why_the_server_is_not_ready(run, frontend):
    frontend.state = Health(live=True, ready=False, reason="rank 1 is dead")
    result = run("status")
    assert result.exit_code == 0
    assert f"{frontend.url}: not ready: rank 1 is dead" in result.stdout


def test_status_as_json_is_what_the_server_says(run, frontend):
    body = json.loads(run("status", "--json").stdout)
    assert body == {**frontend.body, "health": {"live": True, "ready": True, "reason": ""}}


def test_status_of_another_version_is_a_clear_error(run, frontend):
    frontend.body = {"groups": []}
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: the server at {frontend.url} describes itself otherwise")


@pytest.mark.parametrize("command", ["status", "chat"])
def test_nobody_at_the_address_is_a_clear_error(command, closed_url):
    result = CliRunner().invoke(app, [command, "--url", closed_url], input="hello\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: no server answers at {closed_url} (")


@pytest.mark.parametrize("command", ["status", "chat"])
def test_an_address_that_is_none_is_a_clear_error(command):
    result = CliRunner().invoke(app, [command, "--url", "localhost:8000"], input="hello\n")
    assert result.exit_code == 2
    assert "is no URL of a server" in result.stderr


@pytest.mark.parametrize("command", ["status", "chat"])
def test_the_api_key_is_sent(command, locked_url):
    def invoke(*args, **env):
        return CliRunner().invoke(app, [command, "--url", locked_url, *args], input="hello\n", env=env)

    assert invoke("--api-key", "söcret").exit_code == 0
    assert invoke(KVARTO_API_KEY="söcret").exit_code == 0
    wrong = invoke("--api-key", "other")
    assert wrong.exit_code == 1
    assert wrong.stderr == "error: the API key is not the one that this server was started with\n"


def test_lines_are_turns_of_one_conversation_until_reset_and_exit(run, frontend):
    lines = "one\n\n two \n/reset\nthree\n/exit\nfour\n"
    result = run("chat", "--system", "Be brief.", "--max-tokens", "9", input=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout == "Well met.\n" * 3
    opening, said = "<system>Be brief.", "<assistant>Well met."
    assert [bytes(prompt).decode() for prompt, _, _ in frontend.submitted.values()] == [
        f"{opening}<user>one<assistant>", f"{opening}<user>one{said}<user>two<assistant>",
        f"{opening}<user>three<assistant>"]


def test_sampling_options_are_sent(run, frontend):
    run("chat", "--temperature", "0.5", "--top-k", "7", "--seed", "3", "--stop", "met", "--stop", "x", input="hi\n")
    [(_, params, _)] = frontend.submitted.values()
    assert (params.temperature, params.top_k, params.seed, params.stop) == (0.5, 7, 3, ["met", "x"])


def test_a_name_that_is_not_served_is_the_servers_error(run):
    result = run("chat", "other", input="hi\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the model 'other' does not exist here")


def test_an_answer_that_breaks_off_is_an_error(run, frontend):
    frontend.failure, frontend.fail_after = UnavailableError("rank 1 is dead"), 4
    result = run("chat", input="hi\n")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "Well", "error: rank 1 is dead\n")


def test_engine_options_do_not_go_with_a_server(run):
    result = run("chat", "--block-size", "32", input="hi\n")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: block_size cannot be set with --url")


def test_at_a_terminal_ctrl_c_forgets_the_turn_and_a_refusal_is_not_the_end(run, frontend, monkeypatch):
    lines = iter(["x" * 600, "one", "two"])

    def type_line(_prompt):
        if not (line := next(lines, None)):
            raise EOFError
        return line

    monkeypatch.setattr("kvarto.cluster.cli.chat._on_terminal", lambda: True)
    monkeypatch.setattr("builtins.input", type_line)
    interrupted = iter([True, False])

    def echo_once(text="", **options):
        if text == "W" and next(interrupted):
            raise KeyboardInterrupt
        return echo(text, **options)

    echo = typer.echo
    monkeypatch.setattr(typer, "echo", echo_once)
    result = run("chat", "--max-tokens", "4")
    assert result.exit_code == 0, result.output
    assert "error: " in result.stderr
    assert "interrupted" in result.stderr
    assert result.stdout == "Well\n\n"
    assert [bytes(prompt).decode() for prompt, _, _ in frontend.submitted.values()] == [
        "<user>one<assistant>", "<user>two<assistant>"]
