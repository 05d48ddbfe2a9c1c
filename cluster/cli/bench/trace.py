"""Traces: the requests that a benchmark replays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....protos.errors import ConfigError

_EXAMPLE = '{"prompt": [3, 7], "output_len": 16}'


@dataclass(frozen=True)
class TraceRequest:
    """One request: the token ids of its prompt, and how many tokens are generated."""

    prompt: list[int]
    output_len: int


def read_trace(path: Path) -> list[TraceRequest]:
    """A JSON list of such as `{"prompt": [3, 7], "output_len": 16}`. Raises `ConfigError` that names the first entry
    that is not."""
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # of the JSON or of its encoding
        raise ConfigError(f"the trace {path} is not valid JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"the trace {path} must be a JSON list of at least one {_EXAMPLE}")
    return [_request(path, number, entry) for number, entry in enumerate(entries)]


def rotated(requests: Sequence[TraceRequest], places: int) -> list[TraceRequest]:
    """The same requests with each prompt turned by `places` tokens: as long, and unknown to a prefix cache."""
    return [TraceRequest(request.prompt[turn:] + request.prompt[:turn], request.output_len)
            for request in requests for turn in [places % len(request.prompt)]]


def _request(path: Path, number: int, entry: Any) -> TraceRequest:
    where = f"the trace {path}, entry {number}"
    if not isinstance(entry, dict) or not {"prompt", "output_len"} <= entry.keys():
        raise ConfigError(f"{where}: must be such as {_EXAMPLE}")
    prompt, output_len = entry["prompt"], entry["output_len"]
    if not isinstance(prompt, list) or not prompt or not all(_is_int(token_id, low=0) for token_id in prompt):
        raise ConfigError(f"{where}: prompt must be a list of at least one token id")
    if not _is_int(output_len, low=1):
        raise ConfigError(f"{where}: output_len must be a positive integer, got {output_len!r}")
    return TraceRequest(prompt, output_len)


def _is_int(value: object, *, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
