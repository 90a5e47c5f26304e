"""Commands over several runs: tables, and what is read from results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cilnorm.cli.terminal import complain, guarded, loaded, print_table, refuse_several, settings_of

if TYPE_CHECKING:
    from cilnorm.api import Launch, Sweep
    from cilnorm.registry import Registry
    from cilnorm.results.table import Entry
    from cilnorm.spec import Spec
    from cilnorm.sweep.jobs import Job

__all__ = ["commands", "run_seeds", "seed_list", "show_sweep"]

commands = typer.Typer()
SEEDS_LIMIT = 10_000  # of one range; a slip of the keyboard must not ask for millions of runs
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder in which data sets lie; also CILNORM_DATA.")]
Seeds = Annotated[str, typer.Option(help="Numbers: 0,1,2 or 0-4.")]
Workers = Annotated[int, typer.Option(min=1, help="How many runs at a time; they share the cores or the GPU.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")]


def seed_list(text: str) -> list[int]:
    """The numbers of ``0,1,2`` or ``0-4``, or of both: ``0-2,7``.

    Raises:
        SpecError: it is no such list.
    """
    from cilnorm.values import SpecError

    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part, re.ASCII)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not 0 <= last - first < SEEDS_LIMIT:
            found.clear()
            break
        found += range(first, last + 1)
    if not found or len(set(found)) < len(found):
        raise SpecError(f"--seeds takes different whole numbers, 0,1,2 or 0-4 say, not {text!r}")
    return found


@commands.command("table")
def table(
    grid: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="norms, methods, another grid of registry.yaml, or a YAML file.")
    ],
    preset: Annotated[str, typer.Option(help="Where all other values come from.")] = "quick",
    seeds: Seeds = "0",
    workers: Workers = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For every cell.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; tables/NAME-PRESET by default.")] = None,
    cells: Annotated[Path | None, typer.Option(help="Folder of the runs; tables may share it.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed cells again.")] = False,
    launcher: Annotated[str, typer.Option(help="workers on this machine, or slurm: a job a cell.")] = "workers",
    cluster: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Setting of submitit.")] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all but train, and say what can't begin.")] = False,
    debug: Debug = False,
) -> None:
    """Fill a table: every method with every norm, each seed a run; go on where it was stopped."""

    def work() -> None:
        from cilnorm.api import Launch, plan_table

        refuse_several("a table")
        values = settings_of(set_ or [])
        how = Launch(workers, device, data_root, retry_failed, launcher, settings_of(cluster or []))
        registry, places = loaded(False), {"out": out, "cells": cells}
        sweep = plan_table(grid, preset, seed_list(seeds), values, **places, registry=registry, written=not dry_run)
        if dry_run:
            _rehearse(sweep, device, data_root, registry)
            return
        _fill(sweep, how)
        _complain_of(sweep.jobs, f"see {sweep.jobs[0].folder.parent}/*.log, and try again with --retry-failed")

    guarded(work, debug)


def _rehearse(sweep: Sweep, device: str, data_root: Path | None, registry: Registry) -> None:
    """Prints the runs of a sweep, and whether they can begin; ends the command with status 1 if one can't."""
    told = sweep.rehearse(device=device, data_root=data_root, registry=registry)
    specs = {(cell.method, cell.norm): cell.spec for cell in reversed(sweep.cells)}
    rows = [
        (*place, specs[place].dataset, specs[place].backbone, refused or "can begin") for place, refused in told.items()
    ]
    print_table(sweep.title, ("method", "norm", "data set", "backbone", ""), rows)
    print(f"{len(sweep.cells)} runs, nothing trained or written")
    if broken := sum(map(bool, told.values())):
        complain(f"{broken} of {len(told)} can't begin")
        raise typer.Exit(1)


def _fill(sweep: Sweep, how: Launch) -> None:
    """Does what is left of a sweep, then writes its table and prints it, however that ended."""
    from cilnorm.cli.board import Board

    try:
        new = sweep.run(how, Board)
        if how.launcher != "workers":
            print(f"{new} jobs submitted; the same command shows how far they are")
    finally:
        paths = sweep.write()
        show_sweep(sweep)
        print(f"{paths[0]}, {', '.join(path.name for path in paths[1:])}")


def _complain_of(jobs: Sequence[Job], hint: str) -> None:
    """Ends the command with status 1 if a job is not finished."""
    states = [job.state for job in jobs]
    failed, open_ = states.count("failed"), len(states) - states.count("finished") - states.count("failed")
    if failed:
        complain(f"{failed} of {len(jobs)} runs failed; {hint}")
    if open_:
        complain(f"{open_} of {len(jobs)} runs are not finished; the same command goes on")
    if failed or open_:
        raise typer.Exit(1)


