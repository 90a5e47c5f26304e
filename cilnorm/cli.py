"""The command line: parse, call, print. Torch and the plugins are imported once a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cilnorm.registry import Registry
    from cilnorm.runner import Result
    from cilnorm.spec import Spec

__all__ = ["app", "main"]

app = typer.Typer(
    help="Any normalisation layer with any class-incremental method on any backbone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Name = Annotated[str | None, typer.Option()]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Strict = Annotated[bool, typer.Option("--strict", help="A plugin that can't be loaded is an error.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder in which data sets lie; also CILNORM_DATA.")]
Every = Annotated[str | None, typer.Option(metavar="60s", help="Save within epochs, too: 60s, 5m, 1h.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="The same bits on a GPU, too, if more slowly.")]


@app.command("run")
def run_command(
    method: Annotated[str | None, typer.Option(help="See `cilnorm list`.")] = None,
    norm: Annotated[str | None, typer.Option(help="See `cilnorm list`.")] = None,
    backbone: Annotated[str | None, typer.Option(help="See `cilnorm list`.")] = None,
    dataset: Annotated[str | None, typer.Option(help="See `cilnorm list`.")] = None,
    preset: Annotated[str, typer.Option(help="Where all other values come from.")] = "quick",
    spec: Annotated[Path | None, typer.Option(help="Repeat the run of this spec.yaml instead of a preset.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any hyperparameter.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random but the order of classes.")] = None,
    class_order_seed: Annotated[int | None, typer.Option(help="Of the order of classes.")] = None,
    tasks: Annotated[int | None, typer.Option(help="Into how many tasks the classes are split.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs a task; milestones scale along.")] = None,
    memory: Annotated[int | None, typer.Option(help="Exemplars kept in all.")] = None,
    rows: Annotated[str | None, typer.Option(help="Current:past rows of a batch, 48:16 say.")] = None,
    classifier: Annotated[str | None, typer.Option(help="head, or nme: nearest mean of exemplars.")] = None,
    train_per_class: Annotated[int | None, typer.Option(help="Use so many training images of a class.")] = None,
    protocol: Annotated[str | None, typer.Option(help="corrected (the paper) or released (its code).")] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; a new one under runs/ by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in --out.")] = False,
    go_on: Annotated[
        bool, typer.Option("--resume", help="Continue the run that is in --out, if it is the same.")
    ] = False,
    checkpoint_every: Every = None,
    deterministic: Deterministic = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved spec and stop.")] = False,
    strict: Strict = False,
    debug: Debug = False,
) -> None:
    """Learn a sequence of tasks and print the accuracy matrix as it grows."""
    asked = {
        "method": method, "norm": norm, "backbone": backbone, "dataset": dataset, "seed": seed,
        "class_order_seed": class_order_seed, "tasks": tasks, "epochs": epochs, "memory": memory, "rows": rows,
        "classifier": classifier, "train_per_class": train_per_class, "protocol": protocol,
    }  # fmt: skip
    asked = {key: value for key, value in asked.items() if value is not None}

    def work() -> None:
        registry = _registry(strict)
        chosen = _chosen(registry, preset, spec, {**asked, **_settings(set_ or [])})
        if dry_run:
            from cilnorm.spec import to_yaml

            print(to_yaml(chosen), end="")
            return
        from cilnorm.runner import run

        how = {**_how(checkpoint_every, deterministic), "device": device, "data_root": data_root, "registry": registry}
        _watched(lambda display: run(chosen, out, **how, watch=[display], overwrite=overwrite, go_on=go_on))

    _guarded(work, debug)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of the run.")],
    device: Device = "auto",
    data_root: DataRoot = None,
    checkpoint_every: Every = None,
    deterministic: Deterministic = False,
    debug: Debug = False,
) -> None:
    """Continue a run that was stopped."""

    def work() -> None:
        from cilnorm.runner import resume as go_on

        how = _how(checkpoint_every, deterministic)
        how |= {"device": device, "data_root": data_root, "registry": _registry(False)}
        _watched(lambda display: go_on(folder, **how, watch=[display]))

    _guarded(work, debug)


@app.command("list")
def list_command(strict: Strict = False, debug: Debug = False) -> None:
    """Show every norm, method, backbone, data set and preset."""

    def work() -> None:
        from cilnorm.spec import read_settings

        registry = _registry(strict)
        for shelf in registry.shelves:
            rows = [
                (name, ", ".join(record.aliases), record.paper, shelf.sources[name]) for name, record in shelf.items()
            ]
            _table(f"{shelf.kind}s", ("name", "aliases", "paper", "distribution"), rows)
        presets = read_settings().presets
        _table("presets", ("name", "about"), [(name, str(values.get("about", ""))) for name, values in presets.items()])

    _guarded(work, debug)


@app.command()
def plugins(strict: Strict = False, debug: Debug = False) -> None:
    """Show what each distribution contributed, and what failed to load and why."""

    def work() -> None:
        rows = [
            (plugin.distribution, plugin.name, ", ".join(f"{kind} {name}" for kind, name in plugin.offers) or "-",
             plugin.error or "ok")
            for plugin in _registry(strict, quiet=True).plugins
        ]  # fmt: skip
        _table("plugins", ("distribution", "entry point", "offers", "state"), rows)

    _guarded(work, debug)


def _registry(strict: bool, quiet: bool = False) -> Registry:
    from cilnorm.registry import load

    registry = load(strict=strict)
    for plugin in () if quiet else registry.failed:
        _complain(f"plugin {plugin.name!r} of {plugin.distribution} left out: {plugin.error}")
    return registry


def _settings(pairs: list[str]) -> dict[str, Any]:
    from cilnorm.values import SpecError, parsed

    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise SpecError(f"--set takes KEY=VALUE, not {pair!r}")
        settings[key.strip()] = parsed(value, f"--set {pair!r}")
    return settings


def _how(checkpoint_every: str | None, deterministic: bool) -> dict[str, Any]:
    from cilnorm.values import seconds

    every = None if checkpoint_every is None else seconds(checkpoint_every, "--checkpoint-every")
    if deterministic:
        from cilnorm.environment import be_deterministic

        be_deterministic()
    return {"checkpoint_every": every}


def _chosen(registry: Registry, preset: str, path: Path | None, asked: dict[str, Any]) -> Spec:
    from cilnorm.spec import read_spec, resolve

    return read_spec(path, registry, **asked) if path else resolve(preset, registry, **asked)


def _watched(go: Callable[[Any], Result]) -> None:
    from cilnorm.progress import Display

    with Display() as display:
        result = go(display)
    print(f"{result.folder}  (figures/accuracy.png, figures/matrix.png)")


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
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


def _complain(message: str) -> None:
    print(f"cilnorm: {message}", file=sys.stderr)


def _guarded(work: Callable[[], None], debug: bool) -> None:
    """Turns what a user can mend into one line and exit status 2, a stopped run into 1, Ctrl-C into 130."""
    try:
        work()
    except KeyboardInterrupt as error:
        _complain(str(error) or "interrupted; `cilnorm resume FOLDER` goes on where a run was begun")
        raise typer.Exit(getattr(error, "status", 130)) from None
    except Exception as error:
        if debug:
            raise
        from cilnorm.checkpoint import CheckpointError
        from cilnorm.folder import FolderError
        from cilnorm.images import DatasetError
        from cilnorm.registry import PluginError
        from cilnorm.spec import SpecError

        mendable = isinstance(error, (SpecError, DatasetError, FolderError, PluginError, CheckpointError))
        text = " ".join(str(error).split()) or type(error).__name__
        text = text if mendable or len(text) > 60 else f"{type(error).__name__}: {text}"
        _complain("; ".join([text, *getattr(error, "__notes__", ())]))
        raise typer.Exit(2 if mendable else 1) from None


def main() -> None:
    """Entry point of the command ``cilnorm``."""
    app()
