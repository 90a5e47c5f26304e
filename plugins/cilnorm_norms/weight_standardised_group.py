"""Group normalisation behind convolutions whose weights are standardised.

    Ŵ_o = (W_o − mean W_o) / √(var W_o + ε) over the inputs and the window of output o;   y = GN(Ŵ ∗ x)

Qiao, Wang, Liu, Shen and Yuille, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
2019, https://arxiv.org/abs/1903.10520. Nothing depends on the batch.

A norm is a layer; this one also changes the convolutions of the network that it stands in, all of them, which the
record's ``finish`` does once the layers are in place. They stay ``Conv2d`` with the same parameters by the same names
and are only computed with differently, so that states, copies and pretrained weights travel as ever. Only weights with
one number an output stay as they are, since nothing would be left of them.

As in timm's ``StdConv2d`` the variance is biased and ε, 1e-6, stands under the root.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms.group import GroupNorm2d

EPS = 1e-6


class StandardisedConv2d(nn.Conv2d):
    """A ``Conv2d`` whose weights have mean 0 and variance 1 for every output, https://arxiv.org/abs/1903.10520."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002, torch's names
        return super()._conv_forward(input, standardise(weight), bias)


def standardise(weight: Tensor) -> Tensor:
    """Ŵ (O, I, h, w): each output's weights with mean 0 and variance 1."""
    # A batch norm of one row with an output a channel: one kernel, forward and backward.
    flat = weight.reshape(1, len(weight), -1)
    return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=EPS).view_as(weight)


class WeightStandardisedGroupNorm2d(GroupNorm2d):
    """Group normalisation (N, C, H, W) that expects standardised weights before it, https://arxiv.org/abs/1903.10520.

    Arguments are those of ``GroupNorm2d``. Until ``finish_norms`` was called on the network, it raises RuntimeError.
    """

    finished: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.finished:
            raise RuntimeError(
                'gn+ws changes convolutions too, which were left as they are: call finish_norms(model, "gn+ws") once '
                "the network is built"
            )
        return super().forward(x)


def standardise_convolutions(network: nn.Module) -> None:
    """Lets every convolution of ``network`` compute with standardised weights, in place.

    Raises:
        ValueError: a convolution of another class than ``Conv2d``, whose additions would be lost; names it.
    """
    convolutions: list[nn.Module] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, StandardisedConv2d):
            if type(module) is not nn.Conv2d:
                kind = type(module).__qualname__
                raise ValueError(f"{name} is a {kind}; only weights of a plain Conv2d can be standardised")
            if module.weight[0].numel() > 1:
                convolutions.append(module)
    for module in convolutions:
        module.__class__ = StandardisedConv2d  # parameters, their names and whoever holds the module stay the same
    _say(network, True)


def release_convolutions(network: nn.Module) -> None:
    """Undoes ``standardise_convolutions``: the parameters stay, and are computed with as they are."""
    for module in network.modules():
        if isinstance(module, StandardisedConv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    _say(network, False)


def _say(network: nn.Module, finished: bool) -> None:
    for module in network.modules():
        if isinstance(module, WeightStandardisedGroupNorm2d):
            module.finished = finished


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [
        Norm(
            "gn+ws",
            WeightStandardisedGroupNorm2d,
            paper="https://arxiv.org/abs/1903.10520",
            aliases=("ws+gn",),
            finish=standardise_convolutions,
            undo=release_convolutions,
        )
    ]
