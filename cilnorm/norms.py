"""Norms for networks that somebody else wrote: timm, torchvision, or a model that is there already.

    timm.create_model("resnet18", norm_layer=norm_factory("tbbn"))          families that keep norm and activation apart
    timm.create_model("resnetv2_50", norm_layer=norm_act_factory("tbbn"))   families that fuse the two
    convert_norms(timm.create_model("regnety_002", pretrained=True), "tbbn")    either; weights and statistics are kept

``docs/architectures.md`` says which family takes what. ``norm_factory`` always gives a class (or a partial of one),
which timm's fused families refuse. They would take a function for a norm with its activation, and have none.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cilnorm.hookspecs import Norm
from cilnorm.network import SelfActivating

__all__ = ["convert_norms", "convert_sync", "finish_norms", "norm_act_factory", "norm_factory"]


def norm_factory(norm: Norm | str, **options: Any) -> Callable[..., nn.Module]:
    """A class, or a partial of one, to be called with a number of channels: what ``norm_layer=`` takes.

    Args:
        norm: a name that ``cilnorm list`` shows, or the record itself.
        options: of the layer, beside the keywords that all of them have.

    Raises:
        UnknownName: no norm of that name.
    """
    build = _record(norm).build
    inner = build.func if isinstance(build, functools.partial) else build
    if not isinstance(inner, type):
        build = _class_of(build)
    return functools.partial(build, **options) if options else build


def norm_act_factory(norm: Norm | str, act_layer: Any = "relu", **options: Any) -> Callable[..., nn.Module]:
    """A function for timm's families that fuse norm and activation.

    timm doesn't tell such a function which activation the family uses, so say it: ``silu`` for efficientnet. Families
    that use several (mobilenetv3) can only be converted. A norm with an activation of its own has that one instead.

    Args:
        norm: a name that ``cilnorm list`` shows, or the record itself.
        act_layer: as timm's layers take it: a name, or a class.
        options: of the layer.
    """
    from timm.layers import create_act_layer

    factory = norm_factory(norm, **options)

    def build(
        num_features: int,
        apply_act: bool = True,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Any = None,
        **keywords: Any,
    ) -> nn.Module:
        act = create_act_layer(act_layer, inplace=inplace, **(act_kwargs or {})) if apply_act else nn.Identity()
        return _with_activation(factory(num_features, **keywords), act, drop_layer() if drop_layer else nn.Identity())

    return build


def finish_norms(model: nn.Module, norm: Norm | str) -> nn.Module:
    """Lets a norm change what it must in the rest of a network that ``norm_factory`` gave its layers; returns it.

    ``gn+ws`` changes the convolutions; most norms have nothing to change. ``convert_norms`` does this by itself.

    Raises:
        UnknownName: no norm of that name.
        ValueError: a part that can't be changed; names it.
    """
    finish = _record(norm).finish
    if finish is not None:
        finish(model)
    return model


def convert_norms(model: nn.Module, norm: Norm | str, **options: Any) -> nn.Module:
    """Puts another norm in the place of every 2-d batch norm of ``model``, in place; returns it.

    γ and β stay the very parameters they were, running statistics are copied where the new layer has them, ε and
    momentum are kept where the new layer's own default is that of batch norm. timm's fused layers keep their
    activation, unless the norm has its own. Layers of cilnorm can be converted again.

    Raises:
        UnknownName: no norm of that name.
        ValueError: nothing to convert, or a width that the norm can't take; names the model, the layer and the reason.
        TypeError: a batch norm of a class whose additions would be lost.
    """
    record, known = _record(norm), _known_classes()
    made: dict[nn.Module, nn.Module] = {}
    slots = [slot for slot in _slots(model) if _convertible(slot[-1], slot[-2], known)]
    if not slots:
        raise ValueError(f"{type(model).__name__} has no 2-d batch norm that could become {record.name}")
    # All of them are made before the first is put in place, so that an error leaves the model as it was.
    for _, _, path, old in slots:
        try:
            if old not in made:
                made[old] = _replacement(old, record, options)
        except ValueError as error:
            raise ValueError(f"{type(model).__name__}.{path} can't be {record.name}: {error}") from error
    finish_norms(model, record)  # here for what it may refuse, and once more for the new layers
    _undo(model)
    for parent, name, _, old in slots:
        if parent is None:
            model = made[old]
        else:
            setattr(parent, name, made[old])
    return finish_norms(model, record)


def convert_sync(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Lets every batch-dependent layer share its statistics among the processes of a group; returns the model.

    Takes the place of torch's and timm's ``convert_sync_batchnorm``, which leave cilnorm's layers unsynchronised.
    Call it before ``set_composition``. Every process must hold equally many rows of each kind. Batch norms that
    aren't cilnorm's become torch's ``SyncBatchNorm``, which needs a GPU.
    """
    for parent, name, _, layer in list(_slots(model)):
        synchronise = getattr(layer, "synchronise", None)
        if callable(synchronise):
            synchronise(process_group)
        elif isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm):
            replacement = _synchronised(layer, process_group)
            if parent is None:
                return replacement
            setattr(parent, name, replacement)
    return model


def _undo(model: nn.Module) -> None:
    """Takes back what norms whose layers are about to go changed in the rest of the network."""
    from cilnorm import registry

    kinds = {_inner_class(module) for module in model.modules()}
    for record in registry.load().norms.values():
        if record.undo is not None and record.build in kinds:
            record.undo(model)


