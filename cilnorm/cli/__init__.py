"""The command line: parse, call, print. Whatever a command does can be called from Python."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of the command ``cilnorm``."""
    from cilnorm.cli import app

    app.main()
