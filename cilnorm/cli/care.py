"""Commands about what is there already: ``export`` and ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cilnorm.cli.terminal import guarded

__all__ = ["commands"]

commands = typer.Typer()


@commands.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    out: Annotated[Path | None, typer.Option(help="Folder for model.safetensors and card.json.")] = None,
    hub: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for the Hugging Face Hub, with a model card.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a run's weights and a card that says what they are, for torch or timm alone."""

    def work() -> None:
        from cilnorm.registry import load
        from cilnorm.results.export import export
        from cilnorm.results.hub import export_for_hub
        from cilnorm.values import SpecError

        if out is None and hub is None:
            raise SpecError("say where to: --out FOLDER, or --hub FOLDER for the Hugging Face Hub")
        registry = load()
        written = [*(export(run, out, registry) if out else ()), *(export_for_hub(run, hub, registry) if hub else ())]
        for path in written:
            print(path)
        if hub:
            print(f"next: hf upload USER/NAME {hub}")

    guarded(work, debug)


@commands.command("doctor")
def doctor_command(
    data_root: Annotated[Path | None, typer.Option(help="Folder in which data sets lie; also CILNORM_DATA.")] = None,
    out: Annotated[Path, typer.Option(help="Where runs are to be written.")] = Path("runs"),
) -> None:
    """Look at versions, device, plugins, data sets and disk, and test the norms that can test themselves."""
    from cilnorm.cli.doctor import examine
    from cilnorm.registry import load

    healthy = True
    for finding in examine(load(), data_root, out):
        healthy = healthy and finding.healthy
        print(f"{'ok ' if finding.healthy else 'BAD'} {finding.name}: {finding.text}", flush=True)
    raise typer.Exit(not healthy)
