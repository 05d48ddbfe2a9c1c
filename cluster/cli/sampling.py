"""The sampling options that `generate` and `chat` share. What they may be is checked by `SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ...protos.sampling import SamplingParams

MaxTokens = Annotated[int | None, typer.Option(
    metavar="INTEGER", help="Most tokens to generate; default: as many as fit.")]
Temperature = Annotated[float | None, typer.Option(
    metavar="NUMBER", help="0 is greedy; default of this and the next: what the model's files recommend.")]
TopP = Annotated[float | None, typer.Option(
    metavar="NUMBER", help="Sample among the likeliest tokens that together have this probability.")]
TopK = Annotated[int | None, typer.Option(
    metavar="INTEGER", help="Sample among this many likeliest tokens; 0: among all.")]
MinP = Annotated[float | None, typer.Option(
    metavar="NUMBER", help="Do not sample tokens less likely than this times the likeliest.")]
Seed = Annotated[int | None, typer.Option(metavar="INTEGER", help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(
    metavar="TEXT", help="End before this text; may be given several times.")]


def given_sampling(**values: Any) -> dict[str, Any]:
    """The options that were given. Raises `InvalidRequestError` for a bad value, before a model is loaded for it."""
    from ...protos.sampling import SamplingParams

    given = {name: value for name, value in values.items() if value is not None and value != []}
    SamplingParams(**given)
    return given


def sampling_params(given: dict[str, Any], recommended: dict[str, Any]) -> SamplingParams:
    """`given` over what the model's makers recommend; without `max_tokens`, as many as fit."""
    from ...protos.sampling import SamplingParams

    return SamplingParams(**{"max_tokens": None, **recommended, **given})
