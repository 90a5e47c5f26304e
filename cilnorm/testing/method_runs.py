"""Runs of a method, watched step by step, and what every one of them must show."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from cilnorm.batch import Batch, Composition
from cilnorm.experiment import runner
from cilnorm.method import Method, Past, Phase, Step
from cilnorm.network import Network
from cilnorm.registry import Registry
from cilnorm.spec import Spec
from cilnorm.testing.checks import wants
from cilnorm.training.engine import Engine

__all__ = ["State", "Visit", "past_stands_still", "terms_are_finite", "watched", "weights_stand_still"]

State = dict[str, Tensor]


@dataclass
class Visit:
    """What was seen of one phase of one task.

    Attributes:
        engine: that trained it.
        net: a copy of the network as the phase began.
        before, after: its weights and buffers then and in the end.
        teacher: those of what earlier tasks left, and its tensors.
        targets, compositions: of its batches.
        terms: of the loss, step by step.
    """

    engine: Engine
    net: Network
    before: State
    teacher: State
    after: State = field(default_factory=dict)
    targets: list[Tensor] = field(default_factory=list)
    compositions: set[Composition] = field(default_factory=set)
    terms: list[dict[str, float]] = field(default_factory=list)

    @property
    def task(self) -> int:
        """The number of its task, from 0."""
        return self.engine.task.index

    @property
    def phase(self) -> Phase:
        """Which of the method's."""
        return self.engine.phase

    @property
    def where(self) -> str:
        """For messages."""
        return f"in task {self.task + 1}, phase {self.phase.name!r},"


@dataclass(frozen=True)
class _Told(Method):
    """A method that hands its terms on to a listener."""

    inner: Method | None = None
    listener: Any = None

    def loss(self, step: Step) -> dict[str, Tensor]:
        assert self.inner is not None
        terms = self.inner.loss(step)
        self.listener.append({name: term.item() for name, term in terms.items()})
        return terms


def watched(spec: Spec, registry: Registry) -> list[Visit]:
    """Runs a spec on the CPU, step by step; what each phase showed."""
    visits: list[Visit] = []

    class Recorder(Engine):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.visit = Visit(self, copy.deepcopy(self.net), _copied(self.net.state_dict()), _left(self.past))
            self.method = _Told(self.method, self.visit.terms)
            visits.append(self.visit)

        def step(self, batch: Batch) -> None:
            self.visit.targets.append(batch.targets)
            self.visit.compositions.add(batch.composition)
            super().step(batch)

        def finish_epoch(self) -> dict[str, float]:
            self.visit.after = _copied(self.net.state_dict())
            return super().finish_epoch()

    recording = mock.patch.object(runner, "engine_class", return_value=Recorder)
    with recording, tempfile.TemporaryDirectory() as folder:
        runner.run(spec, Path(folder) / "run", device="cpu", registry=registry, figures=False)
    return visits


def _copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def _left(past: Past | None) -> State:
    return {} if past is None else {**_copied(past.net.state_dict()), **_copied(dict(past.tensors))}


def terms_are_finite(visits: Sequence[Visit]) -> None:
    """Raises Broken for a term of a loss that is no finite number."""
    for visit in visits:
        for step, terms in enumerate(visit.terms, start=1):
            lost = [f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value)]
            wants(not lost, f"{visit.where} step {step} had {lost[:1]}; terms must be finite")


def past_stands_still(visits: Sequence[Visit]) -> None:
    """Raises Broken where training reached what earlier tasks left: its weights, buffers, tensors or gradients."""
    for visit in visits:
        past = visit.engine.past
        if past is None:
            continue
        wants(not past.net.training, f"{visit.where} the past network was in training mode; call .eval()")
        own = {parameter.data_ptr() for parameter in visit.engine.net.parameters()}
        weights = list(past.net.named_parameters())
        reached = [name for name, value in weights if value.data_ptr() in own]
        reached += [name for name, value in weights if value.requires_grad or value.grad is not None]
        reached += [name for name, value in past.tensors.items() if value.requires_grad]
        reached += [name for name, value in _left(past).items() if not value.equal(visit.teacher[name])]
        wants(not reached, f"{visit.where} training reaches {reached[:1]} of the past; detach it, and freeze the copy")


def weights_stand_still(visits: Sequence[Visit], method: Method) -> None:
    """Raises Broken where a weight moved that ``parameters`` does not give, or where none moved."""
    for visit in visits:
        moving = {id(parameter) for parameter in method.parameters(visit.net, visit.phase)}
        moved = {name for name, _ in visit.net.named_parameters() if not visit.before[name].equal(visit.after[name])}
        still = {name for name, value in visit.net.named_parameters() if id(value) not in moving}
        wants(bool(moved), f"{visit.where} training moved no weight")
        loose = sorted(moved & still)
        wants(not loose, f"{visit.where} {loose[:1]} moved, which parameters() does not give; leave it as it is")
