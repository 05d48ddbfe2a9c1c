"""`kvarto generate`: completions of prompts, to the terminal or to a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ...protos.config import EngineConfig
from ...protos.errors import InvalidRequestError
from . import sampling
from .options import GivenConfig, takes_config

if TYPE_CHECKING:
    from ..frontend.request_state import RequestState
    from .local_model import LocalModel

FROM_STDIN = "-"


@takes_config(EngineConfig, model="required")
def generate(
    given: GivenConfig,
    prompts: Annotated[list[str], typer.Argument(
        metavar="PROMPT", help="Texts to continue; - is what stdin holds.", show_default=False)],
    max_tokens: sampling.MaxTokens = None,
    temperature: sampling.Temperature = None,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    min_p: sampling.MinP = None,
    seed: sampling.Seed = None,
    n: Annotated[int, typer.Option(metavar="INTEGER", help="Completions of each prompt.")] = 1,
    stop: sampling.Stop = None,
) -> None:
    """Print what MODEL makes of each PROMPT, as it comes."""
    config = EngineConfig.parse(given)
    values = sampling.given_sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, n=n,
        stop=stop)
    texts = _texts(prompts)
    from .local_model import LocalModel

    with LocalModel(config) as model:
        params = sampling.sampling_params(values, model.frontend.default_sampling)
        requests = model.submit([model.frontend.tokenizer.encode(text) for text in texts], params)
        for number, request in enumerate(requests, start=1):
            title = f"prompt {number}" if len(requests) > 1 else ""
            if n == 1:
                _print_as_it_comes(model, request, title)
            else:
                _print_each(model, request, title, n)


def _texts(prompts: list[str]) -> list[str]:
    if prompts.count(FROM_STDIN) > 1:
        raise InvalidRequestError("stdin can be read once: give one '-'", param="prompt")
    # The line feed that ends a file or an `echo` is not meant as a part of the prompt.
    return [sys.stdin.read().removesuffix("\n") if prompt == FROM_STDIN else prompt for prompt in prompts]


def _print_as_it_comes(model: LocalModel, request: RequestState, title: str) -> None:
    _print_title(title)
    for chunk in model.chunks(request):
        typer.echo(chunk.text, nl=False)
    typer.echo()


def _print_each(model: LocalModel, request: RequestState, title: str, n: int) -> None:
    """Completions of one prompt come interleaved: they are printed when all of them are there."""
    texts = [""] * n
    for chunk in model.chunks(request):
        texts[chunk.index] += chunk.text
    for index, text in enumerate(texts, start=1):
        _print_title(f"{title}, completion {index}" if title else f"completion {index}")
        typer.echo(text)


def _print_title(title: str) -> None:
    if title:
        typer.echo(f"==> {title} <==")
