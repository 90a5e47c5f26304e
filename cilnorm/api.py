"""Whatever a command does, as a Python call. The command line parses, calls these and prints what they return."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cilnorm import registry as registries
from cilnorm.experiment.rehearsal import loading_once
from cilnorm.experiment.trials import rehearse
from cilnorm.files import write_atomically
from cilnorm.images import DatasetError
from cilnorm.metrics import TABULATED
from cilnorm.registry import Registry, nearest
from cilnorm.results import reading
from cilnorm.results import report as pages
from cilnorm.results.contrast import Contrast, compare
from cilnorm.results.published import published
from cilnorm.results.table import Entry, to_csv, to_latex, to_markdown
from cilnorm.spec import Spec, read_settings
from cilnorm.storage.interruptions import Interrupted
from cilnorm.storage.run_folder import folder_of_seeds
from cilnorm.sweep.grid import Cell, read_grid
from cilnorm.sweep.jobs import Job, still_to_do
from cilnorm.sweep.slurm import executor, submit
from cilnorm.sweep.tuning import Trial, Tuning
from cilnorm.sweep.workers import options, work
from cilnorm.values import SpecError

__all__ = [
    "Contrast",
    "Launch",
    "Sweep",
    "Tuned",
    "compare",
    "plan_seeds",
    "plan_table",
    "report",
    "run_seeds",
    "table",
    "tune",
]

JobWatcher = Callable[[Job, str], None]
Board = Callable[[Sequence[Job], Sequence[Job]], AbstractContextManager[JobWatcher]]


@dataclass(frozen=True)
class Launch:
    """How the runs of a sweep are executed; decides nothing about their numbers.

    Attributes:
        workers: how many at a time; they share the cores or the GPU.
        device: torch's name for it, or ``auto``.
        data_root: where data sets lie; their own default otherwise.
        retry_failed: try failed runs again.
        launcher: ``workers`` on this machine, or ``slurm``: a job a run, through submitit.
        cluster: settings of submitit.
        flags: what each run's command is told besides.
    """

    workers: int = 1
    device: str = "auto"
    data_root: Path | None = None
    retry_failed: bool = False
    launcher: str = "workers"
    cluster: Mapping[str, Any] = field(default_factory=dict)
    flags: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Sweep:
    """Runs that belong together, and the table that they fill.

    Attributes:
        folder: where the table is written.
        cells, jobs: what each run computes, and where it lies; in the same order.
    """

    title: str
    about: str
    folder: Path
    cells: Sequence[Cell]
    jobs: Sequence[Job]

    @property
    def entries(self) -> list[Entry]:
        """The table's entries as the runs stand now: one a method and norm, over its seeds."""
        groups: dict[tuple[str, str], list[tuple[Cell, Job]]] = {}
        for cell, job in zip(self.cells, self.jobs, strict=True):
            groups.setdefault((cell.method, cell.norm), []).append((cell, job))
        entries = []
        for (method, norm), members in groups.items():
            states = {job: job.state for _, job in members}
            summaries = [job.summary for job, state in states.items() if state == "finished"]
            missing = {job.spec.seed: job.unfinished for job, state in states.items() if state != "finished"}
            values = {metric: [float(summary[metric]) for summary in summaries] for metric in TABULATED}
            reference = published(members[0][0].spec, method, norm)
            entries.append(Entry(method, norm, values, reference.values, missing, reference.note))
        return entries

    def run(self, how: Launch | None = None, board: Board | None = None) -> int:
        """Does the runs that are not finished, or hands them to a cluster.

        Args:
            board: makes what is told of each run's progress; see ``cilnorm.cli.board``.

        Returns:
            How many jobs were submitted; 0 without a cluster.

        Raises:
            SpecError: no such launcher.
            Interrupted: a signal ended it; the same call goes on.
        """
        how = how or Launch()
        todo = still_to_do(self.jobs, how.retry_failed)
        flags = [*options(how.device, how.data_root), *how.flags]
        if how.launcher == "slurm":
            on = executor(self.jobs[0].folder.parent / "submitit", how.launcher, how.cluster)
            return len(submit(todo, flags, on))
        if how.launcher != "workers":
            raise SpecError(nearest("launcher", how.launcher, ("workers", "slurm")))
        try:
            with board(self.jobs, todo) if board else nullcontext(_nobody) as watch:
                work(todo, how.workers, flags, watch)
        except KeyboardInterrupt as error:
            number = getattr(error, "number", signal.SIGINT)
            text = f"interrupted by {signal.Signals(number).name}; the same command goes on"
            raise Interrupted(number, text) from error
        return 0

    def rehearse(
        self, *, device: str = "auto", data_root: Path | None = None, registry: Registry | None = None
    ) -> dict[tuple[str, str], str]:
        """Does all that its runs do before they train, once for each method and norm, and writes nothing.

        Data are found, or fetched or drawn as for a run; those of several runs once.

        Returns:
            By method and norm what a run would be refused for; an empty text where it would begin.
        """
        registry, told = loading_once(registry or registries.load()), {}
        for cell in self.cells:
            place = (cell.method, cell.norm)
            if place not in told:
                try:
                    rehearse(cell.spec, device=device, data_root=data_root, registry=registry)
                    told[place] = ""
                except (SpecError, DatasetError) as error:
                    told[place] = str(error)
        return told

    def write(self) -> list[Path]:
        """Writes the table as it stands: table.md, table.csv and table.tex; returns their paths."""
        entries = self.entries
        caption = f"{self.title}: {self.about}" if self.about else self.title
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "table.md": to_markdown(entries, self.title),
            "table.csv": to_csv(entries),
            "table.tex": to_latex(entries, caption, self.folder.name),
        }
        for name, text in texts.items():
            write_atomically(self.folder / name, text)
        return [self.folder / name for name in texts]


