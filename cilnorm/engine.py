"""How a step is executed. This is the eager path: the reference that faster ones are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cilnorm.batch import Batch, Task
from cilnorm.data import Pixels
from cilnorm.method import Method, Past, Phase, Schedule, Step
from cilnorm.network import Network
from cilnorm.streams import generator

__all__ = ["Engine", "NonFiniteLoss", "class_means", "embed", "held_out_loss", "predict"]

EVALUATION_ROWS = 256


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
        self._seed, self._noise, self._noise_std = seed, torch.Generator(), 0.0

    def start_epoch(self, epoch: int) -> None:
        """Sets the learning rate and forgets the terms of the epoch before."""
        self.net.train()
        self.net.backbone.train(self.phase.backbone == "train")
        self._noise = generator(self._seed, f"gradient noise/{self.phase.name}", self.task.index, epoch)
        self._noise_std = self.phase.gradient_noise / (1 + epoch) ** 0.55
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(epoch)
        self._sums, self._steps = {}, 0

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
        for parameter in self.parameters:
            if parameter.grad is not None:
                noise = torch.randn(parameter.shape, generator=self._noise).to(parameter.device)
                parameter.grad.add_(noise, alpha=self._noise_std)

    def finish_epoch(self) -> dict[str, float]:
        """Mean of each term over the epoch's steps.

        Raises:
            NonFiniteLoss: a term is NaN or infinite.
        """
        means = {name: float(total) / self._steps for name, total in self._sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise NonFiniteLoss(f"the term {name!r} of the loss became {mean}")
        return means


def _in_batches(
    net: Network, pixels: Pixels, indices: Tensor, mirrored: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """(embedding, logits) of the images as they are, or left to right, network in evaluation mode."""
    net.eval()
    with torch.no_grad():
        for some in indices.split(EVALUATION_ROWS):
            images = pixels.clean(some)
            out = net(images.flip(3) if mirrored else images)
            yield out.embedding, out.logits


def predict(net: Network, pixels: Pixels, indices: Tensor, means: Tensor | None = None) -> Tensor:
    """The class (n,) that the network gives each image, among all it has seen.

    Args:
        means: unit vectors (seen, dim) of ``class_means``: the nearest one to the unit embedding decides, in place of
            the largest logit.
    """
    batches = _in_batches(net, pixels, indices)
    if means is None:
        return torch.cat([logits.argmax(1) for _, logits in batches])
    return torch.cat([torch.cdist(F.normalize(embedding, dim=1), means).argmin(1) for embedding, _ in batches])


def class_means(net: Network, pixels: Pixels, exemplars: Sequence[Tensor]) -> Tensor:
    """The direction of each class: its exemplars' mean unit embedding.

    iCaRL, https://arxiv.org/abs/1611.07725, algorithm 1. Mirror images count as well if training mirrors; the code of
    iCaRL, and of all that stem from it, lets them count always, and always mirrors in training.

    Args:
        exemplars: indices, one tensor a class.

    Returns:
        Unit vectors (classes, dim).
    """
    means, mirrorings = [], (False, True) if pixels.augmentation.flip else (False,)
    for indices in exemplars:
        ways = [torch.cat([e for e, _ in _in_batches(net, pixels, indices, mirrored)]) for mirrored in mirrorings]
        means.append(F.normalize(torch.cat(ways), dim=1).mean(0))
    return F.normalize(torch.stack(means), dim=1)


def embed(net: Network, pixels: Pixels) -> Callable[[Tensor], Tensor]:
    """A function from indices (n,) to embeddings (n, dim)."""
    return lambda indices: torch.cat([embedding for embedding, _ in _in_batches(net, pixels, indices)])


def held_out_loss(net: Network, pixels: Pixels, indices: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy over all seen classes on held-out images."""
    logits = torch.cat([logits for _, logits in _in_batches(net, pixels, indices)])
    return float(F.cross_entropy(logits, targets))
