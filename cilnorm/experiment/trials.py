"""A run whose norm has options to choose first: short runs inside its folder, each resumed or reused as any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cilnorm import registry as registries
from cilnorm.experiment.assembly import Assembly, pick_device
from cilnorm.experiment.failures import record_failure
from cilnorm.experiment.rehearsal import assemble_checked, check_place
from cilnorm.experiment.tuning import (
    asks_the_same,
    candidates,
    choose_options,
    finished_accuracy,
    open_options,
    trial_folder,
)
from cilnorm.registry import Registry
from cilnorm.spec import Spec, SpecError
from cilnorm.storage.checkpoint import RunState
from cilnorm.storage.event_log import EventLog, Watcher
from cilnorm.storage.events import TrialEnded
from cilnorm.storage.interruptions import Interruptions
from cilnorm.storage.lock import lock_folder
from cilnorm.storage.own_files import survey
from cilnorm.storage.run_folder import FolderError, RunFolder, default_folder
from cilnorm.storage.unwritten import UnwrittenFolder
from cilnorm.training.place import place
from cilnorm.training.ranks import ALONE, Ranks, joined

__all__ = ["RunContext", "assemble_first", "choose_by_trials", "is_begun", "rehearse"]


@dataclass(frozen=True, eq=False)
class RunContext:
    """What a run is done with, whatever it computes."""

    registry: Registry
    device: torch.device
    data_root: Path | None
    watch: Sequence[Watcher]
    stops: Interruptions
    ranks: Ranks = ALONE
    figures: bool = True

    def assemble(self, spec: Spec) -> Assembly:
        """The parts of a run of this spec; see ``cilnorm.experiment.rehearsal``."""
        where = self.registry, self.device, self.data_root, self.ranks
        return self.ranks.in_turn(lambda: assemble_checked(spec, *where))

    def create(self, path: Path, spec: Spec, overwrite: bool = False, also: Sequence[str] = ()) -> RunFolder:
        """A new folder of a run, which one process alone writes; arguments and errors are those of ``RunFolder``."""
        made: list[RunFolder] = []
        self.ranks.first(lambda: made.append(RunFolder.create(path, spec, overwrite, also)))
        return self.ranks.in_turn(lambda: made[0] if made else UnwrittenFolder(path))

    def open(self, path: Path) -> RunFolder:
        """A run's folder, which one process alone writes."""
        return self.ranks.in_turn(lambda: RunFolder(path) if self.ranks.leads else UnwrittenFolder(path))

    @contextmanager
    def at_work(self, path: Path) -> Iterator[None]:
        """Inside, signals wait for a checkpoint, and nobody else works in the folder."""
        with ExitStack() as held:
            self.ranks.first(lambda: held.enter_context(lock_folder(path)))
            held.enter_context(self.stops)
            yield


def assemble_first(context: RunContext, spec: Spec) -> Assembly | None:
    """The parts of a run, before anything is written; None of one whose norm is still to be chosen among some.

    Raises:
        SpecError, DatasetError: it can't be run, whatever is chosen.
    """
    refused: SpecError | None = None
    for option in open_options(spec, context.registry)[:1]:
        for _, trial in candidates(spec, option, context.registry):
            try:
                context.assemble(trial)
                return None
            except SpecError as error:
                refused = error
        raise SpecError(f"no value of {spec.norm}'s {option} fits {spec.backbone}: {refused}")
    return context.assemble(spec)


def choose_by_trials(
    context: RunContext, folder: RunFolder, spec: Spec, do: Callable[[RunContext, RunFolder, Spec, Assembly], Any]
) -> Spec:
    """The spec with the options chosen that are to be chosen on held-out images, by short runs in ``trials/``.

    Args:
        do: does what is left of a run with this context, in this folder, with these parts; returns its result.
    """
    registry, first = context.registry, context.ranks.first
    names = open_options(spec, registry)
    if not names:
        return spec

    def score(trial: Spec) -> float:
        path = trial_folder(folder.path, trial, registry)
        accuracy = first(lambda: finished_accuracy(path))
        if accuracy is None:
            parts = context.assemble(trial)
            begun = first(lambda: RunFolder.holds_a_run(path))
            home = context.open(path) if begun else context.create(path, trial)
            accuracy = float(do(replace(context, watch=()), home, trial, parts).summary["A_f"])
        for watcher in context.watch:
            watcher(TrialEnded(dict(trial.norm_options), accuracy).as_dict())
        return accuracy

    folder.reopen(0, ())
    doing = f"the choice of {spec.norm}'s {' and '.join(names)}"
    with record_failure(spec, RunState(), folder, EventLog(folder, ()), doing):
        folder.write_summary("running", RunState())
        chosen, trials = choose_options(spec, registry, score)
        folder.write_tuning(trials)
        folder.write_spec(chosen)  # from here on the trials are not asked any more
    for name in survey(folder.path).own if context.ranks.leads else ():
        if name.startswith("trials/") and name.split("/")[2] == "checkpoints":
            (folder.path / name).unlink(missing_ok=True)
    return chosen


def is_begun(path: Path, spec: Spec, registry: Registry) -> bool:
    """Whether a run of this spec is there already.

    Raises:
        FolderError: it is a run of another spec.
    """
    if not RunFolder.holds_a_run(path):
        return False
    if not asks_the_same(RunFolder(path).read_spec(registry), spec, registry):
        raise FolderError(RunFolder.taken(path, "a run of another spec", registry.logger_files))
    return True


def rehearse(
    spec: Spec,
    out: Path | str | None = None,
    *,
    device: str = "auto",
    data_root: Path | None = None,
    registry: Registry | None = None,
    overwrite: bool = False,
    go_on: bool = False,
    planned: Ranks | None = None,
) -> None:
    """Does all that ``runner.run`` does before it trains, and writes nothing; arguments as there.

    Data are found, or fetched or drawn as for a run.

    Args:
        planned: processes that will share the run, started elsewhere.

    Raises:
        SpecError, DatasetError, FolderError: what a run would raise.
    """
    registry = registry or registries.load()
    path = Path(out) if out else default_folder(spec)
    here = place()
    on = pick_device(device, here)
    with nullcontext(planned) if planned else joined(here, on) as ranks:
        context = RunContext(registry, on, data_root, (), Interruptions(), ranks)
        if not (go_on and is_begun(path, spec, registry)):
            if not go_on:
                RunFolder.check(path, overwrite)
            check_place(path)
        assemble_first(context, spec)
