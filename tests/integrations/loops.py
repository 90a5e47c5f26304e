"""What the tests of foreign loops share: a small network, images that carry their label, and what layers were told."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cilnorm.rows_aware import RowsAware, Telling


def network(classes: int) -> nn.Sequential:
    """Two convolutions with batch norms behind them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )  # fmt: skip


def images_of(labels: Tensor, seed: int = 0) -> Tensor:
    """Random images (N, 3, 8, 8) whose first value is their label, so that a test can read it from the image."""
    images = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    images[:, 0, 0, 0] = labels.float()
    return images


class Witness:
    """Compares what a network's layers are told with the labels that its images carry, in every training pass."""

    def __init__(self, known: dict[int, int]) -> None:
        self.known = known  # classes learned before each task
        self.passes: list[tuple[int, int, int]] = []  # task, current rows, past rows

    def attach(self, model: nn.Module) -> None:
        """Looks at the rows that the first aware layer was told of, when its network begins."""
        model.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        layers = [layer for layer in module.modules() if isinstance(layer, RowsAware)]
        if not layers or not layers[0].training:
            return
        labels = args[0][:, 0, 0, 0].round().long()
        for layer in layers:
            told = layer._told
            if told is None:
                return  # which the layer itself refuses
            assert told.telling.open
            assert torch.equal(told.rows.past.cpu(), (labels < self.known[told.rows.task]).cpu())
        past = int(told.rows.past.sum())
        self.passes.append((told.rows.task, len(labels) - past, past))

    def __deepcopy__(self, memo: dict[int, object]) -> Witness:
        return self


def still_open(model: nn.Module) -> list[Telling]:
    """Tellings that a layer could still use."""
    held = [layer._told for layer in model.modules() if isinstance(layer, RowsAware)]
    return [told.telling for told in held if told is not None and told.telling.open]
