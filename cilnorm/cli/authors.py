"""Commands for authors of plugins: ``check`` and ``new``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cilnorm.cli.terminal import guarded

__all__ = ["commands"]

commands = typer.Typer()


@commands.command("check")
def check_command(
    distribution: Annotated[str, typer.Argument(help="The pip-installed package that brings the plugins.")],
    names: Annotated[list[str] | None, typer.Option("--name", help="This record alone; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what compiles or starts processes.")] = False,
    data_root: Annotated[Path | None, typer.Option(help="Where its data sets' images lie; also CILNORM_DATA.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Hold all that a plugin package offers to what cilnorm promises; status 1 if anything is broken."""

    def work() -> None:
        from cilnorm.testing import Broken, NotChecked, checks_of

        counts = {"ok": 0, "BROKEN": 0, "skipped": 0}
        for check in checks_of(distribution, root=data_root, slow=not quick):
            if names and check.name not in names:
                continue
            verdict, text = "ok", ""
            try:
                check()
            except NotChecked as error:
                verdict, text = "skipped", f": {error}"
            except Broken as error:
                verdict, text = "BROKEN", f"\n        {error}"
                if debug:
                    raise
            counts[verdict] += 1
            print(f"{verdict:7} {check.kind} {check.name}, {check.words}{text}", flush=True)
        print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
        if not sum(counts.values()):
            raise typer.Exit(2)
        raise typer.Exit(1 if counts["BROKEN"] else 0)

    guarded(work, debug)


@commands.command("new")
def new_command(
    kind: Annotated[str, typer.Argument(help="norm, method, backbone, dataset, logger or preset.")],
    name: Annotated[str, typer.Argument(help="What users will type for it.")],
    out: Annotated[Path, typer.Option(help="Where the folder of the package is made.")] = Path(),
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Make a plugin package to begin with: it installs, its tests pass, and it holds a small working example."""

    def work() -> None:
        from cilnorm.registry import load
        from cilnorm.starter import make_package

        folder = make_package(kind, name, out, load())
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(path)
        print(f"next: pip install -e '{folder}[test]' && cilnorm check {folder.name}")

    guarded(work, debug)
