"""How a step is executed. This is the eager path: the reference that faster ones are held to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cilnorm.batch import Batch, CompositionAware, Task
from cilnorm.method import Method, Past, Phase, Schedule, Step
from cilnorm.network import Network, Output
from cilnorm.rows_aware import RowsAware, Telling
from cilnorm.running import frozen_parameters
from cilnorm.telling import needs_rows, tell_batch
from cilnorm.training.batches import EpochBatches
from cilnorm.training.epoch_plan import VaryingComposition, VaryingRows
from cilnorm.training.precision import Precision, forward
from cilnorm.training.randomness import stream_seed
from cilnorm.training.ranks import ALONE, Ranks
from cilnorm.training.shares import SharedBatch

__all__ = ["Engine", "NonFiniteLoss"]


class NonFiniteLoss(ArithmeticError):
    """A term of the loss became NaN or infinite; the message says which."""


class Engine:
    """Trains a network through one phase: a fresh optimiser, the method's loss, its terms summed on the device.

    Weights that the method lets stand still require no gradient until another phase moves them. A module may keep some
    of its own parameters out of weight decay by naming them in a tuple ``without_decay``. Layers that need to know of
    every row are told before each step; what they want added to the loss is a term beside the method's.

    Args:
        seed: of the gradient noise, if the phase wants any.
        precision: of forward and backward pass; ``auto`` is what the device is set to.
        ranks: the processes that share the rows of each batch.
    """

    def __init__(
        self,
        net: Network,
        method: Method,
        task: Task,
        phase: Phase,
        schedule: Schedule,
        past: Past | None,
        seed: int = 0,
        precision: Precision = "auto",
        ranks: Ranks = ALONE,
    ) -> None:
        self.net, self.method, self.past, self.precision, self.ranks = net, method, past, precision, ranks
        self.task, self.phase, self.schedule = task, phase, schedule
        still = {id(parameter) for parameter in frozen_parameters(net)}
        self.parameters = [p for p in method.parameters(net, phase) if id(p) not in still]
        self.device = self.parameters[0].device
        net.zero_grad()
        net.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_()
        self._needs_rows, self._average = needs_rows(net), ranks.averaging(self.parameters)
        # On a GPU the rate is a tensor, so that a captured step follows it, and the update is one kernel.
        self._on_gpu = self.device.type == "cuda"
        self._rate: Tensor | float = torch.tensor(schedule.lr, device=self.device) if self._on_gpu else schedule.lr
        self.optimizer = torch.optim.SGD(
            _groups(net, self.parameters),
            lr=self._rate,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            fused=self._on_gpu,
        )
        self._kept = list(net.backbone.buffers()) if phase.backbone == "batch" else []
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._seed, self._random, self._epoch, self._noise_std = seed, torch.Generator(self.device), 0, 0.0
        count = sum(parameter.numel() for parameter in self.parameters) if phase.gradient_noise else 0
        self._noise = torch.zeros(count, device=self.device)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Continues with an optimiser's state, whatever device it comes from."""
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["lr"], group["fused"] = self._rate, self._on_gpu

    @property
    def sums(self) -> dict[str, Tensor]:
        """Of each term of the loss over the epoch's steps so far, on the device."""
        return self._sums

    def start_epoch(self, epoch: int, steps: int = 0, sums: Mapping[str, Tensor] | None = None) -> None:
        """Sets the learning rate and forgets the terms of the epoch before.

        Args:
            steps, sums: what an earlier process did of this epoch.
        """
        self.net.look(self.phase.view)
        self.net.train()
        self.net.backbone.train(self.phase.backbone != "eval")
        self._epoch = epoch
        self._noise_std = self.phase.gradient_noise / (1 + epoch) ** 0.55
        self._set_rate(self.schedule.rate(epoch))
        self._steps = steps
        for total in self._sums.values():  # in place, for a captured step knows their addresses
            total.zero_()
        for name, total in (sums or {}).items():
            self._sums.setdefault(name, torch.zeros_like(total, device=self.device)).copy_(total)

    def _set_rate(self, rate: float) -> None:
        self._rate = self._rate.fill_(rate) if isinstance(self._rate, Tensor) else rate
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate

    def epoch(self, feed: EpochBatches, first: int = 0) -> Iterator[None]:
        """An update a batch, from batch ``first`` on; stops after each for whoever counts them."""
        for batch in feed.batches(first):
            with self.ranks.taking(self.net, batch):
                if not _by_rows(batch):
                    self.net.observe(batch.composition)
                self.step(batch)
            yield

    def step(self, batch: Batch) -> None:
        """One update; nothing is read back from the device."""
        self.draw_noise()
        self.update(batch)

    def draw_noise(self) -> None:
        """The next step's noise, drawn on the device."""
        if len(self._noise):
            name = f"gradient noise/{self.phase.name}"
            self._random.manual_seed(stream_seed(self._seed, name, self.task.index, self._epoch, self._steps))
            self._noise.normal_(0, self._noise_std, generator=self._random)
        self._steps += 1

    def update(self, batch: Batch) -> None:
        """What a step does on the device, the same work every time."""
        kept = [(buffer, buffer.clone()) for buffer in self._kept]
        old = None
        if self.past is not None:
            with torch.no_grad():
                old = forward(self.past.net, batch.images, self.precision)
        told = self._tell_rows(batch)
        out = forward(self.net, batch.images, self.precision)
        terms = self.method.loss(self._seen_by_loss(out, old, batch))
        if told:
            terms = {**terms, **told.take_terms()}
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self._average()
        if self.schedule.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        if self.schedule.clamp:
            torch.nn.utils.clip_grad_value_(self.parameters, self.schedule.clamp)
        if len(self._noise):
            self._add_noise()
        self.optimizer.step()
        self.net.head.constrain()
        for buffer, before in kept:
            buffer.copy_(before)
        for name, term in terms.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(term.detach())
            self._sums[name].add_(term.detach())

    def _seen_by_loss(self, out: Output, old: Output | None, batch: Batch) -> Step:
        """The whole batch, whoever has its rows."""
        if isinstance(batch, SharedBatch) and batch.whole is not None:
            composition, batch = batch.whole.composition, batch.whole
            out = self.ranks.outputs(out, composition)
            old = None if old is None else self.ranks.outputs(old, composition)
        return Step(out, old, self.past, batch, self.task, self.phase, self.net)

    def _tell_rows(self, batch: Batch) -> Telling | None:
        """Tells layers of the batch's rows: those that need it, or all, where its composition says too little.

        Raises:
            VaryingRows: a layer must know the composition.
        """
        every = _by_rows(batch)
        if not (every or self._needs_rows):
            return None
        for module in self.net.modules() if every else ():
            if isinstance(module, CompositionAware) and not isinstance(module, RowsAware):
                name = type(module).__name__
                raise VaryingRows(f"{name} must know how many rows are current, and shuffled batches differ in that")
        return tell_batch(self.net, batch, self.task, every=every)

    def _add_noise(self) -> None:
        parts = self._noise.split([parameter.numel() for parameter in self.parameters])
        for parameter, noise in zip(self.parameters, parts, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(noise.view(parameter.shape))

    def finish_epoch(self) -> dict[str, float]:
        """Mean of each term over the epoch's steps, or those so far; the one place that waits for the device.

        Raises:
            NonFiniteLoss: a term is NaN or infinite.
        """
        totals = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        means = {name: total / self._steps for name, total in zip(self._sums, totals, strict=True)}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise NonFiniteLoss(f"the term {name!r} of the loss became {mean}")
        return means


def _by_rows(batch: Batch) -> bool:
    """Whether layers are told of every row, because the batch's composition is unknown or differs among processes."""
    return isinstance(batch.composition, VaryingComposition) or (isinstance(batch, SharedBatch) and batch.uneven)


def _groups(net: Network, parameters: list[nn.Parameter]) -> list[Any]:
    """The parameters as the optimiser takes them; those that a module keeps out of weight decay are a second group."""
    spared = {id(module._parameters[name]) for module in net.modules() for name in getattr(module, "without_decay", ())}
    decayed = [parameter for parameter in parameters if id(parameter) not in spared]
    if len(decayed) == len(parameters):
        return parameters
    others = [parameter for parameter in parameters if id(parameter) in spared]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
