"""What may be chosen by trials, as the command line says it, and on which stream of tasks it may be chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cilnorm.spec import Spec
from cilnorm.training.protocol import class_order
from cilnorm.values import SpecError, parsed

__all__ = ["STREAM", "Dimension", "check_streams", "read_search"]

STREAM = ("dataset", "class_order", "seed")
FORMS = "KEY=4,8,16, KEY=uniform:LOW:HIGH or KEY=log:LOW:HIGH"


@dataclass(frozen=True)
class Dimension:
    """Something to choose: one of some ``values``, or a number from ``low`` to ``high``.

    Attributes:
        log: whether the logarithm is uniform.
        whole: whether the number is a whole one.
    """

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Any) -> Any:
        """A value, from a trial of Optuna's."""
        if self.values:
            return json.loads(trial.suggest_categorical(self.key, [json.dumps(value) for value in self.values]))
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        found = trial.suggest_float(self.key, self.low, self.high, log=self.log)
        return min(max(float(f"{found:.4g}"), self.low), self.high)  # as many digits as people write

    @property
    def first(self) -> Any:
        """One of its values."""
        return self.values[0] if self.values else int(self.low) if self.whole else self.low


def read_search(texts: Sequence[str]) -> list[Dimension]:
    """What ``--search`` asks for: ``groups=4,8,16``, ``schedule.lr=log:0.01:0.5``, ``epochs=uniform:2:10``.

    Whole numbers at both ends mean whole numbers.

    Raises:
        SpecError: one can't be read, or a key stands there twice.
    """
    found: list[Dimension] = []
    for text in texts:
        key, equals, said = (part.strip() for part in text.partition("="))
        if not equals or not key or not said:
            raise SpecError(f"--search takes {FORMS}, not {text!r}")
        if key in STREAM or key.startswith("protocol.score"):
            raise SpecError(f"--search {key}: that decides what is measured; it is no hyperparameter")
        if any(key == other.key for other in found):
            raise SpecError(f"--search: {key} stands there twice")
        kind, _, ends = said.partition(":")
        if kind in ("uniform", "log"):
            found.append(_numbers(key, kind, ends, text))
        else:
            values = parsed(f"[{said}]", f"--search {text!r}")
            if not isinstance(values, list) or len(values) < 2:
                raise SpecError(f"--search {text!r}: one value is no choice; give several, or use --set")
            found.append(Dimension(key, tuple(values)))
    if not found:
        raise SpecError(f"nothing to choose: --search takes {FORMS}")
    return found


def _numbers(key: str, kind: str, ends: str, text: str) -> Dimension:
    words = ends.split(":")
    try:
        low, high = map(float, words)
    except ValueError:
        raise SpecError(f"--search {text!r}: {kind} takes two numbers, {kind}:0.01:0.5 say") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (kind == "log" and low <= 0):
        raise SpecError(f"--search {text!r}: the first number must be the smaller one" + ", above 0" * (kind == "log"))
    whole = all(word.strip().lstrip("+-").isdecimal() for word in words)
    return Dimension(key, low=low, high=high, log=kind == "log", whole=whole)


def check_streams(trials: Spec, evaluated: Sequence[Spec]) -> None:
    """Refuses to choose on the stream that is evaluated: the same data set in the same order of classes.

    Raises:
        SpecError: it is the same; the message says how to make it another.
    """
    for spec in evaluated:
        if trials.dataset == spec.dataset and _same_order(trials, spec):
            said = "class_order" if spec.class_order is not None else "seed"
            raise SpecError(
                f"trials and evaluation have the same data set, {spec.dataset}, in the same order of classes ({said} "
                f"{spec.seed if said == 'seed' else str(spec.class_order)[:40]}): what is chosen would be fitted to "
                "the very stream that is reported. Give trials another with --on class_order=N, --on seed=N or --on "
                "dataset=NAME, or say --same-stream"
            )


def _same_order(one: Spec, other: Spec) -> bool:
    orders = [spec.seed if spec.class_order is None else spec.class_order for spec in (one, other)]
    lists = [order for order in orders if isinstance(order, tuple)]
    if not lists:
        return orders[0] == orders[1]
    drawn = [order if isinstance(order, tuple) else tuple(class_order(len(lists[0]), order)) for order in orders]
    return drawn[0] == drawn[1]