def _nobody(job: Job, what: str) -> None:
    """Nobody watches."""


def plan_table(
    grid: str,
    preset: str = "quick",
    seeds: Sequence[int] = (0,),
    values: Mapping[str, Any] | None = None,
    *,
    out: Path | str | None = None,
    cells: Path | str | None = None,
    registry: Registry | None = None,
    written: bool = True,
) -> Sweep:
    """A grid's runs, each written down in its place, none of them begun.

    Args:
        grid: the name of one in registry.yaml or of a plugin's, or a YAML file.
        values: for every cell, as ``cilnorm.resolve`` takes them.
        out: folder of the table; ``tables/NAME-PRESET`` by default.
        cells: folder of the runs; tables may share it.
        written: False leaves the disk as it is: for ``Sweep.rehearse``.

    Raises:
        SpecError, FolderError: nothing can be begun.
    """
    registry = registry or registries.load()
    settings = read_settings(registry=registry)
    chosen = read_grid(grid, settings)
    wanted = chosen.cells(preset, seeds, dict(values or {}), registry, settings)
    home = Path(out) if out else Path("tables") / f"{chosen.name}-{preset}"
    runs = Path(cells) if cells else home / "cells" if out else home.parent / "cells"
    jobs = [Job(f"{cell.method} x {cell.norm}", cell.spec, runs / cell.name) for cell in wanted]
    sweep = Sweep(f"{chosen.name}, preset {preset}", chosen.about, home, wanted, jobs)
    return _prepared(sweep, registry) if written else sweep


def plan_seeds(
    spec: Spec, seeds: Sequence[int], *, out: Path | str | None = None, registry: Registry | None = None
) -> Sweep:
    """A spec with several seeds, each a run in a folder ``seed-N`` of ``out``; none of them begun.

    Args:
        out: by default a folder under ``runs/`` that is the same whenever the spec is.

    Raises:
        SpecError, FolderError: nothing can be begun.
    """
    home = Path(out) if out else folder_of_seeds(spec)
    cells = [Cell(spec.method, spec.norm, replace(spec, seed=seed)) for seed in seeds]
    jobs = [Job(f"{spec.method} x {spec.norm}", cell.spec, home / f"seed-{cell.spec.seed}") for cell in cells]
    title = f"{spec.method} x {spec.norm}, {spec.dataset}"
    return _prepared(Sweep(title, "", home, cells, jobs), registry or registries.load())


