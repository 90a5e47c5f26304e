"""Options of a norm that are chosen on held-out images before the run, because their paper gives no value.

A record names such options with the values to try (``Norm.tune``). Each value is tried on the first two tasks, the
shortest stream that can forget, with a tenth of the training images held out; the best mean accuracy on those wins, and
the first of equals. The run itself then trains on all images again. An option that the user sets is not tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cilnorm.registry import Registry
from cilnorm.spec import Spec, SpecError

__all__ = ["Trial", "answers", "tuned"]

TASKS = 2
HELD_OUT = 0.1


@dataclass(frozen=True)
class Trial:
    """A value that was tried, and the accuracy in percent on held-out images of both tasks; None if it does not fit."""

    option: str
    value: object
    accuracy: float | None


def tuned(spec: Spec, registry: Registry, score: Callable[[Spec], float]) -> tuple[Spec, list[Trial]]:
    """The spec with every open option of its norm chosen, and the trials that chose them.

    Args:
        score: runs a spec and returns its A_f in percent; a SpecError means that the value does not fit the network.

    Raises:
        SpecError: no value of an option fits.
    """
    trials: list[Trial] = []
    for option, values in registry.norms[spec.norm].tune.items():
        if option in spec.norm_options:
            continue
        tried = list(_trials(spec, option, values, score))
        trials += tried
        fitting = [trial for trial in tried if trial.accuracy is not None]
        if not fitting:
            raise SpecError(f"no value of {spec.norm}'s {option} among {values} fits {spec.backbone}")
        best = max(fitting, key=lambda trial: trial.accuracy or 0.0)
        spec = replace(spec, norm_options={**spec.norm_options, option: best.value})
    return spec, trials


def _trials(spec: Spec, option: str, values: tuple[object, ...], score: Callable[[Spec], float]) -> Iterator[Trial]:
    held_out = replace(spec.protocol, score="validation", validation=spec.protocol.validation or HELD_OUT)
    for value in values:
        options = {**spec.norm_options, option: value}
        trial = replace(spec, norm_options=options, protocol=held_out, stop_after=min(TASKS, spec.stop_after or TASKS))
        try:
            accuracy = score(trial)
        except SpecError:
            yield Trial(option, value, None)
        else:
            yield Trial(option, value, accuracy)


def answers(run: Spec, asked: Spec, registry: Registry) -> bool:
    """Whether a run of spec ``run`` is what was asked for, options that were chosen for it being left out."""
    chosen = [option for option in registry.norms[asked.norm].tune if option not in asked.norm_options]
    options = {name: value for name, value in run.norm_options.items() if name not in chosen}
    return replace(run, norm_options=options).key == asked.key
