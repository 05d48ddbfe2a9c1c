"""Flags, the configuration file, and that neither can drift from the configuration."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from kvarto.cluster.cli.app import app
from kvarto.protos.config import EngineConfig, ServeConfig

COMMANDS = {
    "serve": (["serve"], ServeConfig), "generate": (["generate"], EngineConfig), "chat": (["chat"], EngineConfig),
    "throughput": (["bench", "throughput"], EngineConfig), "latency": (["bench", "latency"], EngineConfig)}


@pytest.fixture
def run():
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def served(run, monkeypatch):
    """What `kvarto serve` with these arguments passes on: (configuration, Ray address)."""
    passed = []
    module = SimpleNamespace(run_serve=lambda *args: passed.append(args) or 0)
    monkeypatch.setitem(sys.modules, "kvarto.cluster.cli.serve", module)

    def serve(*args):
        result = run("serve", *args)
        assert result.exit_code == 0, result.output
        return passed[-1]

    return serve


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "kvarto.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_of_the_configuration_is_a_flag_with_its_description(run, name):
    command, config_class = COMMANDS[name]
    words = run(*command, "--help").stdout.split()
    text = " ".join(words)
    own = {"seed"} if name in ("generate", "chat") else set()
    for field_name, field in config_class.model_fields.items():
        if field_name == "model" and name not in ("throughput", "latency"):
            assert "MODEL" in words
        else:
            assert f"--{field_name.replace('_', '-')}" in words
        if field_name not in own:
            assert " ".join(field.description.split()) in text


def test_help_shows_choices_and_defaults(run):
    text = " ".join(run("serve", "--help").stdout.split())
    assert "--device [auto|cpu|cuda]" in text
    assert "--async-scheduling / --no-async-scheduling" in text
    assert "[default: 8000]" in text
    assert "[default: true]" in text


def test_flags_of_every_kind_reach_the_configuration(served):
    config, address = served(
        "some/model", "--dtype", "bfloat16", "--tensor-parallel-size", 2, "--no-async-scheduling", "--cpus-per-rank",
        0.5, "--api-key", "secret", "--address", "host:6379")
    assert config == ServeConfig.parse({
        "model": "some/model", "dtype": "bfloat16", "tensor_parallel_size": 2, "async_scheduling": False,
        "cpus_per_rank": 0.5, "api_key": "secret"})
    assert address == "host:6379"


def test_what_is_not_given_is_left_to_the_configuration(served):
    config, address = served("m")
    assert config.model_fields_set == {"model"}
    assert address is None


def test_null_stands_for_none(served):
    assert served("m", "--grpc-port", "null")[0].grpc_port is None


def test_flags_override_the_file(served, write):
    file = write("model: from-file\nblock_size: 32\nmax_num_seqs: 7\nasync_scheduling: false\n")
    config, _ = served("--config", file, "--block-size", 64, "--async-scheduling")
    assert (config.model, config.block_size, config.max_num_seqs, config.async_scheduling) == (
        "from-file", 64, 7, True)
    assert served("from-argument", "--config", file)[0].model == "from-argument"


def test_an_empty_file_says_nothing(served, write):
    assert served("m", "--config", write("# nothing\n"))[0] == ServeConfig.parse({"model": "m"})


@pytest.mark.parametrize(("text", "message"), [
    ("block_sise: 16", "unknown configuration key 'block_sise'; known keys: api_key, async_scheduling, "),
    ("block_size: 17", "block_size: must be 8, 16, 32, 64 or 128, got 17"),
    ("block_size: [", "is not valid YAML"),
    ("- block_size", "must be a mapping"),
    ("1: 2", "must be a mapping"),
    ("a: \0", "is not valid YAML"),
])
def test_a_bad_file_is_a_configuration_error(run, write, text, message):
    result = run("serve", "m", "--config", write(text))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_missing_file_is_a_configuration_error(run, tmp_path):
    result = run("serve", "m", "--config", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "none.yaml cannot be read" in result.stderr


@pytest.mark.parametrize(("flag", "value", "message"), [
    ("--block-size", "17", "error: block_size: must be 8, 16, 32, 64 or 128, got 17"),
    ("--tensor-parallel-size", "two", "error: tensor_parallel_size: "),
    ("--dtype", "float8", "error: dtype: "),
    ("--port", "70000", "error: port: "),
    ("--min-port", "2000", "error: configuration: min_port and max_port go together"),
])
def test_a_bad_value_is_refused_by_the_configuration(run, flag, value, message):
    result = run("serve", "m", flag, value)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)


def test_a_model_must_be_named_somewhere(run):
    result = run("serve")
    assert (result.exit_code, result.stderr) == (2, "error: model: Field required\n")


@pytest.mark.parametrize("args", [["--help"], ["bench", "throughput", "--help"], ["serve", "m", "--block-size", "17"]])
def test_the_command_line_is_light(args):
    script = ("import sys\nfrom kvarto.cluster.cli import main\n"
              f"sys.argv = ['kvarto', *{args}]\n"
              "try:\n    main()\nexcept SystemExit:\n    pass\n"
              "print(sorted({'torch', 'ray', 'fastapi', 'grpc', 'httpx', 'tokenizers'} & sys.modules.keys()))")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
