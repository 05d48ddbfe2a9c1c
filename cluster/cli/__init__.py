"""The command line. Importing it loads neither torch, Ray nor a web framework: a command loads what it needs."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from .app import INTERRUPTED, app

__all__ = ["main"]


def main() -> None:
    """Entry point of `kvarto`. Leaves the process with the command's exit code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        app(prog_name="kvarto")
    except KeyboardInterrupt:  # that came before a command was reached, or while it was being left
        sys.exit(INTERRUPTED)


def _on_sigterm(number: int, _: object) -> NoReturn:
    """Leave as after Ctrl-C, so that what a command has started is ended: ranks on Ray outlive their driver."""
    sys.exit(128 + number)
