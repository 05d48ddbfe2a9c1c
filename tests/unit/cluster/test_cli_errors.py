"""How the command line fails: one line, the right exit code, no traceback unless asked for."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from kvarto import __version__
from kvarto.cluster.cli import main
from kvarto.protos.errors import KvartoError, ModelLoadError


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit code, stdout, stderr) of `kvarto` with these arguments."""
    def run(*args):
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["kvarto", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def serving(monkeypatch):
    """Make `kvarto serve` raise this."""
    def fail(error):
        def run_serve(*_):
            raise error

        monkeypatch.setitem(sys.modules, "kvarto.cluster.cli.serve", SimpleNamespace(run_serve=run_serve))

    return fail


@pytest.mark.parametrize(("kind", "code"), [(ModelLoadError, 2), (KvartoError, 1)])
def test_an_error_is_one_line_and_its_own_exit_code(run, serving, kind, code):
    serving(kind("no\nsuch tensor"))
    assert run("serve", "m") == (code, "", "error: no such tensor\n")


def test_debug_shows_the_traceback(run, serving):
    serving(KvartoError("no"))
    code, _, stderr = run("--debug", "serve", "m")
    assert code == 1
    assert "Traceback" in stderr
    assert stderr.endswith("error: no\n")


def test_an_error_inside_a_group_of_commands_is_told_alike(run, tmp_path):
    code, stdout, stderr = run("bench", "throughput", "--model", "m", "--trace", str(tmp_path / "none.json"))
    assert (code, stdout) == (2, "")
    assert stderr == f"error: the trace {tmp_path}/none.json cannot be read: No such file or directory\n"


def test_ctrl_c_is_130(run, serving):
    serving(KeyboardInterrupt())
    assert run("serve", "m")[0] == 130


def test_an_unforeseen_error_keeps_its_traceback(run, serving):
    serving(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run("serve", "m")


@pytest.mark.parametrize("args", [
    ["generate", "m"], ["frobnicate"], ["serve", "--frob"], ["bench", "latency", "--model", "m", "--output-len", "1"]])
def test_wrong_usage_is_exit_code_2(run, args):
    code, stdout, stderr = run(*args)
    assert (code, stdout) == (2, "")
    assert "Traceback" not in stderr


@pytest.mark.parametrize("args", [
    ["generate", "m", "text", "--temperature", "nan"], ["generate", "m", "text", "--n", "0"],
    ["generate", "m", "-", "-"], ["chat", "m", "--top-p", "2"]])
def test_a_bad_request_is_refused_before_a_model_is_loaded(run, args):
    code, _, stderr = run(*args)
    assert code == 1
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def test_an_unknown_model_is_a_clear_error(run):
    code, _, stderr = run("generate", "/no/such/model", "text")
    assert code == 2
    assert stderr.startswith("error: there is no model at /no/such/model")


def test_version(run):
    assert run("--version") == (0, f"kvarto {__version__}\n", "")
