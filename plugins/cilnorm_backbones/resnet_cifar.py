"""Residual networks for 32x32 images: 6n+2 layers, three stages of n basic blocks, 16, 32 and 64 channels.

https://arxiv.org/abs/1512.03385, section 4.2, with the projection shortcut (option B) that the TBBN experiments use.
Layers are named as in torchvision's ResNet, so weights travel between the two by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.hookspecs import Backbone, hookimpl

NormLayer = Callable[[int], nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; returns the sum before its ReLU, which the network applies."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = norm(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return out + self.downsample(x)


class CifarResNet(nn.Module):
    """Maps images (N, 3, 32, 32) to an embedding (N, 64) and the three stage outputs before their last ReLU.

    Args:
        norm: makes a layer for a number of channels.
        signed_embedding: leave out the last ReLU before pooling (LUCIR, section 3.2; PODNet; AFC).
        blocks: basic blocks a stage; 5 gives ResNet-32.
    """

    dim = 64

    def __init__(self, norm: NormLayer, signed_embedding: bool = False, blocks: int = 5) -> None:
        super().__init__()
        self.signed_embedding = signed_embedding
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = norm(16)
        self.layer1 = self._stage(16, 16, 1, blocks, norm)
        self.layer2 = self._stage(16, 32, 2, blocks, norm)
        self.layer3 = self._stage(32, 64, 2, blocks, norm)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int, blocks: int, norm: NormLayer) -> nn.ModuleList:
        first = BasicBlock(channels_in, channels, stride, norm)
        return nn.ModuleList([first, *(BasicBlock(channels, channels, 1, norm) for _ in range(blocks - 1))])

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.relu(self.bn1(self.conv1(images)))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                signed = block(x)
                x = F.relu(signed)
            maps.append(signed)
        last = maps[-1] if self.signed_embedding else x
        return last.mean((2, 3)), maps


@hookimpl
def cilnorm_backbones() -> list[Backbone]:
    paper = "https://arxiv.org/abs/1512.03385"
    depths = {6 * n + 2: n for n in (1, 2, 3, 5, 7, 9)}
    return [Backbone(f"resnet{depth}", partial(CifarResNet, blocks=n), paper) for depth, n in depths.items()]
