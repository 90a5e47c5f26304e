"""Commands over several runs: tables, and what is read from results."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cilnorm.terminal import complain, guarded, loaded, print_table, settings_of

if TYPE_CHECKING:
    from cilnorm.grid import Cell
    from cilnorm.jobs import Job
    from cilnorm.table import Entry

__all__ = ["commands", "run_seeds"]

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
    grid: Annotated[str, typer.Argument(metavar="NAME|FILE", help="norms, methods, or a YAML file of one's own.")],
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
    debug: Debug = False,
) -> None:
    """Fill a table: every method with every norm, each seed a run; go on where it was stopped."""

    def work() -> None:
        from cilnorm.grid import read_grid
        from cilnorm.spec import read_settings
        from cilnorm.workers import options

        registry, settings = loaded(False), read_settings()
        chosen = read_grid(grid, settings)
        wanted = chosen.cells(preset, seed_list(seeds), settings_of(set_ or []), registry, settings)
        home = out or Path("tables") / f"{chosen.name}-{preset}"
        runs = cells or (home / "cells" if out else home.parent / "cells")
        jobs = [_job(cell, runs) for cell in wanted]
        for job in jobs:
            job.prepare(registry)
        try:
            if launcher == "workers":
                _do(jobs, workers, retry_failed, options(device, data_root))
            else:
                _submit(jobs, launcher, retry_failed, options(device, data_root), settings_of(cluster or []))
        finally:
            _write(home, wanted, jobs, f"{chosen.name}, preset {preset}", chosen.about)
        _complain_of(jobs, f"see {runs}/*.log, and try again with --retry-failed")

    guarded(work, debug)


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


def _job(cell: Cell, folder: Path) -> Job:
    from cilnorm.jobs import Job

    return Job(f"{cell.method} x {cell.norm}", cell.spec, folder / cell.name)


def _do(jobs: Sequence[Job], workers: int, retry_failed: bool, flags: Sequence[str]) -> None:
    from cilnorm.board import Board
    from cilnorm.guard import Interrupted
    from cilnorm.workers import work

    tried = ("finished",) if retry_failed else ("finished", "failed")
    todo = [job for job in jobs if job.state not in tried]
    try:
        with Board(jobs, todo) as board:
            work(todo, workers, flags, board)
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        raise Interrupted(number, f"interrupted by {signal.Signals(number).name}; the same command goes on") from error


def _submit(
    jobs: Sequence[Job], launcher: str, retry_failed: bool, flags: Sequence[str], settings: dict[str, Any]
) -> None:
    from cilnorm.registry import nearest
    from cilnorm.slurm import executor, submit
    from cilnorm.values import SpecError

    if launcher != "slurm":
        raise SpecError(nearest("launcher", launcher, ("workers", "slurm")))
    done = ("finished",) if retry_failed else ("finished", "failed")
    todo = [job for job in jobs if job.state not in done]
    new = submit(todo, flags, executor(jobs[0].folder.parent / "submitit", launcher, settings))
    print(f"{len(new)} jobs submitted, {len(todo) - len(new)} in the queue; the same command shows how far they are")


def _write(home: Path, cells: Sequence[Cell], jobs: Sequence[Job], title: str, about: str) -> None:
    """Writes what there is so far, and prints it."""
    from cilnorm.files import write_atomically
    from cilnorm.table import to_csv, to_latex, to_markdown, verdicts

    entries = _entries(cells, jobs)
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(home / "table.md", to_markdown(entries, title))
    write_atomically(home / "table.csv", to_csv(entries))
    write_atomically(home / "table.tex", to_latex(entries, f"{title}: {about}" if about else title, home.name))
    _show(entries, title)
    for line in verdicts(entries):
        print(line)
    print(f"{home}/table.md, table.csv, table.tex")


def _entries(cells: Sequence[Cell], jobs: Sequence[Job]) -> list[Entry]:
    from cilnorm.published import METRICS, published
    from cilnorm.table import Entry

    groups: dict[tuple[str, str], list[tuple[Cell, Job]]] = {}
    for cell, job in zip(cells, jobs, strict=True):
        groups.setdefault((cell.method, cell.norm), []).append((cell, job))
    entries = []
    for (method, norm), members in groups.items():
        states = {job: job.state for _, job in members}
        summaries = [job.summary for job, state in states.items() if state == "finished"]
        missing = {job.spec.seed: job.unfinished for job, state in states.items() if state != "finished"}
        values = {metric: [float(summary[metric]) for summary in summaries] for metric in METRICS}
        reference = published(members[0][0].spec, method, norm)
        entries.append(Entry(method, norm, values, reference.values, missing, reference.note))
    return entries


def _show(entries: Sequence[Entry], title: str) -> None:
    from cilnorm.published import METRICS
    from cilnorm.table import cell_text

    rows = []
    for entry in entries:
        rows.append((entry.method, entry.norm, str(entry.seeds), *(cell_text(entry, metric) for metric in METRICS)))
        if entry.published:
            rows.append(("", "  paper", "", *(_against(entry, metric) for metric in METRICS)))
    print_table(title, ("method", "norm", "seeds", *METRICS), rows)


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
        from cilnorm.files import write_atomically
        from cilnorm.report import draw, report
        from cilnorm.results import read_result

        results = [read_result(folder) for folder in runs]
        write_atomically(out, report(results, title))
        print(out)
        for path in draw(results, figures) if figures else ():
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
        from cilnorm.comparison import compare, gather, parting, sentence
        from cilnorm.results import differing

        mine, theirs = gather(one), gather(other)
        names = (mine[0].label, theirs[0].label)
        apart = differing([mine[0].spec, theirs[0].spec], ("seed", "preset"))
        if len(mine) == len(theirs) == 1:
            where = parting(mine[0], theirs[0])
            print(f"not equal: {where}" if where else "equal to the bit: spec, losses, accuracies and weights")
            if not where:
                return
        else:
            print(f"the groups differ in {', '.join(apart)}" if apart else "the groups have the same settings")
        names = names if names[0] != names[1] else ("A", "B")
        found = compare(mine, theirs)
        rows = [
            (each.metric, _mean(each.one), _mean(each.other), f"{each.difference:+.2f}",
             "–" if each.p is None else f"{each.p:.3f}", "–" if each.effect is None else f"{each.effect:.2f}")
            for each in found
        ]  # fmt: skip
        effect = "d_z" if found[0].paired else "d"
        print_table("in %", ("metric", f"A: {names[0]}", f"B: {names[1]}", "B - A", "p", effect), rows)
        print(sentence(found[0], *names))

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
        from cilnorm.precise import precise
        from cilnorm.probe import bn_bias

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


def _mean(values: Sequence[float]) -> str:
    from cilnorm.table import spread

    mean, deviation = spread(values)
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def run_seeds(spec: Any, seeds: str, workers: int, out: Path | None, flags: Sequence[str]) -> None:
    """A spec with several seeds, each a run of its own in a folder ``seed-N``, and their mean at the end.

    Args:
        flags: what each run is told besides.

    Raises:
        SpecError, FolderError: before anything is trained.
        typer.Exit: a run is not finished; a line says so.
    """
    from dataclasses import replace

    from cilnorm.folder import folder_of_seeds
    from cilnorm.grid import Cell
    from cilnorm.jobs import Job

    numbers = seed_list(seeds)
    home = out or folder_of_seeds(spec)
    cells = [Cell(spec.method, spec.norm, replace(spec, seed=number)) for number in numbers]
    jobs = [Job(f"{spec.method} x {spec.norm}", cell.spec, home / f"seed-{cell.spec.seed}") for cell in cells]
    registry = loaded(False, quiet=True)
    for job in jobs:
        job.prepare(registry)
    try:
        _do(jobs, workers, True, flags)
    finally:
        _write(home, cells, jobs, f"{spec.method} x {spec.norm}, {spec.dataset}", "")
    _complain_of(jobs, f"see {home}/*.log; the same command tries again")
