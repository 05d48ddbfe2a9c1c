"""Conversations in OpenAI's format, checked and brought to the shape that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...protos.errors import InvalidRequestError

Message = dict[str, Any]


def template_messages(messages: Sequence[Mapping[str, object]]) -> list[Message]:
    """A copy of `messages` for a template: text parts joined, null fields left out, arguments of tool calls parsed.

    Raises `InvalidRequestError` that names the message when it has no role, or content other than text."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages must be a list of at least one message", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Mapping[str, object], where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} must be an object with role and content", param="messages")
    if not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"{where}.role must be a string, such as 'user'", param="messages")
    # Templates test for a field with `is defined`, so a null one must look like an absent one.
    copy = {key: value for key, value in message.items() if value is not None}
    if "content" in copy:
        copy["content"] = _text(copy["content"], f"{where}.content")
    if "tool_calls" in copy:
        copy["tool_calls"] = _tool_calls(copy["tool_calls"], f"{where}.tool_calls")
    return copy


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"{where} must be a string or a list of text parts", param="messages")
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind != "text":
        raise InvalidRequestError(
            f"{where} is of type {kind!r}; this model takes text only: {{'type': 'text', 'text': ...}}",
            param="messages")
    if not isinstance(part.get("text"), str):
        raise InvalidRequestError(f"{where}.text must be a string", param="messages")
    return str(part["text"])


def _tool_calls(calls: object, where: str) -> list[Message]:
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise InvalidRequestError(f"{where} must be a list of objects", param="messages")
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Mapping[str, object], where: str) -> Message:
    """OpenAI sends arguments as a string of JSON; templates write them with `tojson`, which would quote it again."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(str(function["arguments"]) or "{}")
    except ValueError as error:
        raise InvalidRequestError(f"{where}.function.arguments is not JSON: {error}", param="messages") from None
    return {**call, "function": {**function, "arguments": arguments}}
