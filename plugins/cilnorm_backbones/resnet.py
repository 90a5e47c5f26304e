"""Residual networks, for small and for large images.

``resnet8`` ... ``resnet56``: 6n+2 layers for 32x32 images, https://arxiv.org/abs/1512.03385, section 4.2, with the
projection shortcut (option B) that the TBBN experiments use. ``resnet32-a``: with the shortcut without weights of
option A, which PyCIL has: every other pixel, channels filled up with zeros. ``resnet18``, ``resnet34`` and
``resnet50``: table 1 there, for 224x224 images, the last with its stride in the 3x3 convolution, as in torchvision.
``resnet18-podnet``: the ResNet-18 of the code of PODNet and AFC (https://arxiv.org/abs/2004.13513), which has a 3x3
stem, rectifies nothing at the end of a stage, and starts with residual branches that are zero.
Layers are named as in torchvision's ResNet, so weights travel between the two by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.hookspecs import Backbone, hookimpl
from cilnorm.network import activation_after, without_activation

NormLayer = Callable[[int], nn.Module]


class PaddedShortcut(nn.Module):
    """Every other pixel, with as many channels of zeros behind the channels as it takes."""

    def __init__(self, stride: int, channels: int) -> None:
        super().__init__()
        self.stride, self.channels = stride, channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels - x.shape[1]))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; returns the sum before its ReLU, which the network applies."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: NormLayer, padded: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = norm(channels)
        self.act1 = activation_after(self.bn1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = without_activation(norm(channels))
        self.downsample: nn.Module = nn.Identity()
        if padded and (stride != 1 or channels_in != channels):
            self.downsample = PaddedShortcut(stride, channels)
        elif stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, without_activation(norm(channels)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return out + self.downsample(x)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, the last four times as wide; a shortcut. Returns as a basic block."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = norm(channels)
        self.act1 = activation_after(self.bn1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = norm(channels)
        self.act2 = activation_after(self.bn2)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = without_activation(norm(4 * channels))
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != 4 * channels:
            convolution = nn.Conv2d(channels_in, 4 * channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, without_activation(norm(4 * channels)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(out)) + self.downsample(x)


class ResNet(nn.Module):
    """Maps images (N, 3, H, W) to an embedding (N, dim) and the stage outputs before their last ReLU.

    Args:
        norm: makes a layer for a number of channels.
        signed_embedding: leave out the last ReLU before pooling (LUCIR, section 3.2; PODNet; AFC). The last one is that
            of the last stage on every network.
        widths: channels of the stages; every stage but the first halves the image.
        blocks: how many each stage has.
        block: what they are. ``basic``; ``padded``: basic, with shortcuts without weights where sizes change (option
            A); ``bottleneck``: outputs have four times the channels.
        stem: size and stride of the first convolution.
        pool: halve the image once more after it.
        rectified: whether a stage's output passes a ReLU on its way to the next stage.
        zero_start: whether the last norm of each block starts at γ = 0.
    """

    def __init__(
        self,
        norm: NormLayer,
        signed_embedding: bool = False,
        *,
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] = (5, 5, 5),
        block: Literal["basic", "padded", "bottleneck"] = "basic",
        stem: tuple[int, int] = (3, 1),
        pool: bool = False,
        rectified: bool = True,
        zero_start: bool = False,
    ) -> None:
        super().__init__()
        make: Callable[..., nn.Module] = partial(BasicBlock, padded=block == "padded")
        make, wider = (Bottleneck, 4) if block == "bottleneck" else (make, 1)
        self.dim = wider * widths[-1]
        self.signed_embedding, self.rectified = signed_embedding, rectified
        size, stride = stem
        self.conv1 = nn.Conv2d(3, widths[0], size, stride, size // 2, bias=False)
        self.bn1 = norm(widths[0])
        self.act1 = activation_after(self.bn1)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        self.stages = [f"layer{number}" for number in range(1, len(widths) + 1)]
        channels_in = widths[0]
        for name, channels, count in zip(self.stages, widths, blocks, strict=True):
            first = make(channels_in, channels, 1 if name == "layer1" else 2, norm)
            later = (make(wider * channels, channels, 1, norm) for _ in range(count - 1))
            self.add_module(name, nn.ModuleList([first, *later]))
            channels_in = wider * channels
        self._start(zero_start)

    def _start(self, zero_start: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_start and isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if getattr(last, "weight", None) is not None:
                    nn.init.zeros_(last.weight)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        maps = []
        for name in self.stages:
            *blocks, last = getattr(self, name)
            for block in blocks:
                x = F.relu(block(x), inplace=True)  # over a sum of ours; a norm may need its output to go backward
            maps.append(last(x))
            x = F.relu(maps[-1]) if self.rectified else maps[-1]
        pooled = maps[-1] if self.signed_embedding else F.relu(maps[-1])
        return pooled.mean((2, 3)), maps


@hookimpl
def cilnorm_backbones() -> list[Backbone]:
    paper = "https://arxiv.org/abs/1512.03385"
    small = {6 * n + 2: n for n in (1, 2, 3, 5, 7, 9)}
    wide = partial(ResNet, widths=(64, 128, 256, 512), pool=True)
    podnet = partial(wide, blocks=(2, 2, 2, 2), rectified=False, zero_start=True)
    return [
        *(Backbone(f"resnet{depth}", partial(ResNet, blocks=(n,) * 3), paper, side=32) for depth, n in small.items()),
        Backbone("resnet32-a", partial(ResNet, blocks=(5, 5, 5), block="padded"), paper, side=32),
        Backbone("resnet18", partial(wide, stem=(7, 2), blocks=(2, 2, 2, 2)), paper, side=224),
        Backbone("resnet34", partial(wide, stem=(7, 2), blocks=(3, 4, 6, 3)), paper, side=224),
        Backbone("resnet50", partial(wide, stem=(7, 2), blocks=(3, 4, 6, 3), block="bottleneck"), paper, side=224),
        Backbone("resnet18-podnet", podnet, "https://arxiv.org/abs/2004.13513", ("resnet18-cifar",), side=224),
    ]
