"""What a network makes of images as they are: embeddings, classes by the head or by the nearest mean, accuracies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cilnorm.batch import Task
from cilnorm.experiment.assembly import Assembly
from cilnorm.network import Network
from cilnorm.spec import Spec
from cilnorm.training.pixels import Pixels

__all__ = [
    "class_means",
    "embed",
    "held_out_loss",
    "measure_accuracy",
    "measure_classifier",
    "predict",
    "scored_images",
]

EVALUATION_ROWS = 256


def _in_batches(
    net: Network, pixels: Pixels, indices: Tensor, mirrored: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """(embedding, logits) of the images as they are, or left to right, network in evaluation mode."""
    net.eval()
    with torch.no_grad():
        for images in pixels.clean_parts(indices.split(EVALUATION_ROWS)):
            out = net(images.flip(3) if mirrored else images)
            yield out.embedding, out.logits


def predict(net: Network, pixels: Pixels, indices: Tensor, means: Tensor | None = None) -> Tensor:
    """The class (n,) that the network gives each image, among all it has seen.

    Args:
        means: unit vectors (seen, dim) of ``class_means``: the nearest one to the unit embedding decides, in place of
            the largest logit.
    """
    batches = _in_batches(net, pixels, indices)
    if means is None:
        return torch.cat([logits.argmax(1) for _, logits in batches])
    return torch.cat([torch.cdist(F.normalize(embedding, dim=1), means).argmin(1) for embedding, _ in batches])


def class_means(net: Network, pixels: Pixels, exemplars: Sequence[Tensor]) -> Tensor:
    """The direction of each class: its exemplars' mean unit embedding.

    iCaRL, https://arxiv.org/abs/1611.07725, algorithm 1. Mirror images count as well if training mirrors; the code of
    iCaRL, and of all that stem from it, lets them count always, and always mirrors in training.

    Args:
        exemplars: indices, one tensor a class.

    Returns:
        Unit vectors (classes, dim).
    """
    means, mirrorings = [], (False, True) if pixels.augmentation.flip else (False,)
    for indices in exemplars:
        ways = [torch.cat([e for e, _ in _in_batches(net, pixels, indices, mirrored)]) for mirrored in mirrorings]
        means.append(F.normalize(torch.cat(ways), dim=1).mean(0))
    return F.normalize(torch.stack(means), dim=1)


def embed(net: Network, pixels: Pixels) -> Callable[[Tensor], Tensor]:
    """A function from indices (n,) to embeddings (n, dim)."""
    return lambda indices: torch.cat([embedding for embedding, _ in _in_batches(net, pixels, indices)])


def held_out_loss(net: Network, pixels: Pixels, indices: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy over all seen classes on held-out images."""
    logits = torch.cat([logits for _, logits in _in_batches(net, pixels, indices)])
    return float(F.cross_entropy(logits, targets))


def scored_images(spec: Spec, indices: Tensor) -> Tensor:
    """The images that count; the released code's loaders drop a last short batch, kept here where there is no other."""
    rows = sum(spec.rows)
    whole = len(indices) // rows * rows
    return indices[:whole] if spec.protocol.test_images == "full" and whole else indices


def measure_accuracy(
    spec: Spec, parts: Assembly, task: Task, means: Tensor | None = None
) -> tuple[list[float], list[list[int]]]:
    """Percent of each seen task's test or held-out images that get the right class, see ``predict``.

    Returns:
        The percents, and, one row a seen task, how many of its images were given a class of each seen task.
    """
    stream, percent, confusion = parts.stream, [], []
    images, pixels, targets = stream.test, parts.test, stream.test_targets
    if spec.protocol.score == "validation":
        images, pixels, targets = stream.validation, parts.train, stream.targets
    ends = torch.tensor([seen.seen for seen in stream.tasks[: task.index + 1]])
    for seen in stream.tasks[: task.index + 1]:
        indices = scored_images(spec, images(seen))
        predicted = predict(parts.net, pixels, indices, means).cpu()
        percent.append(100 * int((predicted == targets[indices]).sum()) / len(indices))
        given = torch.bucketize(predicted, ends, right=True)
        confusion.append(torch.bincount(given, minlength=len(ends)).tolist())
    return percent, confusion


def measure_classifier(
    spec: Spec, parts: Assembly, task: Task, exemplars: Sequence[Tensor]
) -> tuple[list[float], list[list[int]]]:
    """What ``measure_accuracy`` returns, by the classifier that the spec names.

    Args:
        exemplars: indices, one tensor a class.
    """
    means = class_means(parts.net, parts.train, exemplars) if spec.classifier == "nme" else None
    return measure_accuracy(spec, parts, task, means)
