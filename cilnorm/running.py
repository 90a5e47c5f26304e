"""Running statistics: the layers that keep them, holding them still, and measuring them anew.

Two switches of a run that any norm with running statistics can have, beside what the norm itself is:

    freeze    FACIL's fix-bn (Masana et al., TPAMI 2022, https://arxiv.org/abs/2010.15277): after the first task layers
              normalise by the statistics that they have then, in training too
    precise   Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576: once trained,
              the statistics are measured over many images at once, in place of an average that the last batches rule
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cilnorm.batch import modules_within

__all__ = [
    "KeepsStatistics",
    "Statistics",
    "freeze_statistics",
    "frozen_parameters",
    "measure_statistics",
    "statistics_layers",
]


@dataclass(frozen=True)
class Statistics:
    """What becomes of the running statistics from task to task.

    Attributes:
        freeze: ``after-first``: they stand still from the second task on, and training normalises by them.
        freeze_affine: then the layers' parameters stand still as well. FACIL's code lets them train on, though its
            documentation speaks of freezing the layers.
        precise: ``class-balanced``: after every task they are measured anew, on memory and current images, as many of
            every class; before exemplars are chosen, the teacher is copied, and anything is scored.

    Raises:
        ValueError: a combination that makes no sense.
    """

    freeze: Literal["never", "after-first"] = "never"
    freeze_affine: bool = False
    precise: Literal["never", "class-balanced"] = "never"

    def __post_init__(self) -> None:
        if self.freeze_affine and self.freeze == "never":
            raise ValueError("statistics.freeze_affine goes with statistics.freeze: after-first")
        if self.freeze != "never" and self.precise != "never":
            raise ValueError("statistics.freeze keeps what statistics.precise would measure anew; take one of the two")

    @property
    def asked(self) -> str:
        """The name of the switch that is on; empty where none is."""
        return "freeze" if self.freeze != "never" else "precise" if self.precise != "never" else ""


class KeepsStatistics(nn.Module):
    """A layer that normalises by running statistics in evaluation; every such norm derives from it.

    Its averages are ``running_mean`` and ``running_var`` or ``running_std``, (C,), moved by a weight ``momentum``.

    Attributes:
        frozen: whether it stays in evaluation mode, whatever mode the network is put in.
        frozen_affine: whether its parameters are to stand still as well.
        bessel: whether the variance of a batch of n values enters the average as n / (n − 1) times the biased one.
    """

    frozen: bool = False
    frozen_affine: bool = False
    bessel: bool = True

    def freeze(self, affine: bool = False) -> None:
        """From now on normalises by the averages as they are, in training too; its copies do the same."""
        self.frozen, self.frozen_affine = True, affine
        self.eval()

    def train(self, mode: bool = True) -> Any:
        """As for every module; a frozen one stays in evaluation mode."""
        return super().train(mode and not self.frozen)


def statistics_layers(model: nn.Module) -> dict[str, Any]:
    """The layers inside ``model`` that keep running statistics, torch's own included, by name."""
    kinds = (KeepsStatistics, _NormBase)
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, kinds) and getattr(m, "running_mean", None) is not None}


def freeze_statistics(model: nn.Module, affine: bool = False) -> nn.Module:
    """Freezes the running statistics of every layer; returns the model.

    ``model.train()`` doesn't undo it, and copies stay frozen; it is no part of a ``state_dict``.

    Args:
        affine: the layers' parameters are to stand still too: see ``frozen_parameters``.

    Raises:
        ValueError: no layer keeps any, or one doesn't know how to stand still; the message names it.
    """
    layers = statistics_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that keeps running statistics")
    for name, layer in layers.items():
        if not isinstance(layer, KeepsStatistics):
            raise ValueError(f"{name} is a {type(layer).__name__}, which can't be frozen; convert it to bn first")
    for layer in layers.values():
        layer.freeze(affine)
    return model


