"""Bytes of a request body to a checked struct."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from ...protos.errors import InvalidRequestError, UnprocessableError

T = TypeVar("T")

_PLACE = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<where>[^`]*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode `body`. Raises `UnprocessableError` for a wrong type and `InvalidRequestError` for an unknown field or
    for what is not JSON; both name the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except RecursionError:
        raise InvalidRequestError("the body is not usable: it is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is not valid JSON in UTF-8: {error}") from None


def _explain(text: str) -> InvalidRequestError:
    match = _PLACE.fullmatch(text)
    what, where = (match["what"], match["where"] or "") if match else (text, "")
    if unknown := _UNKNOWN.fullmatch(what):
        name = f"{where}.{unknown['name']}" if where else unknown["name"]
        return InvalidRequestError(f"unknown field '{name}'", param=name)
    if missing := _MISSING.fullmatch(what):
        name = f"{where}.{missing['name']}" if where else missing["name"]
        return UnprocessableError(f"the field '{name}' is missing", param=name)
    what = what.replace("`", "")
    return UnprocessableError(f"{where}: {what}" if where else f"the body: {what}", param=where or None)
