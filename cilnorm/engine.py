"""How a step is executed. This is the eager path: the reference that faster ones are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cilnorm.batch import Batch, Task
from cilnorm.data import Pixels
from cilnorm.method import Method, Past, Phase, Schedule, Step
from cilnorm.network import Network

__all__ = ["Engine", "NonFiniteLoss", "embed", "held_out_loss", "predict"]

EVALUATION_ROWS = 256


class NonFiniteLoss(ArithmeticError):
    """A term of the loss became NaN or infinite; the message says which."""


class Engine:
    """Trains a network through one phase: a fresh optimiser, the method's loss, its terms summed on the device."""

    def __init__(
        self, net: Network, method: Method, task: Task, phase: Phase, schedule: Schedule, past: Past | None
    ) -> None:
        self.net, self.method, self.past = net, method, past
        self.task, self.phase, self.schedule = task, phase, schedule
        self.parameters = list(method.parameters(net, phase))
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay
        )
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def start_epoch(self, epoch: int) -> None:
        """Sets the learning rate and forgets the terms of the epoch before."""
        self.net.train()
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
        self.optimizer.step()
        for name, term in terms.items():
            self._sums[name] = self._sums[name] + term.detach() if name in self._sums else term.detach().clone()
        self._steps += 1

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


def _in_batches(net: Network, pixels: Pixels, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(embedding, logits) of the images as they are, network in evaluation mode."""
    net.eval()
    with torch.no_grad():
        for some in indices.split(EVALUATION_ROWS):
            out = net(pixels.clean(some))
            yield out.embedding, out.logits


def predict(net: Network, pixels: Pixels, indices: Tensor) -> Tensor:
    """The class (n,) that the network gives each image, among all it has seen."""
    return torch.cat([logits.argmax(1) for _, logits in _in_batches(net, pixels, indices)])


def embed(net: Network, pixels: Pixels) -> Callable[[Tensor], Tensor]:
    """A function from indices (n,) to embeddings (n, dim)."""
    return lambda indices: torch.cat([embedding for embedding, _ in _in_batches(net, pixels, indices)])


def held_out_loss(net: Network, pixels: Pixels, indices: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy over all seen classes on held-out images."""
    logits = torch.cat([logits for _, logits in _in_batches(net, pixels, indices)])
    return float(F.cross_entropy(logits, targets))