def show_sweep(sweep: Sweep) -> None:
    """Prints a sweep's table as it stands."""
    from cilnorm.metrics import TABULATED
    from cilnorm.results.table import cell_text, verdicts

    rows, entries = [], sweep.entries
    for entry in entries:
        rows.append((entry.method, entry.norm, str(entry.seeds), *(cell_text(entry, metric) for metric in TABULATED)))
        if entry.published:
            rows.append(("", "  paper", "", *(_against(entry, metric) for metric in TABULATED)))
    print_table(sweep.title, ("method", "norm", "seeds", *TABULATED), rows)
    for line in verdicts(entries):
        print(line)


def _against(entry: Entry, metric: str) -> str:
    apart, held = entry.difference(metric), entry.reproduced(metric)
    text = f"{entry.published[metric]:.2f}"
    return text if apart is None else f"{text} {apart:+.2f} {'ok' if held else 'no'}"


@commands.command("report")
def report_command(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "",
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG, SVG and PDF.")] = None,
    debug: Debug = False,
) -> None:
    """Write one page with the curves, matrices, losses and settings of some runs; it needs no network."""

    def work() -> None:
        from cilnorm.api import report

        for path in report(runs, out, title, figures):
            print(path)

    guarded(work, debug)


@commands.command("compare")
def compare_command(
    one: Annotated[str, typer.Argument(metavar="A", help="A run, a folder of runs, or a quoted pattern of runs.")],
    other: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    debug: Debug = False,
) -> None:
    """Say whether two runs are equal to the bit and where they part; test two groups of seeds against each other."""

    def work() -> None:
        from cilnorm.api import compare
        from cilnorm.metrics import mean_text

        found = compare(one, other)
        if found.difference is not None:
            same = "equal to the bit: spec, losses, accuracies and weights"
            print(f"not equal: {found.difference}" if found.difference else same)
        else:
            apart = ", ".join(found.settings)
            print(f"the groups differ in {apart}" if apart else "the groups have the same settings")
        if not found.metrics:
            return
        rows = [
            (each.metric, mean_text(each.one), mean_text(each.other), f"{each.difference:+.2f}",
             "–" if each.p is None else f"{each.p:.3f}", "–" if each.effect is None else f"{each.effect:.2f}")
            for each in found.metrics
        ]  # fmt: skip
        effect = "d_z" if found.metrics[0].paired else "d"
        print_table("in %", ("metric", f"A: {found.names[0]}", f"B: {found.names[1]}", "B - A", "p", effect), rows)
        print(found.verdict)

    guarded(work, debug)


@commands.command("probe")
def probe_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which experiment: bn-bias or precise.")],
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    epochs: Annotated[int, typer.Option(min=0, help="Passes over the images of all tasks.")] = 5,
    lr: Annotated[float | None, typer.Option(help="Learning rate; a tenth of the run's by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of what is found; probes/ in the run's by default.")] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Experiment on a finished run. bn-bias: re-tune its norm layers alone on the images of all tasks. precise: measure
    its running statistics anew on memory and newest images, as many of every class."""

    def work() -> None:
        from cilnorm.registry import nearest
        from cilnorm.values import SpecError

        if name not in ("bn-bias", "precise"):
            raise SpecError(nearest("probe", name, ["bn-bias", "precise"]))
        from cilnorm.experiment.precise import precise
        from cilnorm.results.probe import bn_bias

        registry = loaded(False)
        if name == "precise":
            precise(folder, device=device, data_root=data_root, registry=registry, tell=print, out=out)
            print(f"{out or folder / 'probes'}/precise.json")
            return
        bn_bias(
            folder, epochs=epochs, lr=lr, device=device, data_root=data_root, registry=registry, tell=print, out=out
        )
        print(f"{out or folder / 'probes'}/bn-bias.png, .svg, .pdf, .csv, .json")

    guarded(work, debug)


def run_seeds(spec: Spec, seeds: str, how: tuple[int, str, Path | None, Sequence[str]], out: Path | None) -> None:
    """A spec with several seeds, each a run of its own in a folder ``seed-N``, and their mean at the end.

    Args:
        how: workers, device, folder of data, and what each run is told besides.

    Raises:
        SpecError, FolderError: before anything is trained.
        typer.Exit: a run is not finished; a line says so.
    """
    from cilnorm.api import Launch, plan_seeds

    refuse_several("--seeds")
    sweep = plan_seeds(spec, seed_list(seeds), out=out, registry=loaded(False, quiet=True))
    workers, device, data_root, flags = how
    _fill(sweep, Launch(workers, device, data_root, retry_failed=True, flags=flags))
    _complain_of(sweep.jobs, f"see {sweep.folder}/*.log; the same command tries again")
