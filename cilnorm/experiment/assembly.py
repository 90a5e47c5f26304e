"""Spec -> network, method, stream of tasks and pixels on a device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cilnorm.batch import CompositionAware, CompositionWarning, Task
from cilnorm.data.pixel_cache import image_set
from cilnorm.files import in_words
from cilnorm.heads import Linear
from cilnorm.hookspecs import Norm
from cilnorm.images import DatasetError, ImageSet
from cilnorm.method import Method
from cilnorm.network import Network
from cilnorm.norms import finish_norms
from cilnorm.registry import Registry, contain_exit
from cilnorm.rows_aware import RowsAware
from cilnorm.running import KeepsStatistics, statistics_layers
from cilnorm.spec import Spec, SpecError
from cilnorm.training.fast_engines import engine_class
from cilnorm.training.pixels import Augmentation, Pixels
from cilnorm.training.place import Place
from cilnorm.training.protocol import Stream, class_order
from cilnorm.training.randomness import initial_weights
from cilnorm.training.ranks import ALONE, Ranks
from cilnorm.training.streamed_images import StreamedImages, fits

__all__ = ["Assembly", "assemble", "backbone_builder", "pick_device", "why_not_shared"]


@dataclass(frozen=True, eq=False)
class Assembly:
    """The parts of a run.

    Attributes:
        train, test: images, handed out on the device.
        order: the source's labels in the order of learning.
        images: where the pixels came from, for its names and digest.
        ranks: the processes that share the run.
    """

    net: Network
    method: Method
    stream: Stream
    train: Pixels
    test: Pixels
    order: tuple[int, ...]
    images: ImageSet
    device: torch.device
    ranks: Ranks = ALONE

    def tasks(self, spec: Spec) -> tuple[Task, ...]:
        """Those that the run learns."""
        return self.stream.tasks[: spec.stop_after]

    def close(self) -> None:
        """Ends the threads that read images, if there are any."""
        self.train.close()
        self.test.close()


def pick_device(name: str = "auto", place: Place = Place()) -> torch.device:  # noqa: B008  (frozen)
    """A device by torch's name; ``auto`` is the first CUDA device, else the CPU.

    Args:
        place: of this process; where several share a run, each on a machine has a GPU of its own, if there are any.

    Raises:
        SpecError: there is no such device here, or not one for each process.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and place.size > 1:
            device = _gpu_of(place, device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def _gpu_of(place: Place, device: torch.device) -> torch.device:
    there = torch.cuda.device_count()
    if device.index is not None:
        raise SpecError(f"{place.size} processes share this run, and {device} is one GPU; give --device cuda or cpu")
    if place.locals > there:
        raise SpecError(
            f"{place.locals} processes on this machine, and {there} GPUs; start as many as there are, or --device cpu"
        )
    return torch.device("cuda", place.local)


def _order(spec: Spec, classes: int) -> list[int]:
    """The labels of all ``classes`` classes, or more than a run learns, in the order of learning."""
    given = spec.class_order
    if not isinstance(given, tuple):
        return class_order(classes, spec.seed if given is None else given)
    if max(given) >= classes:
        raise SpecError(f"class_order names the label {max(given)}; {spec.dataset} has the labels 0 .. {classes - 1}")
    wanted = classes if spec.classes is None else spec.classes
    if len(given) < wanted:
        raise SpecError(f"class_order names {len(given)} of {wanted} classes; give all, or set classes={len(given)}")
    return list(given)


def backbone_builder(spec: Spec, registry: Registry, signed_embedding: bool) -> Callable[[], nn.Module]:
    """A function that makes the spec's backbone with its norm."""
    norm, build = registry.norms[spec.norm], registry.backbones[spec.backbone].build

    def backbone() -> nn.Module:
        made: nn.Module = build(
            partial(norm.build, **spec.norm_options), signed_embedding=signed_embedding, **spec.backbone_options
        )
        return finish_norms(made, norm)

    return backbone


def assemble(
    spec: Spec, registry: Registry, device: torch.device, data_root: Path | None = None, ranks: Ranks = ALONE
) -> Assembly:
    """Builds what a spec names.

    Args:
        ranks: the processes that share the run.

    Raises:
        SpecError: a part can't be built with these options.
        DatasetError: the images are missing or damaged.

    Warns:
        CompositionWarning: the norm wants to know what batches are made of, and no layer of the network listens.
    """
    images = _image_set(spec, registry, data_root)
    if spec.classes is not None and spec.classes > images.classes:
        raise SpecError(f"{spec.dataset} has {images.classes} classes, not {spec.classes}")
    order = _order(spec, images.classes)[: spec.classes]
    if spec.protocol.herding != "reservoir":
        spec.exemplars(len(order))
    with contain_exit(f"the method {spec.method}"):
        method: Method = registry.methods[spec.method].build(**spec.method_options)
    if not spec.keeps_exemplars and not method.exemplar_free:
        free = [name for name, record in registry.methods.items() if getattr(record.build, "exemplar_free", False)]
        raise SpecError(f"{spec.method} needs exemplars, and memory is 0; {', '.join(free)} can do without")
    try:
        engine_class(spec.engine, device, ranks.size)
        sizes = spec.sizes(len(order))
        with initial_weights(spec.seed), contain_exit(f"the network {spec.backbone} with {spec.norm}"):
            net = method.network(backbone_builder(spec, registry, method.signed_embedding))
            _check_statistics(spec, net.backbone)
            _check_shared(spec, registry.norms[spec.norm], net.backbone, ranks)
            _check_maps(spec, method, net.backbone, images)
            if isinstance(net.head, Linear):
                net.head.start = spec.protocol.head_start
            net = net.to(device).to(memory_format=torch.channels_last)
    except (ValueError, TypeError) as error:
        raise SpecError(str(error)) from error
    if registry.norms[spec.norm].composition_aware and not any(isinstance(m, CompositionAware) for m in net.modules()):
        warnings.warn(
            f"the norm {spec.norm} is composition-aware, but no layer of {spec.backbone} with it listens; derive the "
            "layer's class from cilnorm.batch.CompositionAware, and let the backbone build its norms with what it is "
            "given",
            CompositionWarning,
            stacklevel=2,
        )
    stream = Stream(
        images.train_labels,
        images.test_labels,
        order,
        sizes,
        validation=spec.protocol.validation,
        seed=spec.seed,
        train_per_class=spec.train_per_class,
    )
    if spec.protocol.keep == "best" and not all(len(stream.validation(task)) for task in stream.tasks):
        raise SpecError(f"keep: best needs held-out images; a part of {spec.protocol.validation} leaves some task none")
    return Assembly(net, method, stream, *_pixels(spec, images, device), tuple(order), images, device, ranks)


def _image_set(spec: Spec, registry: Registry, data_root: Path | None) -> ImageSet:
    """The data set's images.

    Raises:
        DatasetError: they are missing or damaged, or a resumed run could not know them again.
    """
    with contain_exit(f"the data set {spec.dataset}"):
        source = registry.datasets[spec.dataset].build(data_root, **spec.dataset_options)
    images = image_set(source)
    if not images.digest:
        raise DatasetError(
            f"the data set {spec.dataset} has no digest, by which a resumed run knows its images again; its plugin "
            "must give ImageSet.digest, the SHA-256 of pixels and labels"
        )
    return images


def _pixels(spec: Spec, images: ImageSet, device: torch.device) -> tuple[Pixels, Pixels]:
    """The training and test images on the device, or read from elsewhere; test images are resized and cut alone."""
    sizes_alone = Augmentation(crop_size=spec.augmentation.crop_size, test_size=spec.augmentation.test_size)
    taken = images.train_images.nbytes + images.test_images.nbytes
    streamed = spec.residence == "stream" or (spec.residence == "auto" and not fits(taken, device))

    def there(split: Tensor, start: int) -> Tensor | StreamedImages:
        return StreamedImages(split, device, images.file, start) if streamed else split.to(device)

    try:
        train = Pixels(there(images.train_images, 0), images.mean, images.std, spec.augmentation)
        test = there(images.test_images, images.train_images.nbytes)
        return train, Pixels(test, images.mean, images.std, sizes_alone)
    except ValueError as error:
        raise SpecError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise SpecError(
            f"the images of {spec.dataset} take {taken / 1e9:.1f} GB, which {device} does not have;"
            " --set residence=stream reads them when they are needed"
        ) from error
    except OSError as error:
        raise DatasetError(in_words(error)) from error


def _check_maps(spec: Spec, method: Method, backbone: nn.Module, images: ImageSet) -> None:
    """Refuses a backbone without stage maps under a method that compares them.

    Raises:
        SpecError: names both.
    """
    if not method.needs_maps:
        return
    with torch.no_grad():
        _, maps = backbone.eval()(torch.zeros(1, *images.train_images.shape[1:]))
    backbone.train()
    if not maps:
        raise SpecError(f"{spec.method} compares stage maps, and the backbone {spec.backbone} gives none")


def _check_statistics(spec: Spec, backbone: nn.Module) -> None:
    """Refuses switches of running statistics where there are none to switch.

    Raises:
        SpecError: names the switch and the norm.
    """
    asked, layers = spec.statistics.asked, statistics_layers(backbone).values()
    if asked and not layers:
        options = f" with {dict(spec.norm_options)}" if spec.norm_options else ""
        raise SpecError(f"statistics.{asked}: {spec.norm}{options} keeps no running statistics")
    if asked == "freeze" and not all(isinstance(layer, KeepsStatistics) for layer in layers):
        raise SpecError(
            f"statistics.freeze: layers of {spec.norm} derive from no KeepsStatistics, so they can't freeze"
        )


def _check_shared(spec: Spec, norm: Norm, backbone: nn.Module, ranks: Ranks) -> None:
    """Refuses what several processes can't share.

    Raises:
        SpecError: rows that don't divide, layers that must know numbers of rows which differ from batch to batch, or
            layers with statistics of one process's rows alone.
    """
    if ranks.alone:
        return
    shuffled = spec.protocol.batches == "shuffled"
    ranks.refuse_rows(spec.rows, spec.keeps_exemplars and not shuffled)
    for module in backbone.modules() if shuffled else ():
        if isinstance(module, CompositionAware) and not isinstance(module, RowsAware):
            raise SpecError(
                f"{spec.norm}: {type(module).__name__} must know how many rows are current, and with protocol.batches: "
                f"shuffled {ranks.size} processes hold other numbers each; take stratified, or run it in one process"
            )
    refused = why_not_shared(norm, backbone)
    if refused:
        raise SpecError(f"{spec.norm}: {refused}; run it in one process instead of {ranks.size}")


def why_not_shared(norm: Norm, model: nn.Module) -> str:
    """Why several processes can't share a batch that this norm's layers in a model look at; empty where they can."""
    for layer in statistics_layers(model).values():
        if not callable(getattr(layer, "synchronise", None)):
            kind = type(layer).__name__
            return f"{kind} has no synchronise(group), so its statistics would be those of one process's rows"
    return "its record says one_process: its layers look at one process's rows alone" if norm.one_process else ""
