"""Flags of the commands that speak to a running server."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8000"

ApiKey = Annotated[str | None, typer.Option(
    envvar="KVARTO_API_KEY", show_default=False, help="Key that the server asks for.")]
