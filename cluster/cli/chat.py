"""`kvarto chat`: a conversation, with a model loaded here or with a running server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Annotated, Any

import typer

from ...protos.config import EngineConfig
from ...protos.errors import ConfigError, InvalidRequestError
from . import sampling
from .options import GivenConfig, takes_config
from .server_options import ApiKey

Messages = list[dict[str, str]]
Pieces = Generator[str, None, None]
Answer = Callable[[Messages], Pieces]
"""The pieces of the assistant's next message. Closing the generator ends it early."""


@takes_config(EngineConfig, model="optional")
def chat(
    given: GivenConfig,
    system: Annotated[str | None, typer.Option(help="What the assistant is told before all else.")] = None,
    url: Annotated[str | None, typer.Option(
        help="Talk to the server there instead of loading a model; MODEL is then the name that it serves.")] = None,
    api_key: ApiKey = None,
    max_tokens: sampling.MaxTokens = None,
    temperature: sampling.Temperature = None,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    min_p: sampling.MinP = None,
    seed: sampling.Seed = None,
    stop: sampling.Stop = None,
) -> None:
    """Talk with MODEL. /reset begins anew, /exit ends, Ctrl-C interrupts an answer.

    What does not come from a terminal is read line by line, each line a turn.
    """
    values = sampling.given_sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop)
    with _at_server(url, api_key, given, values) if url else _loaded_here(EngineConfig.parse(given), values) as answer:
        _talk(answer, [] if system is None else [{"role": "system", "content": system}])


@contextmanager
def _loaded_here(config: EngineConfig, values: dict[str, Any]) -> Iterator[Answer]:
    from .local_model import LocalModel

    with LocalModel(config) as model:
        tokenizer = model.frontend.tokenizer
        params = sampling.sampling_params(values, model.frontend.default_sampling)

        def answer(messages: Messages) -> Pieces:
            # The template writes the special tokens.
            prompt = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
            [request] = model.submit([prompt], params)
            with closing(model.chunks(request)) as chunks:
                yield from (chunk.text for chunk in chunks)

        yield answer


@contextmanager
def _at_server(url: str, api_key: str | None, given: GivenConfig, values: dict[str, Any]) -> Iterator[Answer]:
    from .server_client import ServerClient

    if unused := sorted(given.keys() - {"model"}):
        raise ConfigError(f"{', '.join(unused)} cannot be set with --url: the server there has loaded its model")
    with ServerClient(url, api_key) as server:
        yield lambda messages: server.stream_chat({**given, **values, "messages": messages, "stream": True})


def _talk(answer: Answer, opening: Messages) -> None:
    on_terminal = _on_terminal()
    messages = list(opening)
    for line in _typed_lines() if on_terminal else sys.stdin:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            messages = list(opening)
        elif text:
            asked: Messages = [*messages, {"role": "user", "content": text}]
            try:
                said = _print_answer(answer(asked))
            except KeyboardInterrupt:
                if not on_terminal:
                    raise
                typer.echo("\n(interrupted; this turn is forgotten)", err=True)
            except InvalidRequestError as error:
                # A script wants to know; a person can shorten the message, or begin anew.
                if not on_terminal:
                    raise
                typer.secho(f"error: {error.message}", fg="red", err=True)
            else:
                messages = [*asked, {"role": "assistant", "content": said}]


def _on_terminal() -> bool:
    return sys.stdin.isatty()


def _typed_lines() -> Iterator[str]:
    import readline  # noqa: F401  (gives `input` a history and the arrow keys)

    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return


def _print_answer(pieces: Pieces) -> str:
    said = []
    with closing(pieces):
        for piece in pieces:
            said.append(piece)
            typer.echo(piece, nl=False)
    typer.echo()
    return "".join(said)
