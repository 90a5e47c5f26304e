"""How a step is executed. This is the eager path: the reference that faster ones are held to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cilnorm.batch import Batch, Task
from cilnorm.feed import Feed
from cilnorm.method import Method, Past, Phase, Schedule, Step
from cilnorm.network import Network
from cilnorm.streams import generator

__all__ = ["Engine", "NonFiniteLoss"]


class NonFiniteLoss(ArithmeticError):
    """A term of the loss became NaN or infinite; the message says which."""


class Engine:
    """Trains a network through one phase: a fresh optimiser, the method's loss, its terms summed on the device.

    Weights that the method lets stand still require no gradient until another phase moves them.

    Args:
        seed: of the gradient noise, if the phase wants any.
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
    ) -> None:
        self.net, self.method, self.past = net, method, past
        self.task, self.phase, self.schedule = task, phase, schedule
        self.parameters = list(method.parameters(net, phase))
        net.zero_grad()
        net.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay
        )
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._seed, self._epoch, self._noise_std = seed, 0, 0.0

    @property
    def sums(self) -> dict[str, Tensor]:
        """Of each term of the loss over the epoch's steps so far, on the device."""
        return self._sums

    def start_epoch(self, epoch: int, steps: int = 0, sums: Mapping[str, Tensor] | None = None) -> None:
        """Sets the learning rate and forgets the terms of the epoch before.

        Args:
            steps, sums: what an earlier process did of this epoch.
        """
        self.net.train()
        self.net.backbone.train(self.phase.backbone == "train")
        self._epoch = epoch
        self._noise_std = self.phase.gradient_noise / (1 + epoch) ** 0.55
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(epoch)
        self._sums, self._steps = dict(sums or {}), steps

    def epoch(self, feed: Feed, first: int = 0) -> Iterator[None]:
        """An update a batch, from batch ``first`` on; stops after each for whoever counts them."""
        for batch in map(feed.batch, range(first, len(feed))):
            self.net.observe(batch.composition)
            self.step(batch)
            yield

    def step(self, batch: Batch) -> None:
        """One update; nothing is read back from the device."""
        old = None
        if self.past is not None:
            with torch.no_grad():
                old = self.past.net(batch.images)
        out = self.net(batch.images)
        terms = self.method.loss(Step(out, old, self.past, batch, self.task, self.phase, self.net))
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        if self.schedule.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        if self.schedule.clamp:
            torch.nn.utils.clip_grad_value_(self.parameters, self.schedule.clamp)
        if self._noise_std:
            self._add_noise()
        self.optimizer.step()
        for name, term in terms.items():
            self._sums[name] = self._sums[name] + term.detach() if name in self._sums else term.detach().clone()
        self._steps += 1

    def _add_noise(self) -> None:
        name = f"gradient noise/{self.phase.name}"
        stream = generator(self._seed, name, self.task.index, self._epoch, self._steps)
        for parameter in self.parameters:
            if parameter.grad is not None:
                noise = torch.randn(parameter.shape, generator=stream).to(parameter.device)
                parameter.grad.add_(noise, alpha=self._noise_std)

    def finish_epoch(self) -> dict[str, float]:
        """Mean of each term over the epoch's steps, or those so far; reads from the device.

        Raises:
            NonFiniteLoss: a term is NaN or infinite.
        """
        means = {name: float(total) / self._steps for name, total in self._sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise NonFiniteLoss(f"the term {name!r} of the loss became {mean}")
        return means
