"""What every command shares: the plugins, values from the command line, tables, and errors as one line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from cilnorm.training.place import Place, place
from cilnorm.values import SpecError

if TYPE_CHECKING:
    from cilnorm.registry import Registry

__all__ = ["complain", "guarded", "loaded", "make_printable", "print_table", "refuse_several", "settings_of", "where"]


def loaded(strict: bool, quiet: bool = False) -> Registry:
    """All plugins; those that can't be loaded are complained of, unless ``quiet``."""
    from cilnorm.registry import load

    registry = load(strict=strict)
    for plugin in () if quiet or not where().leads else registry.failed:
        complain(f"plugin {plugin.name!r} of {plugin.distribution} left out: {plugin.error}")
    return registry


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """What ``--set KEY=VALUE`` asks for.

    Raises:
        SpecError: one can't be read.
    """
    from cilnorm.values import parsed

    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise SpecError(f"--set takes KEY=VALUE, not {pair!r}")
        settings[key.strip()] = parsed(value, f"--set {pair!r}")
    return settings


def print_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints a table; where there is no terminal, wide enough for other programs to read."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


def make_printable() -> None:
    """From now on a character that the terminal's encoding lacks is printed as its number, and no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def complain(message: str) -> None:
    """One line for the user on standard error."""
    here = where()
    of = "" if here.leads else f"process {here.index} of {here.size}: "
    print(f"cilnorm: {of}{message}", file=sys.stderr)


def where() -> Place:
    """This process among those that share a run; one of them speaks for all."""
    try:
        return place()
    except SpecError:  # whoever runs something says so
        return Place()


def refuse_several(what: str) -> None:
    """Raises SpecError if ``torchrun`` started several processes, which would all do ``what``."""
    if place().size > 1:
        raise SpecError(f"torchrun is for one run of several processes, and {what} would be done by each of them")


def guarded(work: Callable[[], None], debug: bool) -> None:
    """Turns what a user can mend into one line and exit status 2, a stopped run into 1, Ctrl-C into 130.

    A folder in which another process is at work gives ``BUSY``.
    """
    try:
        work()
    except KeyboardInterrupt as error:
        if where().leads:
            complain(str(error) or "interrupted; `cilnorm resume FOLDER` goes on where a run was begun")
        raise typer.Exit(getattr(error, "status", 130)) from None
    except typer.Exit:
        raise
    except BaseException as error:  # a plugin's SystemExit, say, which would end the command with status 0
        if debug:
            raise
        mendable = _mendable(error)
        text = " ".join(str(error).split()) or type(error).__name__
        text = text if mendable or len(text) > 60 else f"{type(error).__name__}: {text}"
        if where().leads or not getattr(error, "told", False):
            complain("; ".join([text, *getattr(error, "__notes__", ())]))
        raise typer.Exit(getattr(error, "status", 2 if mendable else 1)) from None


def _mendable(error: BaseException) -> bool:
    """Whether it is an error that says what the user can mend."""
    try:
        from cilnorm.images import DatasetError
        from cilnorm.registry import PluginError
        from cilnorm.spec import SpecError
        from cilnorm.storage.checkpoint import CheckpointError
        from cilnorm.storage.run_folder import FolderError
    except Exception:  # torch can't be imported, for lack of memory say; then the error is that, and none of these
        return False
    return isinstance(error, (SpecError, DatasetError, FolderError, PluginError, CheckpointError))
