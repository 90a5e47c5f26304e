"""Options of a norm that are chosen on held-out images before the run, because their paper gives no value.

A record names such options with the values to try (``Norm.tune``). Each value is tried on the first two tasks, the
shortest stream that can forget, with a tenth of the training images held out; the best mean accuracy on those wins, and
the first of equals. The run itself then trains on all images again. An option that the user sets is not tried.

A trial is a run in ``trials/`` of the run's own folder, so that it is resumed or reused as any other. ``spec.yaml`` has
the option open until all of them are finished; then it is written anew, with the choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cilnorm.registry import Registry
from cilnorm.spec import Spec, SpecError
from cilnorm.storage.run_folder import read_summary

__all__ = [
    "Trial",
    "asks_the_same",
    "candidates",
    "choose_options",
    "finished_accuracy",
    "open_options",
    "trial_folder",
]

TASKS = 2
HELD_OUT = 0.1


@dataclass(frozen=True)
class Trial:
    """A value that was tried, and the accuracy in percent on held-out images of both tasks; None if it does not fit."""

    option: str
    value: object
    accuracy: float | None


def choose_options(spec: Spec, registry: Registry, score: Callable[[Spec], float]) -> tuple[Spec, list[Trial]]:
    """The spec with every open option of its norm chosen, and the trials that chose them.

    Args:
        score: runs a spec and returns its A_f in percent; a SpecError means that the value does not fit the network.

    Raises:
        SpecError: no value of an option fits.
    """
    trials: list[Trial] = []
    for option in open_options(spec, registry):
        tried = list(_trials(spec, option, registry, score))
        trials += tried
        fitting = [trial for trial in tried if trial.accuracy is not None]
        if not fitting:
            values = tuple(trial.value for trial in tried)
            raise SpecError(f"no value of {spec.norm}'s {option} among {values} fits {spec.backbone}")
        best = max(fitting, key=lambda trial: trial.accuracy or 0.0)
        spec = replace(spec, norm_options={**spec.norm_options, option: best.value})
    return spec, trials


def open_options(spec: Spec, registry: Registry) -> list[str]:
    """The options of the spec's norm that are still to be chosen."""
    return [option for option in registry.norms[spec.norm].tune if option not in spec.norm_options]


def candidates(spec: Spec, option: str, registry: Registry) -> Iterator[tuple[object, Spec]]:
    """Each value of an option, and the short run that tries it."""
    held_out = replace(spec.protocol, score="validation", validation=spec.protocol.validation or HELD_OUT)
    for value in registry.norms[spec.norm].tune[option]:
        options = {**spec.norm_options, option: value}
        short = min(TASKS, spec.stop_after or TASKS)
        yield value, replace(spec, norm_options=options, protocol=held_out, stop_after=short)


def trial_folder(folder: Path, trial: Spec, registry: Registry) -> Path:
    """Where a trial of the run in ``folder`` lies; its name has the values that are tried and the hash of its spec."""
    tried = [
        f"{name}-{trial.norm_options[name]}" for name in registry.norms[trial.norm].tune if name in trial.norm_options
    ]
    return folder / "trials" / f"{re.sub(r'[^a-zA-Z0-9_.+-]', '_', '-'.join(tried))[:80]}-{trial.key}"


def finished_accuracy(folder: Path) -> float | None:
    """A_f in percent of a trial that is finished; None of any other, and where there is none."""
    summary = read_summary(folder)
    try:
        return float(summary["A_f"]) if summary["state"] == "finished" else None
    except (ValueError, KeyError, TypeError):
        return None


def _trials(spec: Spec, option: str, registry: Registry, score: Callable[[Spec], float]) -> Iterator[Trial]:
    for value, trial in candidates(spec, option, registry):
        try:
            accuracy = score(trial)
        except SpecError:
            yield Trial(option, value, None)
        else:
            yield Trial(option, value, accuracy)


def asks_the_same(run: Spec, asked: Spec, registry: Registry) -> bool:
    """Whether a run of spec ``run`` is what was asked for, options that were chosen for it being left out."""
    chosen = [option for option in registry.norms[asked.norm].tune if option not in asked.norm_options]
    options = {name: value for name, value in run.norm_options.items() if name not in chosen}
    return replace(run, norm_options=options).key == asked.key