def _prepared(sweep: Sweep, registry: Registry) -> Sweep:
    for job in sweep.jobs:
        job.prepare(registry)
    return sweep


def table(
    grid: str,
    preset: str = "quick",
    seeds: Sequence[int] = (0,),
    values: Mapping[str, Any] | None = None,
    *,
    out: Path | str | None = None,
    cells: Path | str | None = None,
    how: Launch | None = None,
    registry: Registry | None = None,
) -> Sweep:
    """Fills a table, ``cilnorm table``: every method with every norm, each seed a run; goes on where it was stopped.

    Arguments and errors are those of ``plan_table`` and ``Sweep.run``. The table is written whatever happens.
    """
    sweep = plan_table(grid, preset, seeds, values, out=out, cells=cells, registry=registry)
    try:
        sweep.run(how)
    finally:
        sweep.write()
    return sweep


def run_seeds(spec: Spec, seeds: Sequence[int], *, out: Path | str | None = None, how: Launch | None = None) -> Sweep:
    """Runs a spec with several seeds, ``cilnorm run --seeds``; goes on where it was stopped.

    Arguments and errors are those of ``plan_seeds`` and ``Sweep.run``.
    """
    sweep = plan_seeds(spec, seeds, out=out)
    try:
        sweep.run(how)
    finally:
        sweep.write()
    return sweep


def tune(tuning: Tuning, how: Launch | None = None, begin: Callable[[Sequence[Trial]], None] | None = None) -> Tuned:
    """Chooses hyperparameters on one stream of tasks and evaluates them on another, ``cilnorm tune``.

    Goes on where it was stopped. ``tuning.json`` in its folder says what came of it.

    Args:
        how: ``workers`` is how many runs go on at a time.
        begin: told of the trials, best first, before the winner is evaluated.

    Raises:
        SpecError, FolderError: nothing can be begun, or no trial ended well.
        Interrupted: a signal ended it; the same call goes on.
    """
    how = how or Launch()
    tuning = replace(tuning, workers=how.workers)
    tuning.check()

    def do(jobs: Sequence[Job]) -> None:
        Sweep("", "", tuning.folder, (), jobs).run(how)

    trials = tuning.run(do)
    if begin:
        begin(trials)
    specs = tuning.evaluation(trials[0].values)
    winner = plan_seeds(specs[0], tuning.seeds, out=tuning.folder / "winner", registry=tuning.registry)
    try:
        winner.run(replace(how, retry_failed=True))
    finally:
        winner.write()
    path = tuning.write(trials, {name: values for entry in winner.entries for name, values in entry.values.items()})
    return Tuned(trials, winner, tuning.command(trials[0].values), path)


def report(
    runs: Sequence[Path | str],
    out: Path | str = "report.html",
    title: str = "",
    figures: Path | str | None = None,
) -> list[Path]:
    """Writes one page about some runs, ``cilnorm report``; it needs no network.

    Args:
        runs: their folders.
        figures: folder for the figures as PNG, SVG and PDF; none are drawn without one.

    Returns:
        What was written, the page first.

    Raises:
        FolderError: a run can't be read.
    """
    results = [reading.read_result(Path(folder)) for folder in runs]
    write_atomically(Path(out), pages.report(results, title))
    return [Path(out), *(pages.draw(results, Path(figures)) if figures else ())]


@dataclass(frozen=True)
class Tuned:
    """What a tuning came to: its trials, best first; the winner's runs; the command that repeats them; the file."""

    trials: Sequence[Trial]
    winner: Sweep
    command: str
    path: Path
