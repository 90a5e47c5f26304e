"""What a backbone promises: an embedding and stage maps, every norm in it, and nothing but the norm it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from cilnorm import registry as registries
from cilnorm.hookspecs import Backbone
from cilnorm.norms import finish_norms
from cilnorm.testing import toys
from cilnorm.testing.checks import Broken, Check, attempt, equal, wants

__all__ = ["backbone_checks"]

WHERE = "cilnorm.hookspecs.Backbone"
SIDE = 32


class Marked(nn.BatchNorm2d):
    """A norm that is known again, and that pulls what follows it below 0, as far as no ReLU holds it."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.bias, -2.0)


def built(record: Backbone, norm: Callable[..., nn.Module] = Marked, signed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    made = attempt(
        lambda: record.build(norm, signed_embedding=signed),
        "build(norm, signed_embedding=False) must be possible with every option at its default",
    )
    wants(isinstance(made, nn.Module), f"build returned a {type(made).__name__}, which is no torch.nn.Module")
    found: nn.Module = made
    return found


def embedding_and_maps(record: Backbone) -> None:
    net = built(record)
    dim = getattr(net, "dim", None)
    wants(isinstance(dim, int), f"`dim` must be the embedding's width, an int; it is {dim!r}")
    out = net(toys.rows(3, SIDE, SIDE, count=4))
    fine = isinstance(out, tuple) and len(out) == 2
    wants(fine, f"forward returned a {type(out).__name__}; return (embedding, maps)")
    embedding, maps = out
    wants(embedding.shape == (4, dim), f"the embedding of 4 images has shape {tuple(embedding.shape)}, not (4, {dim})")
    said = "PODNet and AFC compare them; return the output of each stage"
    wants(isinstance(maps, (list, tuple)) and len(maps) > 0, f"there are no stage maps; {said}")
    flat = [tuple(each.shape) for each in maps if each.dim() != 4 or len(each) != 4]
    wants(not flat, f"a stage map has shape {flat[:1]}, not (4, C, H, W); {said}")
    sides = [each.shape[-1] for each in maps]
    wants(sides == sorted(sides, reverse=True), f"stage maps have sides {sides}; give them from shallow to deep")


def maps_are_its_own(record: Backbone) -> None:
    """What a method asks of the maps changes the backbone, and the embedding is made of them."""
    embedding, maps = built(record, nn.BatchNorm2d, signed=True)(toys.rows(3, SIDE, SIDE, count=4))
    said = "the embedding does not depend on every stage map; return the maps themselves, not detached copies"
    wants(all(each.requires_grad for each in maps), said)
    gradients = torch.autograd.grad(embedding.square().sum(), maps, allow_unused=True)
    wants(all(gradient is not None and bool(gradient.any()) for gradient in gradients), said)


def maps_are_before_relu(record: Backbone) -> None:
    _, maps = built(record)(toys.rows(3, SIDE, SIDE))
    positive = [at for at, each in enumerate(maps, start=1) if not bool((each < 0).any())]
    wants(not positive, f"stage map {positive[:1]} has no negative value; give it before its last ReLU")


def signed_embedding(record: Backbone) -> None:
    images = toys.rows(3, SIDE, SIDE)
    plain, signed = (built(record, signed=signed)(images)[0] for signed in (False, True))
    wants(not bool((plain < 0).any()), "without signed_embedding the embedding has negative values: a ReLU is missing")
    said = "with signed_embedding=True the embedding has no negative value; leave out the last ReLU"
    wants(bool((signed < 0).any()), said)


def only_the_given_norm(record: Backbone) -> None:
    net = built(record)
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
    others = [name for name, module in net.named_modules() if isinstance(module, kinds) and type(module) is not Marked]
    wants(not others, f"{others[:1]} is a norm of its own; build every norm by norm(channels)")
    wants(any(type(module) is Marked for module in net.modules()), "it never calls norm(channels)")


def every_norm(record: Backbone) -> None:
    """Each of the shelf, a step with each."""
    for norm in registries.load().norms.values():
        said = f"it can't be trained with the norm {norm.name}"
        net = finish_norms(built(record, norm.build), norm)
        toys.tell(net)
        out = attempt(partial(net, toys.rows(3, SIDE, SIDE)), said)
        out[0].square().sum().backward()
        none = [name for name, parameter in net.named_parameters() if parameter.grad is None]
        wants(not none, f"{said}: {none[:1]} has no gradient")


def evaluation_by_row(record: Backbone) -> None:
    net = built(record, nn.BatchNorm2d)
    net(toys.rows(3, SIDE, SIDE))
    net.eval()
    images = toys.rows(3, SIDE, SIDE, seed=1)
    said = "in evaluation the embedding of an image depends on its company"
    equal(net(images[:3])[0], net(images)[0][:3], said, 1e-4)


def copies(record: Backbone) -> None:
    """A teacher is a deep copy, and a checkpoint a state_dict."""
    net, images = built(record, nn.BatchNorm2d), toys.rows(3, SIDE, SIDE)
    net(images)
    teacher = attempt(lambda: copy.deepcopy(net), "it can't be deep-copied").eval()
    other = built(record, nn.BatchNorm2d)
    attempt(lambda: other.load_state_dict(net.state_dict(), strict=True), "its state_dict can't be loaded again")
    expected = teacher(images)[0]
    equal(other.eval()(images)[0], expected, "a network with the same state_dict computes otherwise")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    equal(teacher(images)[0], expected, "changing the network changed a deep copy of it")


def two_tasks(record: Backbone) -> None:
    registry = toys.registry_with("backbone", record)
    for method, norm in (("ft", "tbbn"), ("podnet", "bn")):
        asked: dict[str, Any] = {"method": method, "norm": norm, "backbone": record.name, "dataset.size": SIDE}
        result = toys.toy_run(registry, **asked)
        if len(result.matrix) != 2:
            raise Broken(f"a run of {method} over two tasks did not end")


CHECKS: list[tuple[Callable[[Backbone], None], bool]] = [
    (embedding_and_maps, False), (maps_are_its_own, False), (maps_are_before_relu, False), (signed_embedding, False),
    (only_the_given_norm, False), (evaluation_by_row, False), (copies, False), (every_norm, False),
    (two_tasks, False),
]  # fmt: skip


def backbone_checks(record: Backbone) -> Iterator[Check]:
    """The checks of a backbone, quick ones first."""
    for work, slow in CHECKS:
        yield Check("backbone", record.name, work.__name__, work, record, WHERE, slow)
