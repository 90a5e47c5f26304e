"""Layers of a norm as its checks need them: made, told, put through a training step, and compared."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cilnorm.hookspecs import Norm
from cilnorm.norms import finish_norms, norm_factory
from cilnorm.testing.checks import equal
from cilnorm.testing.toys import tell

__all__ = ["CHANNELS", "LAYOUTS", "ROUNDING", "age", "all_equal", "in_memory", "made", "stepped", "takes"]

CHANNELS = 8
LAYOUTS = (torch.contiguous_format, torch.channels_last)
ROUNDING = 3e-4  # of sums in float32 in another order; γ's gradient may be what is left of one a hundred times as large


def made(record: Norm, channels: int = CHANNELS, told: bool = True) -> nn.Module:
    """A layer with γ and β that aren't trivial, told of 12 + 4 rows; of few channels its option ``groups`` is 1."""
    few = channels < CHANNELS and "groups" in inspect.signature(record.build).parameters
    layer = finish_norms(norm_factory(record, **({"groups": 1} if few else {}))(channels), record)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    if told:
        tell(layer)
    return layer


def takes(record: Norm, channels: int) -> bool:
    """Whether there are layers of that width; ``build`` refuses others by a ValueError."""
    try:
        made(record, channels)
    except ValueError:
        return False
    return True


def stepped(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """One training step: output, gradient of the input, gradients of the parameters, buffers."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(torch.sin(y.detach()))
    assert x.grad is not None
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters()]
    return [y.detach(), x.grad, *gradients, *(buffer.clone() for buffer in layer.buffers())]


def all_equal(one: Sequence[Tensor], other: Sequence[Tensor], otherwise: str, tolerance: float = 0.0) -> None:
    """Raises ``Broken`` unless two steps' tensors are equal, or within a tolerance of each one's largest value."""
    names = ["output", "gradient of the input"]
    for at, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        what = names[at] if at < len(names) else "a gradient or buffer"
        scale = max(1.0, float(theirs.detach().abs().max())) if tolerance and theirs.numel() else 1.0
        equal(mine / scale, theirs / scale, f"{otherwise}: {what} differs", tolerance)


def in_memory(x: Tensor, layout: torch.memory_format) -> Tensor:
    """The same images, laid out so."""
    return x.contiguous(memory_format=layout)


def age(*layers: nn.Module) -> None:
    """Makes layers that count batches believe in many, for limits that widen with their number."""
    for layer in layers:
        for name, buffer in layer.named_buffers():
            if name.rpartition(".")[2] == "num_batches_tracked":
                buffer.fill_(30_000)
