"""Which networks of timm and torchvision take which norm, and how: the table in ``docs/architectures.md``.

Everything in it is tried. A way of building counts if the network, given the weights and statistics of its BatchNorm
original, evaluates as that does; a norm counts if the network built with it trains a step with finite gradients.

    python -m benchmarks.architectures          writes the table
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from cilnorm import registry
from cilnorm.batch import Composition
from cilnorm.norms import convert_norms, finish_norms, norm_act_factory, norm_factory
from cilnorm.testing.toys import tell

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
COMPOSITION = Composition(6, 2, 2)
Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class Architecture:
    """A network to try, made small by ``options`` so that the whole table takes minutes on one CPU thread.

    Attributes:
        source: timm or torchvision.
        name: as the source calls it.
        options: of its constructor.
        act: the activation its family fuses with the norm.
        build: what to call instead of the source's function of that name.
        size: height and width of the image.
    """

    source: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    act: str = "relu"
    build: Build | None = None
    size: int = 32

    def make(self, **more: Any) -> nn.Module:
        torch.manual_seed(0)
        if self.source == "timm":
            return timm.create_model(self.name, **{"num_classes": 4, **self.options}, **more)
        build = self.build or getattr(torchvision.models, self.name)
        return build(num_classes=4, **self.options, **more)


timm_ = functools.partial(Architecture, "timm")
vision = functools.partial(Architecture, "torchvision")
RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_width": 16}
STAGES = {"layers": (1, 1, 1, 1), "channels": (32, 32, 64, 64)}
ARCHITECTURES = [
    timm_("resnet18", RESNET),
    timm_("resnet18", {"layers": (1, 1, 1, 1), "features_only": True, "num_classes": None}),
    timm_("resnet50", RESNET),
    timm_("resnext50_32x4d", RESNET),
    timm_("seresnet50", RESNET),
    timm_("wide_resnet50_2", RESNET),
    timm_("resnet26d", RESNET),
    timm_("ecaresnet26t", RESNET),
    timm_("skresnet18", RESNET),
    timm_("resnest14d", RESNET),
    timm_("res2net50_26w_4s", RESNET),
    timm_("resnetv2_50", STAGES),
    timm_("densenet121", {"growth_rate": 8, "block_config": (1, 1, 1, 1)}),
    timm_("vgg11_bn", {"features_only": True, "num_classes": None}),
    timm_("dla34"),
    timm_("hrnet_w18_small"),
    timm_("dpn48b", act="silu"),
    timm_("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}),
    timm_("efficientnet_b0", act="silu"),
    timm_("efficientnet_lite0", act="relu6"),
    timm_("mobilenetv2_100", act="relu6"),
    timm_("mobilenetv3_small_050", act="hard_swish"),
    timm_("mnasnet_small"),
    timm_("regnetx_002"),
    timm_("regnety_002"),
    timm_("rexnet_100", act="silu"),
    timm_("repvgg_a0"),
    timm_("ghostnet_050"),
    timm_("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
    vision("resnet18", {"block": BasicBlock, "layers": [1, 1, 1, 1]}, build=torchvision.models.ResNet),
    vision(
        "wide_resnet50_2",
        {"block": Bottleneck, "layers": [1, 1, 1, 1], "width_per_group": 128},
        build=torchvision.models.ResNet,
    ),
    vision("densenet121", {"growth_rate": 8, "block_config": (1, 1, 1, 1)}, build=torchvision.models.DenseNet),
    vision("mobilenet_v2", {"width_mult": 0.25}),
    vision("mobilenet_v3_small"),
    vision("efficientnet_b0"),
    vision("regnet_y_400mf"),
    vision("shufflenet_v2_x0_5"),
]


@dataclass(frozen=True)
class Row:
    """What was found for one architecture.

    Attributes:
        norm_layer, norm_act, convert: yes, or why that way doesn't give the network.
        norms: the same for each norm by name, on the first way that works.
    """

    architecture: str
    norm_layer: str
    norm_act: str
    convert: str
    norms: dict[str, str]


def tried(architecture: Architecture, norms: Sequence[str] = ()) -> Row:
    """Builds the network in three ways, and trains it a step with these norms, or with every one."""
    original = with_history(architecture.make()).eval()
    image = torch.randn(2, 3, architecture.size, architecture.size)
    expected = outputs(original, image)
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in original.modules())

    def verdict(make: Callable[[], nn.Module]) -> str:
        try:
            model = make()
            if not has_batch_norm:
                return trains(lambda: model, architecture.size)  # nothing to compare with
            model.load_state_dict(original.state_dict(), strict=True)
            if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
                return "no, keeps some batch norm"
            same = torch.allclose(outputs(model.eval(), image), expected, rtol=1e-3, atol=1e-4)
            return "yes" if same else "no, another network"
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"no, {reason(error)}"

    norm_layer = verdict(lambda: architecture.make(norm_layer=norm_factory("tbbn")))
    norm_act = verdict(lambda: architecture.make(norm_layer=norm_act_factory("tbbn", architecture.act)))
    if not has_batch_norm and norm_act == "yes":
        norm_act = "no, another network"  # it trains, with an activation after every norm
    convert = verdict(lambda: convert_norms(copy.deepcopy(original), "tbbn"))
    ways: dict[str, Callable[[str], nn.Module]] = {
        "convert": lambda name: convert_norms(copy.deepcopy(original), name),
        "norm_layer": lambda name: finish_norms(architecture.make(norm_layer=norm_factory(name)), name),
    }
    way = ways["convert" if convert == "yes" else "norm_layer"]
    asked = norms or list(registry.load().norms)
    trained = {name: trains(lambda name=name: way(name), architecture.size) for name in asked}
    name = f"{architecture.source} {architecture.name}" + " features" * ("features_only" in architecture.options)
    return Row(name, norm_layer, norm_act, convert, trained)


def trains(make: Callable[[], nn.Module], size: int) -> str:
    """Whether a training step gives finite gradients."""
    try:
        model = make().train()
        tell(model, COMPOSITION)
        outputs(model, torch.randn(COMPOSITION.rows, 3, size, size)).square().mean().backward()
    except ValueError as error:
        return f"no, {reason(error)}"
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return "yes" if gradients and all(torch.isfinite(g).all() for g in gradients) else "no, gradients aren't finite"


def outputs(model: nn.Module, image: Tensor) -> Tensor:
    """Everything the network gives, as one row a batch row."""
    with torch.set_grad_enabled(model.training):
        y = model(image)
    parts = y if isinstance(y, list | tuple) else [y]
    return torch.cat([part.flatten(1) for part in parts], 1)


def with_history(model: nn.Module) -> nn.Module:
    """The network with γ, β and running statistics as after training, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(1)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dim() == 1 and value.is_floating_point():
            low = 0.75 if "weight" in name or "var" in name else -0.25
            value.data = torch.rand(value.shape, generator=generator) * 0.5 + low
    return model


