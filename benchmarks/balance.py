"""What of task-balanced batch norm does what: norms between it and batch norm, trained as any other.

    python -m benchmarks.balance ghost --seed 0 --out RUN
    python -m benchmarks.balance weighted --method lucir --seed 0 --out RUN

``ghost``: batch norm whose statistics come from a part of the batch's rows, as many as the weights of ``splits=exact``
amount to (1 / Σ w²: 20 of 64 for ten tasks), three current ones to a past one. Few rows, no balance.

``weighted``: the weights that the released splits give to current and past rows, in the moments of all rows together.
Balance as in TBBN, no splits.

``split``: the released splits, and in each the mixture of the whole batch: a current row weighs as much more as a split
has fewer of them. Splits as in TBBN, no balance; ``--norm bn+splits`` is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cilnorm
from cilnorm.batch import Composition, CompositionAware
from cilnorm.experiment.runner import Result
from cilnorm.hookspecs import Norm
from cilnorm.spec import resolve
from cilnorm.testing.toys import registry_with
from cilnorm_norms._base import BatchNormBase
from cilnorm_norms._task_balanced.function import Plan
from cilnorm_norms.split_batch import SplitBatchNorm2d
from cilnorm_norms.task_balanced import TaskBalancedBatchNorm2d


class Ghost(BatchNormBase, CompositionAware):
    """Batch norm by the statistics of some rows. Rows of either kind are in random order, so the first ones will do."""

    chosen: tuple[int, ...] = ()

    def compose(self, composition: Composition) -> None:
        self.chosen = ()
        if composition.past:
            new = 1 / (composition.task + 1)  # the newest task's weight in balanced statistics
            rows = 1 / (new**2 / composition.current + (1 - new) ** 2 / composition.past)
            current, past = (
                round(rows / composition.rows * count) for count in (composition.current, composition.past)
            )
            self.chosen = (*range(current), *range(composition.current, composition.current + past))

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.chosen):
            return self.batch_norm(x)
        some = x[list(self.chosen)]
        var, mean = torch.var_mean(some, (0, 2, 3), correction=0)
        each = some.numel() / some.shape[1]
        self.track(mean, var * each / (each - 1))
        scale = self.weight * (var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class Weighted(TaskBalancedBatchNorm2d):
    """TBBN with the weights of its released splits and without splits."""

    def _plan_of(self, composition: Composition) -> Plan:
        plan = super()._plan_of(composition)
        return replace(plan, splits=1, weight=1 / plan.splits)


NORMS = {"ghost": Ghost, "weighted": Weighted, "split": SplitBatchNorm2d}


def run(norm: str, out: Path, *, device: str = "auto", data_root: Path | None = None, **asked: Any) -> Result:
    """One run in the folder ``out``; ``asked`` as ``cilnorm.resolve`` takes it."""
    known = registry_with("norm", Norm(norm, NORMS[norm], composition_aware=True))
    spec = resolve(registry=known, norm=norm, **asked)
    return cilnorm.run(spec, out, device=device, data_root=data_root, registry=known)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("norm", choices=list(NORMS))
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--method", default="ft")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    result = run(**vars(parser.parse_args(argv)))
    print("  ".join(f"{name} {result.summary[name]:.2f}" for name in ("A_f", "A_a", "F", "A_l")))


if __name__ == "__main__":
    main()
