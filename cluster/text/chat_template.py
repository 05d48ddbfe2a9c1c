"""A model's own chat template, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ...protos.errors import InvalidRequestError
from .messages import template_messages


class ChatTemplate:
    """The templates of one model, by name. A request with tools takes `tool_use` where there is one."""

    def __init__(self, sources: Mapping[str, str], named_tokens: Mapping[str, str]) -> None:
        """`named_tokens`: `bos_token` and the like, which templates may write."""
        self._sources = sources
        self._named_tokens = named_tokens

    @property
    def exists(self) -> bool:
        return bool(self._sources)

    def render(
            self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool,
            tools: Sequence[Mapping[str, object]] | None, variables: Mapping[str, object]) -> str:
        """The prompt. `variables` go before `named_tokens` of the same name. Raises `InvalidRequestError` when there is
        no template, `messages` are malformed, or the template refuses them or fails on them."""
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise InvalidRequestError("tools must be a list of objects", param="tools")
        fixed = {
            "messages": template_messages(messages), "tools": tools, "add_generation_prompt": add_generation_prompt}
        if clash := sorted(fixed.keys() & variables.keys()):
            raise InvalidRequestError(f"{clash[0]} cannot be given as a variable of the chat template")
        template = self._template(has_tools=bool(tools))
        try:
            # `documents` is what templates for retrieval test for.
            return template.render({**self._named_tokens, "documents": None, **variables, **fixed})
        except TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages") from None
        except Exception as error:  # an expression of the template that these messages do not suit can raise anything
            raise InvalidRequestError(
                f"the model's chat template fails on these messages: {type(error).__name__}: {error}",
                param="messages") from error

    def _template(self, *, has_tools: bool) -> Template:
        name = "tool_use" if has_tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            have = f"it has only {', '.join(sorted(self._sources))}" if self._sources else "it is a base model"
            raise InvalidRequestError(
                f"this model has no chat template ({have}): send a plain prompt to /v1/completions or LLM.generate, or "
                "put a chat_template.jinja into the model's directory")
        try:
            return _compile(self._sources[name])
        except TemplateSyntaxError as error:
            raise InvalidRequestError(
                f"the model's chat template is damaged (line {error.lineno}: {error.message}): send a plain prompt, or "
                "mend the template in the model's files") from None


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant wrote, for training. Here its content is just text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _TemplateDict:
    """`dict` for templates, without the attributes of the real type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _TemplateNamespace(Namespace):
    """`namespace` that keeps templates, which come from the model's files, away from Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`, so that a template may set an attribute of that name
        for name in dict(*args[1:], **kwargs):
            _refuse_internal(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_internal(name)
        super().__setitem__(name, value)


def _refuse_internal(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"namespace attributes must not begin with an underscore, as {name!r} does")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
        sort_keys: bool = False) -> str:
    """Jinja's own `tojson` escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_TemplateDict(),
        namespace=_TemplateNamespace)
    return environment.from_string(source)
