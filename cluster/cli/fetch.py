"""`kvarto fetch`: a model's files before a server needs them."""

from __future__ import annotations

from typing import Annotated

import typer


def fetch(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="Directory in Hugging Face format, .gguf file, hub id or alias.", show_default=False)],
) -> None:
    """Have MODEL on this machine, whole and readable by kvarto, and print its path.

    What is there already is not fetched again. Hub ids go to HF_HOME, aliases to KVARTO_CACHE; HF_TOKEN opens gated
    models. Several processes may fetch into one cache at once.
    """
    from ..launcher.model import load_model_config
    from ..model_hub import resolve_model

    path = resolve_model(model)
    load_model_config(path)
    typer.echo(path)