def reason(error: Exception) -> str:
    """The first line of an error, short enough for a cell of the table."""
    text = str(error).splitlines()[0]
    text = re.sub(r"Error\(s\) in loading state_dict.*", "loses weights", text)
    return re.sub(r" that could become .*|.*can't be \S+: ", "", text)


def table(found: list[Row]) -> str:
    """The page: a table of ways, a table of norms, and the reasons below."""
    names = list(found[0].norms)
    versions = f"timm {timm.__version__} and torchvision {torchvision.__version__.partition('+')[0]}"
    reasons: dict[str, int] = {}

    def cell(text: str) -> str:
        return "yes" if text == "yes" else f"no [{reasons.setdefault(text.removeprefix('no, '), len(reasons) + 1)}]"

    def lines(head: list[str], body: list[list[str]]) -> list[str]:
        return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body]]

    ways = [[row.architecture, cell(row.norm_layer), cell(row.norm_act), cell(row.convert)] for row in found]
    norms = [[row.architecture, *(cell(row.norms[name]) for name in names)] for row in found]
    return "\n".join(
        [
            "# Which networks take which norm",
            "",
            f"Made by `python -m benchmarks.architectures`, which tries all of it, with {versions}.",
            "",
            "## Ways to build the network with TBBN",
            "",
            *lines(["network", "`norm_layer=norm_factory`", "`norm_layer=norm_act_factory`", "`convert_norms`"], ways),
            "",
            "## Norms that train",
            "",
            "Converted, or built by `norm_layer=norm_factory` where there is nothing to convert; default options.",
            "",
            *lines(["network", *(f"`{name}`" for name in names)], norms),
            "",
            "## Why not",
            "",
            *(f"{number}. {text}" for text, number in reasons.items()),
            "",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Writes the table."""
    if argv:
        sys.exit("no arguments are taken")
    page = table([tried(architecture) for architecture in ARCHITECTURES])
    if TABLE.parent.is_dir():
        TABLE.write_text(page, encoding="utf-8")
    else:
        print(page)  # installed, without the docs


if __name__ == "__main__":
    main(sys.argv[1:])
