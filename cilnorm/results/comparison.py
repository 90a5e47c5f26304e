"""Two runs, or two groups of seeds: are they equal to the bit, where do they part, and is one better?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cilnorm.metrics import METRICS, mean_and_deviation, mean_text
from cilnorm.results.reading import NO_SETTING, RunResult, differing, read_result
from cilnorm.storage.run_folder import FolderError

__all__ = ["Comparison", "compare", "first_difference", "gather", "sentence", "tested"]

FEW = 5  # pairs below which a test says little


def gather(place: str) -> list[RunResult]:
    """The runs that an argument names: a run, a folder of runs, or a pattern like ``'cells/ft-bn-*'``.

    Raises:
        FolderError: there is none, or one can't be read, or they differ in more than their seed.
    """
    path = Path(place)
    inside = [path] if path.is_dir() else sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    folders = [folder for each in inside for folder in ([each] if _is_run(each) else sorted(each.glob("*/")))]
    results = [read_result(folder) for folder in folders if _is_run(folder)]
    if not results:
        raise FolderError(f"{place} holds no run")
    others = differing([result.spec for result in results], ("seed", *NO_SETTING))
    if others:
        raise FolderError(f"the runs of {place} differ in {', '.join(others)}; a group differs in its seeds alone")
    if len({result.seed for result in results}) < len(results):
        raise FolderError(f"{place} holds two runs of one seed")
    return results


def _is_run(folder: Path) -> bool:
    return (folder / "spec.yaml").is_file()


# To the bit


def first_difference(one: RunResult, other: RunResult) -> str:
    """Where two runs first part: in their spec, a loss, an accuracy or a weight; empty if they are equal to the bit.

    Raises:
        FolderError: a checkpoint can't be read.
    """
    keys = differing([one.spec, other.spec], NO_SETTING)
    if keys:
        return f"the specs differ in {', '.join(keys)}"
    mine, theirs = list(_history(one)), list(_history(other))
    for (where, facts), (where_other, facts_other) in zip(mine, theirs, strict=False):
        if where != where_other:
            return f"{where} of {one.folder} stands against {where_other} of {other.folder}"
        for name in {**facts, **facts_other}:
            left, right = facts.get(name), facts_other.get(name)
            if not _same(left, right):
                return f"{where}: {name} is {left!r} and {right!r}"
    if len(mine) != len(theirs):
        short, told = (one, theirs[len(mine)]) if len(mine) < len(theirs) else (other, mine[len(theirs)])
        return f"{told[0]}: {short.folder} ends before it"
    return _weights_part(one.folder, other.folder)


def _same(left: Any, right: Any) -> bool:
    nan = isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right)
    return nan or left == right


def _history(result: RunResult) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a run computed, in the order of time."""
    epochs = iter(result.epochs)
    epoch = next(epochs, None)
    for task, row in enumerate([*result.matrix, []], 1):
        while epoch is not None and epoch["task"] <= task:
            where = f"task {epoch['task']}, phase {epoch['phase']}, epoch {epoch['epoch']}"
            terms = {f"the term {name!r}": value for name, value in epoch["terms"].items()}
            yield where, {"the learning rate": epoch["lr"], "the number of steps": epoch["steps"], **terms}
            epoch = next(epochs, None)
        if row:
            yield f"after task {task}", {f"the accuracy on task {u}": value for u, value in enumerate(row, 1)}