def frozen_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of frozen layers that are to stand still; whoever builds the optimiser leaves them out."""
    frozen = [m for m in model.modules() if isinstance(m, KeepsStatistics) and m.frozen and m.frozen_affine]
    return [parameter for layer in frozen for parameter in layer.parameters(recurse=False)]


@torch.no_grad()
def measure_statistics(
    model: nn.Module,
    batches: Iterable[Tensor],
    tell: Callable[[int], None] = lambda rows: None,
    gather: Callable[[Tensor], Sequence[Tensor]] | None = None,
) -> nn.Module:
    """Measures the running statistics of every layer anew, in place, but those of frozen parts; returns the model.

    Mean and biased variance over all images together, what lies between batches included and batches weighed by their
    size. Deep layers see inputs normalised by the batch's own statistics, as in training. Nothing else moves, and
    counters of batches count on. As fvcore's ``update_bn_stats`` does, but without the difference of two large sums.

    Args:
        batches: images (N, 3, H, W); N may differ.
        tell: hears the number of rows before each batch, for layers that must be told what a batch is made of.
        gather: gives what each process of a group found, from what this one did, where ``batches`` are its share alone;
            called once.

    Raises:
        ValueError: no layer keeps statistics, one is frozen, or there is no batch; nothing has moved then.
    """
    learning = set(map(id, modules_within(model, "learning")))
    layers = {name: layer for name, layer in statistics_layers(model).items() if id(layer) in learning}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that keeps running statistics")
    for name, layer in layers.items():
        if getattr(layer, "frozen", False):
            raise ValueError(f"{name} is frozen")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    meters = [_Meter(layer) for layer in layers.values()]
    try:
        with _uncompiled():
            for images in batches:
                tell(len(images))
                model(images)
    finally:
        for meter in meters:
            meter.close()
        for module, mode in modes:
            module.training = mode
    if gather:
        _pool(meters, gather)
    if not all(meter.count for meter in meters):
        raise ValueError("no batch to measure statistics on")
    for meter in meters:
        meter.write()
    return model


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Lets compiled modules run as they are written; the compiler, slow to import, is left alone if it isn't there."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _pool(meters: list[_Meter], gather: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Puts together what several processes found."""
    found = [meter.found() for meter in meters]
    lines = [line.split([len(each) for each in found]) for line in gather(torch.cat(found))]
    for meter, *of_all in zip(meters, *lines, strict=True):
        meter.pool(of_all)


class _Meter:
    """Sees to it that a layer's averages hold the last batch alone, and pools them, one forward pass after another."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.count = layer, 0
        self._momentum, self._counter = layer.momentum, getattr(layer, "num_batches_tracked", None)
        self._before = {name: value.clone() for name, value in layer.named_buffers(recurse=False)}
        self._counted: Tensor | int = 0
        self._mean = self._var = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        layer.train()
        layer.momentum = 1.0
        if self._counter is not None:
            self._counter.zero_()  # batch renormalisation starts as batch normalisation
        self._hook = layer.register_forward_hook(self._add)

    def _add(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Takes a batch in."""
        count = inputs[0].numel() // inputs[0].shape[1]
        self._join(count, self.layer.running_mean.double(), self._variance(count))

    def _join(self, count: int, mean: Tensor, var: Tensor) -> None:
        """Mean and variance of both parts together (Chan et al.)."""
        part, apart = count / (self.count + count), mean - self._mean
        self._var = (1 - part) * self._var + part * var + part * (1 - part) * apart.square()
        self._mean = self._mean + part * apart
        self.count += count

    def _variance(self, count: int) -> Tensor:
        """The last batch's biased variance, from the average that holds nothing else."""
        if getattr(self.layer, "running_var", None) is None:
            return (self.layer.running_std.double() - self.layer.eps).square()
        biased = (count - 1) / count if getattr(self.layer, "bessel", True) else 1.0
        return self.layer.running_var.double() * biased

    def found(self) -> Tensor:
        """What was measured, in a line (2 + 2 C,) of float64: values behind it, batches counted, mean, variance."""
        numbers = self._mean.new_tensor([self.count, int(self._counted)])
        return torch.cat([numbers, self._mean, self._var])

    def pool(self, lines: Iterable[Tensor]) -> None:
        """Takes what several processes ``found``, in the place of what this one did."""
        self.count = counted = 0
        self._mean, self._var = torch.zeros_like(self._mean), torch.zeros_like(self._var)
        for line in lines:
            count, batches = (int(number) for number in line[:2])
            if count:
                self._join(count, *line[2:].chunk(2))
            counted += batches
        self._counted = counted

    def close(self) -> None:
        """Leaves the layer as it was."""
        self._hook.remove()
        self.layer.momentum = self._momentum
        if self._counter is not None:
            self._counted = self._counter.clone()
        for name, value in self.layer.named_buffers(recurse=False):
            value.copy_(self._before[name])

    def write(self) -> None:
        """Puts what was measured in the place of the averages; counts the batches."""
        self.layer.running_mean.copy_(self._mean)
        if getattr(self.layer, "running_var", None) is None:
            self.layer.running_std.copy_(self._var.sqrt() + self.layer.eps)
        else:
            self.layer.running_var.copy_(self._var)
        if self._counter is not None:
            self._counter.add_(self._counted)
