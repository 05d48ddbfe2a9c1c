"""Which command is done by what, and how a failure is told."""

from __future__ import annotations

import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ...protos.config import ServeConfig
from ...protos.errors import KvartoError
from .bench import bench
from .chat import chat
from .drain import drain
from .fetch import fetch
from .generate import generate
from .options import GivenConfig, takes_config
from .status import status

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


class _Commands(TyperGroup):
    """Ends a command that failed on purpose with one line and the error's own exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` was parsed for."""
        try:
            return super().invoke(ctx)
        except KvartoError as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            typer.secho(f"error: {' '.join(error.message.split())}", fg="red", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ... import __version__

        typer.echo(f"kvarto {__version__}")
        raise typer.Exit


@app.callback()
def kvarto(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Serve large language models from a paged KV cache.

    MODEL is a directory in Hugging Face format, a .gguf file, a hub id (org/name) or the alias smollm2-135m.
    """


@app.command()
@takes_config(ServeConfig, model="optional")
def serve(
    given: GivenConfig,
    address: Annotated[str | None, typer.Option(
        metavar="HOST:PORT", help="Ray cluster to run on; default: a local one, started here.")] = None,
) -> None:
    """Serve MODEL over HTTP (OpenAI's API) and gRPC until SIGTERM or Ctrl-C."""
    config = ServeConfig.parse(given)
    from .serve import run_serve

    raise typer.Exit(run_serve(config, address))


@app.command()
def demo() -> None:
    """Start a server, talk with it and end it."""
    from .demo import run_demo

    raise typer.Exit(run_demo())


app.command()(generate)
app.command()(chat)
app.command()(status)
app.command()(fetch)
app.command()(drain)
app.add_typer(bench, name="bench")
