"""Hyperparameters chosen on one stream of tasks, for runs on another: ``cilnorm tune``.

A trial is a run in ``trials/`` of the tuning's folder, scored on held-out training images. What is tried next says
Optuna, which keeps its study in the file ``study.journal`` there. Everything is read back from the folder, so the same
call goes on where one was stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cilnorm.files import read_text, write_atomically
from cilnorm.registry import Registry
from cilnorm.settings.spec_key import fingerprint
from cilnorm.spec import Spec, resolve, to_mapping
from cilnorm.storage.lock import lock_folder
from cilnorm.storage.run_folder import FolderError
from cilnorm.sweep.jobs import Job
from cilnorm.sweep.search import STREAM, Dimension, check_streams
from cilnorm.values import SpecError

__all__ = ["Trial", "Tuning"]

HELD_OUT = 0.1  # of every class, where the protocol holds no images out
TRIALS = 20  # unless there are fewer combinations
MOST_LOOKED_AT = 1000  # combinations, until one is found of which a run can be made
TRIAL_SEED = 1000  # of trials, where nothing else sets their stream apart
SMALLER = ("F", "forgetting")  # metrics of which less is better
PLAN, STUDY, RESULT = "plan.json", "study.journal", "tuning.json"


@dataclass(frozen=True)
class Trial:
    """One that ended: what was tried, where, and the metric in percent; None and a reason if it failed."""

    number: int
    values: Mapping[str, Any]
    folder: Path
    score: float | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Tuning:
    """A choice to be made.

    Attributes:
        folder: where all of it lies.
        preset, asked: what evaluation runs are, as ``cilnorm.resolve`` takes it.
        on: what trials are otherwise; another ``seed`` unless it says what sets their stream apart.
        search: what is chosen.
        metric: by which.
        trials: how many; None for all combinations, if what is chosen are lists, or 20.
        seeds: of the evaluation.
        sampler_seed: of Optuna's draws.
        same_stream: whether trials may be on the stream that is evaluated.
        workers: trials at a time.
        tell: told of each trial that ended, in a line.
    """

    folder: Path
    preset: str
    asked: Mapping[str, Any]
    on: Mapping[str, Any]
    search: Sequence[Dimension]
    registry: Registry
    metric: str = "A_f"
    trials: int | None = None
    seeds: Sequence[int] = (0,)
    sampler_seed: int = 0
    same_stream: bool = False
    workers: int = 1
    tell: Callable[[str], None] = field(default=lambda _: None)

    @property
    def _on(self) -> dict[str, Any]:
        """What trials are otherwise, whoever said it."""
        apart = self.same_stream or any(key in self.on for key in STREAM)
        return dict(self.on) if apart else {"seed": TRIAL_SEED, **self.on}

    def trial_spec(self, values: Mapping[str, Any]) -> Spec:
        """The run that tries some values; it is scored on held-out images.

        Raises:
            SpecError: these values can't be.
        """
        spec = resolve(self.preset, self.registry, **{**self.asked, **self._on, **values})
        held_out = replace(spec.protocol, score="validation", validation=spec.protocol.validation or HELD_OUT)
        return replace(spec, protocol=held_out)

    def evaluation(self, values: Mapping[str, Any]) -> list[Spec]:
        """The runs that show what some values are worth, one a seed.

        Raises:
            SpecError: these values can't be.
        """
        spec = resolve(self.preset, self.registry, **{**self.asked, **values})
        return [replace(spec, seed=seed) for seed in self.seeds]

    @property
    def first(self) -> dict[str, Any]:
        """The first values of which runs can be made.

        Raises:
            SpecError: there are none.
        """
        keys, refused = [dimension.key for dimension in self.search], None
        for each in itertools.islice(itertools.product(*(d.values or (d.first,) for d in self.search)), MOST_LOOKED_AT):
            values = dict(zip(keys, each, strict=True))
            try:
                self.trial_spec(values)
                return values
            except SpecError as error:
                refused = refused or error
        raise refused or SpecError("nothing to choose")

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """All of them, if there are not more than trials; else none."""
        if not all(dimension.values for dimension in self.search):
            return []
        count = math.prod(len(dimension.values) for dimension in self.search)
        if count > (count if self.trials is None else self.trials):
            return []
        keys = [dimension.key for dimension in self.search]
        return [dict(zip(keys, each, strict=True)) for each in itertools.product(*(d.values for d in self.search))]

    def check(self) -> None:
        """Refuses what can't be begun.

        Raises:
            SpecError: a key or value that can't be, trials on the stream that is evaluated, or Optuna is not installed.
        """
        if find_spec("optuna") is None:
            raise SpecError("tune needs optuna: pip install 'cilnorm[tune]'")
        for dimension in self.search:
            if dimension.key in self.asked or dimension.key in self.on:
                raise SpecError(f"{dimension.key} is both set and searched for; leave one out")
        trial, evaluated = self.trial_spec(self.first), self.evaluation(self.first)
        if not self.same_stream:
            check_streams(trial, evaluated)

    def run(self, do: Callable[[Sequence[Job]], None]) -> list[Trial]:
        """Makes the trials that are missing; returns all, best first, failed ones last.

        Args:
            do: does runs, ``workers`` at a time; what is stopped is begun again by the same call.

        Raises:
            FolderError: another tuning lies in the folder, or it can't be written.
            SpecError: no trial ended well.
        """
        with lock_folder(self.folder):
            self._note_plan()
            study = self._study()
            while batch := self._next(study):
                jobs = {number: self._job(values) for number, values in batch.items()}
                do([*{job.folder: job for job in jobs.values() if job is not None}.values()])
                for number, values in batch.items():
                    self._end(study, number, values, jobs[number])
            ended = [self._trial(frozen) for frozen in study.trials]
        sign = 1 if self.metric in SMALLER else -1
        good = sorted((t for t in ended if t.score is not None), key=lambda t: (sign * (t.score or 0.0), t.number))
        if not good:
            raise SpecError(f"no trial of {self.folder} ended well: {ended[0].reason if ended else 'there is none'}")
        return [*good, *(trial for trial in ended if trial.score is None)]

    def _study(self) -> Any:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(self.folder / STUDY)))
        direction: Any = "minimize" if self.metric in SMALLER else "maximize"
        return optuna.create_study(storage=storage, study_name="cilnorm", direction=direction, load_if_exists=True)

    def _next(self, study: Any) -> dict[int, dict[str, Any]]:
        """Values by number of the trials to be made now: those that were begun, then new ones."""
        from optuna.samplers import TPESampler
        from optuna.trial import Trial as Open
        from optuna.trial import TrialState

        combinations = self.combinations
        wanted = len(combinations) or self.trials or TRIALS
        known = study.trials
        opened = [Open(study, frozen._trial_id) for frozen in known if frozen.state == TrialState.RUNNING]
        while len(opened) < self.workers and len(known) < wanted:
            number = len(known)
            if combinations:
                coded = {key: json.dumps(value) for key, value in combinations[number].items()}
                study.enqueue_trial(coded, skip_if_exists=True)
            # A sampler a trial: what it draws depends on its number and what is known, not on when it was stopped.
            study.sampler = TPESampler(seed=self.sampler_seed + number)
            opened.append(study.ask())
            known = study.trials
        batch = {}
        for trial in opened[: self.workers]:
            batch[trial.number] = {dimension.key: dimension.suggest(trial) for dimension in self.search}
            trial.set_user_attr("values", batch[trial.number])
        return batch

    def _job(self, values: Mapping[str, Any]) -> Job | None:
        """The run of a trial; None if these values can't be."""
        try:
            spec = self.trial_spec(values)
        except SpecError:
            return None
        job = Job(", ".join(_told(values)), spec, self.folder / "trials" / spec.key)
        job.prepare(self.registry)
        return job

    def _end(self, study: Any, number: int, values: Mapping[str, Any], job: Job | None) -> None:
        """Takes down how a trial ended, for Optuna and for people."""
        from optuna.trial import Trial as Open
        from optuna.trial import TrialState

        said = f"trial {number + 1}: {', '.join(_told(values))}"
        frozen = study.trials[number]
        if job is not None and job.state == "finished":
            score = float(job.summary[self.metric])
            study.tell(number, score)
            self.tell(f"{said}: {self.metric} {score:.2f} % on held-out images")
        elif job is None or job.state == "failed":
            reason = self._refusal(values) if job is None else job.reason
            Open(study, frozen._trial_id).set_user_attr("reason", reason)
            study.tell(number, state=TrialState.FAIL)
            self.tell(f"{said}: failed: {reason}")
        else:
            raise FolderError(f"{said} is not finished: {job.unfinished}; the same command goes on")

    def _refusal(self, values: Mapping[str, Any]) -> str:
        try:
            self.trial_spec(values)
        except SpecError as error:
            return str(error)
        return ""

    def _trial(self, frozen: Any) -> Trial:
        values = frozen.user_attrs.get("values", {})
        try:
            folder = self.folder / "trials" / self.trial_spec(values).key
        except SpecError:
            folder = self.folder
        return Trial(frozen.number, values, folder, frozen.value, frozen.user_attrs.get("reason", ""))

    def _plan(self) -> dict[str, Any]:
        """What makes two calls the same tuning; how many trials there are does not."""
        return {
            "search": [repr(dimension) for dimension in self.search],
            "metric": self.metric,
            "sampler_seed": self.sampler_seed,
            "trials_on": self.trial_spec(self.first).key,
            "evaluated_on": self.evaluation(self.first)[0].key,
        }

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that two tunings share only if they are the same."""
        return fingerprint({**to_mapping(self.trial_spec(self.first)), "preset": "", "plan": self._plan()})

    def _note_plan(self) -> None:
        path, plan = self.folder / PLAN, self._plan()
        if path.exists():
            try:
                before = json.loads(read_text(path))
            except (OSError, ValueError) as error:
                raise FolderError(f"{path} can't be read: {error}") from error
            if before != plan:
                raise FolderError(f"{self.folder} holds another tuning; give another --out")
        else:
            write_atomically(path, json.dumps(plan, indent=2) + "\n")

    def command(self, values: Mapping[str, Any]) -> str:
        """The command that repeats the evaluation of some values."""
        words = ["cilnorm", "run", "--preset", self.preset]
        words += [word for text in _told({**self.asked, **values}, "=") for word in ("--set", text)]
        return shlex.join([*words, "--seeds", ",".join(map(str, self.seeds))])

    def write(self, trials: Sequence[Trial], evaluated: Mapping[str, Sequence[float]]) -> Path:
        """Writes ``tuning.json``: the winner, what it is worth on the other stream, every trial, and the command."""
        best = trials[0]
        content = {
            "metric": self.metric,
            "best": {"values": dict(best.values), "held_out": best.score, "trial": best.number + 1},
            "evaluated": {"seeds": list(self.seeds), **{name: list(values) for name, values in evaluated.items()}},
            "command": self.command(best.values),
            "trials_on": self._on,
            "trials": [
                {
                    "trial": trial.number + 1,
                    "values": dict(trial.values),
                    "held_out": trial.score,
                    "folder": str(trial.folder.relative_to(self.folder)),
                    **({"reason": trial.reason} if trial.reason else {}),
                }
                for trial in trials
            ],
        }
        write_atomically(self.folder / RESULT, json.dumps(content, indent=2, default=str) + "\n")
        return self.folder / RESULT


def _told(values: Mapping[str, Any], between: str = " ") -> Iterator[str]:
    for key, value in values.items():
        yield f"{key}{between}{value if isinstance(value, str) else json.dumps(value)}"
