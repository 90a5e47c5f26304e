"""The ResNet-32 of the code of iCaRL, LUCIR, PODNet and AFC for CIFAR-100.

Unlike the ResNet-32 of https://arxiv.org/abs/1512.03385 it rectifies nothing after an addition, has a fourth stage of
one block, shortcuts without weights (option A: every other pixel, channels filled up with zeros), and residual branches
that start at zero. PODNet (https://arxiv.org/abs/2004.13513) takes its maps and embedding from it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.hookspecs import Backbone, hookimpl
from cilnorm.network import activation_after, without_activation

NormLayer = Callable[[int], nn.Module]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights; with ``widen`` it halves the image, doubles the channels."""

    def __init__(self, channels_in: int, widen: bool, norm: NormLayer) -> None:
        super().__init__()
        channels = channels_in * (1 + widen)
        self.widen = widen
        self.conv_a = nn.Conv2d(channels_in, channels, 3, 1 + widen, 1, bias=False)
        self.bn_a = norm(channels)
        self.act_a = activation_after(self.bn_a)
        self.conv_b = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn_b = without_activation(norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn_b(self.conv_b(self.act_a(self.bn_a(self.conv_a(x)))))
        if self.widen:
            x = x[..., ::2, ::2]
            x = torch.cat([x, torch.zeros_like(x)], dim=1)
        return x + residual


class RebuffiResNet(nn.Module):
    """Maps images (N, 3, 32, 32) to an embedding (N, 64) and the four stage outputs, which no ReLU follows.

    Args:
        norm: makes a layer for a number of channels.
        signed_embedding: pool the last map as it is; otherwise its positive part.
        blocks: residual units of the first stage; the second has as many, the third and fourth together.
    """

    dim = 64

    def __init__(self, norm: NormLayer, signed_embedding: bool = False, *, blocks: int = 5) -> None:
        super().__init__()
        self.signed_embedding = signed_embedding
        self.conv_1_3x3 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn_1 = norm(16)
        self.act_1 = activation_after(self.bn_1)
        self.stage_1 = nn.Sequential(*(Block(16, False, norm) for _ in range(blocks)))
        self.stage_2 = nn.Sequential(Block(16, True, norm), *(Block(32, False, norm) for _ in range(blocks - 1)))
        self.stage_3 = nn.Sequential(Block(32, True, norm), *(Block(64, False, norm) for _ in range(blocks - 2)))
        self.stage_4 = Block(64, False, norm)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block) and getattr(module.bn_b, "weight", None) is not None:
                nn.init.zeros_(module.bn_b.weight)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.act_1(self.bn_1(self.conv_1_3x3(images)))
        maps = []
        for stage in (self.stage_1, self.stage_2, self.stage_3, self.stage_4):
            x = stage(x)
            maps.append(x)
        return (x if self.signed_embedding else F.relu(x)).mean((2, 3)), maps


@hookimpl
def cilnorm_backbones() -> list[Backbone]:
    return [Backbone("resnet32-rebuffi", RebuffiResNet, "https://arxiv.org/abs/2004.13513", side=32)]