def _weights_part(one: Path, other: Path) -> str:
    import torch

    mine, theirs = _weights(one), _weights(other)
    if set(mine) != set(theirs):
        return f"the last checkpoints hold different weights: {', '.join(sorted(set(mine) ^ set(theirs)))}"
    for name, tensor in mine.items():
        left, right = tensor, theirs[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            return f"the last checkpoints: {name} has another shape or type"
        if not torch.equal(_bits(left), _bits(right)):
            count = int((_bits(left) != _bits(right)).sum())
            return f"the last checkpoints: {count} of {left.numel()} values of {name} differ"
    return ""


def _bits(tensor: Any) -> Any:
    import torch

    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(whole[tensor.element_size()]) if tensor.is_floating_point() else tensor


def _weights(folder: Path) -> dict[str, Any]:
    from cilnorm.storage.tensor_file import DamagedFile, read_tensor_file

    path = folder / "checkpoints" / "last.pt"
    try:
        weights: dict[str, Any] = read_tensor_file(path)["net"]
    except (DamagedFile, OSError, KeyError) as error:
        raise FolderError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    return weights


# Over seeds


@dataclass(frozen=True)
class Comparison:
    """One metric of two groups; numbers are None where there are too few seeds for them.

    Attributes:
        one, other: values in percent; paired by seed where ``paired``.
        seeds: of the pairs; of all runs where they are not paired.
        difference: mean of ``other`` less mean of ``one``, in points.
        low, high: 95 % confidence interval of the difference.
        t, p, freedom: of the paired t-test, or of Welch's where the seeds differ.
        effect: Cohen's d_z, the mean difference in units of the differences' deviation; without pairs, Cohen's d.
    """

    metric: str
    one: tuple[float, ...]
    other: tuple[float, ...]
    seeds: tuple[int, ...]
    paired: bool
    difference: float
    low: float | None = None
    high: float | None = None
    t: float | None = None
    p: float | None = None
    freedom: float | None = None
    effect: float | None = None


def compare(one: Sequence[RunResult], other: Sequence[RunResult]) -> list[Comparison]:
    """Every metric, paired by seed if two seeds or more are in both groups.

    Raises:
        FolderError: a run is not finished, so that there is nothing to compare.
    """
    for result in (*one, *other):
        if result.summary.get("state") != "finished":
            raise FolderError(f"{result.folder} is not finished; `cilnorm resume {result.folder}` goes on")
    mine, theirs = ({result.seed: result.summary for result in group} for group in (one, other))
    common = tuple(sorted(set(mine) & set(theirs)))
    paired = len(common) > 1 or (len(mine) == len(theirs) == len(common))
    seeds = (common, common) if paired else (tuple(mine), tuple(theirs))
    return [
        tested(
            metric,
            tuple(float(mine[seed][metric]) for seed in seeds[0]),
            tuple(float(theirs[seed][metric]) for seed in seeds[1]),
            seeds[0] if paired else tuple(sorted({*seeds[0], *seeds[1]})),
            paired,
        )
        for metric in METRICS
    ]


def tested(
    metric: str, one: tuple[float, ...], other: tuple[float, ...], seeds: tuple[int, ...], paired: bool
) -> Comparison:
    """The t-test of two groups of values in percent, in the order of ``seeds`` where they are paired."""
    from scipy import stats

    apart = mean_and_deviation(other)[0] - mean_and_deviation(one)[0]
    differences = [b - a for a, b in zip(one, other, strict=True)] if paired else []
    enough = len(differences) > 1 if paired else min(len(one), len(other)) > 1
    varies = enough and (_deviation(differences) > 1e-9 if paired else _pooled(one, other) > 1e-9)
    if not varies:
        return Comparison(metric, one, other, seeds, paired, apart)
    test = stats.ttest_rel(other, one) if paired else stats.ttest_ind(other, one, equal_var=False)
    interval = test.confidence_interval(0.95)
    effect = apart / (_deviation(differences) if paired else _pooled(one, other))
    numbers = map(float, (interval.low, interval.high, test.statistic, test.pvalue, test.df, effect))
    return Comparison(metric, one, other, seeds, paired, apart, *numbers)


def _deviation(values: Sequence[float]) -> float:
    return mean_and_deviation(values)[1] or 0.0


def _pooled(one: Sequence[float], other: Sequence[float]) -> float:
    return math.sqrt((_deviation(one) ** 2 + _deviation(other) ** 2) / 2)


def sentence(found: Comparison, one: str, other: str) -> str:
    """What may be said of a comparison, as one would write it in a paper, its limits included."""
    text = f"{other} reaches {found.metric} {_value(found.other)} against {_value(found.one)} of {one}"
    text += f", {found.difference:+.2f} points"
    if found.t is None or found.p is None:
        if max(len(found.one), len(found.other)) == 1 or not found.seeds:
            return f"{text}, in one run each: nothing can be said about chance; run more seeds."
        if min(len(found.one), len(found.other)) == 1:
            return f"{text}: a group of one run allows no test; run the same seeds of both."
        return f"{text}, the same for every seed: no test applies."
    many = f"over {len(found.seeds)} paired seeds" if found.paired else "over unpaired seeds"
    name = "paired t-test" if found.paired else "Welch's t-test"
    text += f" {many} (95 % CI {found.low:.2f} to {found.high:.2f}; {name}, t({found.freedom:.3g}) = {found.t:.2f}, "
    text += f"{_p(found.p)}, {'d_z' if found.paired else 'd'} = {found.effect:.2f})"
    text += ": unlikely to be chance" if found.p < 0.05 else ": not distinguishable from chance"
    text += " at the 5 % level."
    least = len(found.seeds) if found.paired else min(len(found.one), len(found.other))
    if least < FEW:
        text += f" With {least} seeds the normality that the test assumes can't be checked; {FEW} or more are better."
    return text


def _value(values: Sequence[float]) -> str:
    return f"{mean_text(values)} %"


def _p(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