def _record(norm: Norm | str) -> Norm:
    if isinstance(norm, Norm):
        return norm
    from cilnorm import registry

    return registry.load().norms[norm]


def _class_of(build: Callable[..., nn.Module]) -> type:
    """A class that makes what ``build`` makes."""

    def new(_: type, *args: Any, **keywords: Any) -> nn.Module:
        return build(*args, **keywords)

    return type(getattr(build, "__name__", type(build).__name__), (), {"__new__": new})


class _Fused(nn.Module):
    """Goes in front of a norm's class: its output through ``drop`` and ``act``, as in timm's ``BatchNormAct2d``.

    A class of the norm rather than a box around it, so that parameters keep the names that pretrained weights have.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, *args: Any) -> Tensor:
        forward: Any = super().forward
        y = self.drop(forward(*args))
        return y if getattr(self, "activates", False) else self.act(y)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (_inner_class(self),), self.__dict__


@functools.cache
def _fused_class(inner: Any) -> Any:
    """The norm's class with activation; a ``BatchNorm2d`` with activation is one to timm as well.

    For timm's tools turn a ``BatchNorm2d`` into one of theirs, and keep the activation of a ``BatchNormAct2d`` only.
    """
    from timm.layers import BatchNormAct2d

    bases = (_Fused, inner, BatchNormAct2d) if issubclass(inner, nn.BatchNorm2d) else (_Fused, inner)
    return type(f"{inner.__name__}Act", bases, {})


def _inner_class(layer: nn.Module) -> Any:
    """The norm's own class, fused or not."""
    return type(layer).__mro__[2] if isinstance(layer, _Fused) else type(layer)


def _blank(inner: Any) -> nn.Module:
    """A fused layer without content, for copying and unpickling."""
    return nn.Module.__new__(_fused_class(inner))


def _with_activation(norm: nn.Module, act: nn.Module, drop: nn.Module) -> nn.Module:
    """The norm with drop and activation behind it; one with an activation of its own is told if it is to have one."""
    if isinstance(norm, SelfActivating) and not norm.fixed:
        norm.set_activation(not isinstance(act, nn.Identity))
    return _fuse(norm, act, drop)


def _fuse(norm: nn.Module, act: nn.Module, drop: nn.Module) -> nn.Module:
    """The norm with drop and activation behind it."""
    norm.__class__ = _fused_class(_inner_class(norm))
    norm.drop, norm.act = drop, act
    return norm


def _slots(model: nn.Module) -> Iterator[tuple[nn.Module | None, str, str, nn.Module]]:
    """Every place a module stands in: parent, name in it, path, module; a shared module as often as it is shared."""
    yield None, "", "", model
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():  # named_children leaves out the second place of a shared child
            if child is not None:
                yield parent, name, f"{path}.{name}".lstrip("."), child


def _known_classes() -> set[type]:
    """Classes that are a batch norm and nothing besides, and cilnorm's own."""
    from timm.layers import BatchNormAct2d

    from cilnorm import registry

    shelf = {record.build for record in registry.load().norms.values() if isinstance(record.build, type)}
    return {nn.BatchNorm2d, BatchNormAct2d, *shelf}


def _convertible(layer: nn.Module, path: str, known: set[type]) -> bool:
    if _inner_class(layer) in known:
        return True
    if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
        kind = type(layer).__qualname__
        raise TypeError(
            f"{path} is a {kind}; only BatchNorm2d itself, timm's BatchNormAct2d and cilnorm's own are converted"
        )
    return False


def _replacement(old: Any, record: Norm, options: dict[str, Any]) -> nn.Module:
    """A new layer with the settings, weights and statistics of the old one."""
    from timm.layers import BatchNormAct2d

    defaults, own = _defaults(nn.BatchNorm2d), _defaults(record.build)
    settings = {key: getattr(old, key, defaults[key]) for key in ("eps", "momentum") if own.get(key) == defaults[key]}
    settings["affine"] = getattr(old, "weight", None) is not None
    if getattr(old, "track_running_stats", True) is False:
        settings["track_running_stats"] = False
    new = norm_factory(record)(_channels(old), **(settings | options))
    if isinstance(old, _Fused | BatchNormAct2d):
        new = _with_activation(new, old.act, old.drop)
    elif getattr(old, "replaces", False):  # its network has no other activation in this place
        new = _with_activation(new, nn.ReLU(), nn.Identity())
    _take_over(new, old)
    return new


def _channels(layer: Any) -> int:
    for name in ("num_features", "num_channels"):
        if hasattr(layer, name):
            return getattr(layer, name)
    return layer.normalized_shape[0]


def _defaults(build: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(build).parameters.items()}


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Gives the old layer's parameters, statistics, device and mode to the new one."""
    with torch.no_grad():
        room = {name: value.numel() for name, value in new.state_dict().items()}
        state = {name: value for name, value in old.state_dict().items() if not name.startswith(("act.", "drop."))}
        # A layer may take a part of what the old one has; what is only a part of what it needs, it can't use.
        state = {name: value for name, value in state.items() if value.numel() >= room.get(name, 0)}
        floats = [value for value in (*old.parameters(), *old.buffers()) if value.is_floating_point()]
        if floats:
            new.to(floats[0].device, floats[0].dtype)
        new.load_state_dict(state, strict=False)
    for name, parameter in old.named_parameters(recurse=False):
        if isinstance(getattr(new, name, None), nn.Parameter):
            setattr(new, name, parameter)
    new.train(old.training)


def _synchronised(layer: nn.Module, process_group: Any) -> nn.Module:
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(layer, process_group)
