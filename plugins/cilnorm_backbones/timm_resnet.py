"""timm's residual networks with any norm: ``timm-resnet18``, ``timm-resnet50`` and so on, for 224x224 images.

https://github.com/huggingface/pytorch-image-models; timm itself is imported when one is built. Only networks whose
stages end in an addition and a ReLU are offered, since maps and signed embeddings are taken before that ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.hookspecs import Backbone, hookimpl
from cilnorm.network import SelfActivating, activation_after, without_activation

MODELS = ("resnet18", "resnet34", "resnet50")


class TimmResNet(nn.Module):
    """Maps images (N, 3, H, W) to an embedding (N, dim) and the four stage outputs before their last ReLU.

    Args:
        norm: what timm calls a norm layer.
        signed_embedding: leave out the ReLU after the last stage.
        name: the model's name in timm.
    """

    def __init__(self, norm: Callable[..., nn.Module], signed_embedding: bool = False, *, name: str) -> None:
        super().__init__()
        import timm

        self.signed_embedding = signed_embedding
        net: Any = timm.create_model(name, num_classes=0, norm_layer=norm, zero_init_last=False)
        self.net, self.dim = net, int(net.num_features)
        _settle(net, last=False)
        for block in (block for stage in self._stages() for block in stage):
            _settle(block, last=True)
        for stage in self._stages():
            last = stage[-1]
            setattr(last, "act3" if hasattr(last, "act3") else "act2", nn.Identity())  # applied in forward instead

    def _stages(self) -> list[Any]:
        net: Any = self.net
        return [net.layer1, net.layer2, net.layer3, net.layer4]

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        net: Any = self.net
        x, maps = net.maxpool(net.act1(net.bn1(net.conv1(images)))), []
        for stage in self._stages():
            maps.append(stage(x))
            x = F.relu(maps[-1])
        return (maps[-1] if self.signed_embedding else x).mean((2, 3)), maps


def _settle(block: nn.Module, last: bool) -> None:
    """Tells the norms of a block which of them an activation follows: all but the ``last``, which is added first."""
    numbers = [number for number in (1, 2, 3) if hasattr(block, f"bn{number}")]
    for number in numbers:
        norm = getattr(block, f"bn{number}")
        if last and number == numbers[-1]:
            without_activation(norm)
        elif isinstance(norm, SelfActivating):  # timm's own ReLU, which works in place, stays behind the others
            setattr(block, f"act{number}", activation_after(norm))
    for norm in (getattr(block, "downsample", None) or nn.Sequential()).children():
        without_activation(norm)


@hookimpl
def cilnorm_backbones() -> list[Backbone]:
    paper = "https://arxiv.org/abs/2110.00476"
    return [Backbone(f"timm-{name}", partial(TimmResNet, name=name), paper, side=224, timm=name) for name in MODELS]
