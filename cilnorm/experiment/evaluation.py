"""What a network makes of images as they are: embeddings, classes by the head or by the nearest mean, accuracies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cilnorm.batch import Task
from cilnorm.experiment.assembly import Assembly
from cilnorm.metrics import calibration_error
from cilnorm.network import Network, Output
from cilnorm.spec import Spec
from cilnorm.training.pixels import Pixels
from cilnorm.training.ranks import ALONE, Ranks

__all__ = [
    "Measured",
    "class_means",
    "describe",
    "embed",
    "held_out_loss",
    "measure",
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
    return _scores(net, pixels, indices, means, ALONE)[0].argmax(1)


def class_means(
    net: Network, pixels: Pixels, exemplars: Sequence[Tensor], mirrored: bool = True, ranks: Ranks = ALONE
) -> Tensor:
    """The direction of each class: its exemplars' mean unit embedding.

    iCaRL, https://arxiv.org/abs/1611.07725, algorithm 1. Mirror images count as well if training mirrors; the code of
    iCaRL, and of all that stem from it, lets them count always, and always mirrors in training.

    Args:
        exemplars: indices, one tensor a class.
        mirrored: whether mirror images count at all.
        ranks: the processes among which images are shared out, here and below.

    Returns:
        Unit vectors (classes, dim).
    """
    means, mirrorings = [], (False, True) if pixels.augmentation.flip and mirrored else (False,)
    for indices in exemplars:
        ways = [_embedded(net, pixels, indices, ranks, flip) for flip in mirrorings]
        means.append(F.normalize(torch.cat(ways), dim=1).mean(0))
    return F.normalize(torch.stack(means), dim=1)


def embed(net: Network, pixels: Pixels, ranks: Ranks = ALONE) -> Callable[[Tensor], Tensor]:
    """A function from indices (n,) to embeddings (n, dim)."""
    return lambda indices: _embedded(net, pixels, indices, ranks)


def _embedded(net: Network, pixels: Pixels, indices: Tensor, ranks: Ranks, mirrored: bool = False) -> Tensor:
    own = torch.cat([embedding for embedding, _ in _in_batches(net, pixels, ranks.share(indices), mirrored)])
    return ranks.gather(own, len(indices))


def describe(
    net: Network, pixels: Pixels, store: Callable[[Output], Mapping[str, Tensor]], ranks: Ranks = ALONE
) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function from indices (n,) to what ``store`` makes of the images as they are, (n, width) by name; on CPU."""

    def described(indices: Tensor) -> dict[str, Tensor]:
        net.eval()
        parts: list[Mapping[str, Tensor]] = []
        with torch.no_grad():
            for images in pixels.clean_parts(ranks.share(indices).split(EVALUATION_ROWS)):
                parts.append(store(net(images)))
                if not parts[-1]:
                    return {}
        own = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: ranks.gather(values, len(indices)).cpu() for name, values in own.items()}

    return described


def held_out_loss(net: Network, pixels: Pixels, indices: Tensor, targets: Tensor, ranks: Ranks = ALONE) -> float:
    """Mean cross-entropy over all seen classes on held-out images."""
    own = torch.cat([logits for _, logits in _in_batches(net, pixels, ranks.share(indices))])
    return float(F.cross_entropy(ranks.gather(own, len(indices)), targets))


def scored_images(spec: Spec, indices: Tensor) -> Tensor:
    """The images that count; the released code's loaders drop a last short batch, kept here where there is no other."""
    rows = sum(spec.rows)
    whole = len(indices) // rows * rows
    return indices[:whole] if spec.protocol.test_images == "full" and whole else indices


@dataclass(frozen=True)
class Measured:
    """What a network does on the images of each seen task, all in percent.

    Attributes:
        accuracy: among all classes seen.
        by_head: the same by the network's outputs, whatever classifier fills ``accuracy``.
        confusion: one row a seen task, how many of its images were given a class of each seen task.
        others: ``task_aware``: accuracy among the classes of the image's own task. ``top5``: how often the right class
            is among the five first of all seen. ``ece_old``, ``ece_new``: expected calibration error of the head on
            images of earlier tasks, if there are any, and of the newest.
    """

    accuracy: list[float]
    by_head: list[float]
    confusion: list[list[int]]
    others: dict[str, Any]


def measure(spec: Spec, parts: Assembly, task: Task, means: Tensor | None = None) -> Measured:
    """Scores the test or held-out images of every seen task; see ``predict`` for ``means``."""
    stream, found = parts.stream, Measured([], [], [], {"task_aware": [], "top5": []})
    images, pixels, targets = stream.test, parts.test, stream.test_targets
    if spec.protocol.score == "validation":
        images, pixels, targets = stream.validation, parts.train, stream.targets
    ends = torch.tensor([seen.seen for seen in stream.tasks[: task.index + 1]])
    confidence: list[Tensor] = []
    for seen in stream.tasks[: task.index + 1]:
        indices = scored_images(spec, images(seen))
        right, columns = targets[indices], task.classes(seen.index)
        scores, logits = (part.cpu() for part in _scores(parts.net, pixels, indices, means, parts.ranks))
        predicted = scores.argmax(1)
        head_right = logits.argmax(1) == right
        found.accuracy.append(_percent(predicted == right))
        found.by_head.append(_percent(head_right))
        given = torch.bucketize(predicted, ends, right=True)
        found.confusion.append(torch.bincount(given, minlength=len(ends)).tolist())
        found.others["task_aware"].append(_percent(scores[:, columns].argmax(1) + columns.start == right))
        five = scores.topk(min(5, scores.shape[1])).indices
        found.others["top5"].append(_percent((five == right[:, None]).any(1)))
        sure = logits.softmax(1).amax(1)
        confidence.append(torch.stack([sure, head_right.to(sure)]))
    *old, new = confidence
    for name, parts_of in (("ece_old", old), ("ece_new", [new])):
        if parts_of:
            found.others[name] = 100 * calibration_error(*torch.cat(parts_of, dim=1).numpy())
    return found


def _scores(net: Network, pixels: Pixels, indices: Tensor, means: Tensor | None, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """What decides the class, larger for the likelier ones, and the head's logits; (n, seen) each."""
    batches, count = list(_in_batches(net, pixels, ranks.share(indices))), len(indices)
    logits = ranks.gather(torch.cat([logits for _, logits in batches]), count)
    if means is None:
        return logits, logits
    nearness = torch.cat([-torch.cdist(F.normalize(embedding, dim=1), means) for embedding, _ in batches])
    return ranks.gather(nearness, count), logits


def _percent(correct: Tensor) -> float:
    return 100 * int(correct.sum()) / len(correct)


def measure_accuracy(
    spec: Spec, parts: Assembly, task: Task, means: Tensor | None = None
) -> tuple[list[float], list[list[int]]]:
    """Percent of each seen task's test or held-out images that get the right class, see ``predict``.

    Returns:
        The percents, and, one row a seen task, how many of its images were given a class of each seen task.
    """
    found = measure(spec, parts, task, means)
    return found.accuracy, found.confusion


def measure_classifier(spec: Spec, parts: Assembly, task: Task, exemplars: Sequence[Tensor]) -> Measured:
    """What ``measure`` returns, by the classifier that the spec names.

    Args:
        exemplars: indices, one tensor a class.
    """
    mirrored = spec.protocol.mirrored_means
    means = class_means(parts.net, parts.train, exemplars, mirrored, parts.ranks) if spec.classifier == "nme" else None
    return measure(spec, parts, task, means)
