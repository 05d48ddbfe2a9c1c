"""Traces that cannot be replayed."""

from __future__ import annotations

import json

import pytest

from kvarto.cluster.cli.bench.trace import TraceRequest, read_trace
from kvarto.protos.errors import ConfigError

GOOD = {"prompt": [3, 7], "output_len": 16}


@pytest.fixture
def trace(tmp_path):
    def write(text):
        path = tmp_path / "trace.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_trace_is_read(trace):
    assert read_trace(trace(json.dumps([GOOD, GOOD]))) == [TraceRequest([3, 7], 16)] * 2


@pytest.mark.parametrize(("text", "message"), [
    ("[{", "is not valid JSON"), (b"\xff\xfe", "is not valid JSON"), ("{}", "must be a JSON list"),
    ("[]", "must be a JSON list of at least one")])
def test_what_is_no_list_is_refused(trace, text, message):
    with pytest.raises(ConfigError, match=message):
        read_trace(trace(text))


@pytest.mark.parametrize(("change", "message"), [
    ({"prompt": []}, "prompt must be a list of at least one token id"),
    ({"prompt": "text"}, "prompt must be"), ({"prompt": [1.5]}, "prompt must be"),
    ({"prompt": [True]}, "prompt must be"), ({"prompt": [-1]}, "prompt must be"),
    ({"output_len": 0}, "output_len must be a positive integer, got 0"),
    ({"output_len": "9"}, "output_len must be"), ({"output_len": None}, "output_len must be")])
def test_the_first_bad_entry_is_named(trace, change, message):
    with pytest.raises(ConfigError, match=f"entry 1: {message}"):
        read_trace(trace(json.dumps([GOOD, GOOD | change, 7])))


@pytest.mark.parametrize("entry", [7, {}, {"prompt": [1]}, {"output_len": 1}, None])
def test_an_entry_of_another_form_is_refused(trace, entry):
    with pytest.raises(ConfigError, match="entry 0: must be such as"):
        read_trace(trace(json.dumps([entry])))


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)
