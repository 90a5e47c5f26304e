"""Class-balanced batch normalisation: averages a class, and normalisation by the mean over classes.

Of every class k the layer keeps a mean μ_k and a variance σ²_k. A batch with n_k > 0 rows of it moves them by

    a_k = min(η, 1 / n_k),   s_k = a_k Σ_{j∈k} mean(x_j − μ_k),   q_k = a_k Σ_{j∈k} mean (x_j − μ_k)²
    μ_k += (1 − Γ) s_k + Γ s̄,   σ²_k += (1 − Γ) (q_k − a_k n_k σ²_k − s_k²)

and then σ²_k += Γ (mean(q − s²) − mean(a n) σ²_k), where means are over the classes present: Γ moves absent ones too.
Then, in training as in evaluation,

    y = γ · (x − μ) / √(σ² + ε) + β,   μ = mean_k μ_k,   σ² = mean_k σ²_k + var_k μ_k (unbiased)

so y depends on a batch through these averages alone; gradients go through what this step added to them.

Su, Xu and Jia, "Towards Real-World Test-Time Adaptation: Tri-Net Self-Training with Balanced Normalization", AAAI 2024,
https://arxiv.org/abs/2309.14949, where it adapts a trained network to a stream of images; nobody published it for
class-incremental learning. Two departures make it fit for that, and can be switched off. The released code takes the
mean over all K classes from the start, nine tenths of them unseen in the first of ten tasks: ``over="seen"`` leaves
them out. And a class begins with the moments of its first rows instead of whatever was there: ``start="batch"``. With
``by="tasks"`` tasks take the place of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm.rows_aware import Rows, RowsAware, recomputing
from cilnorm_norms._base import BatchDependent, Ranks, check_images
from cilnorm_norms._row_moments import normalise

Over = Literal["seen", "all"]
Start = Literal["batch", "kept"]
By = Literal["classes", "tasks"]
Variant = Literal["v5", "ema"]
Unlabelled = Literal["error", "batch"]
NAME = "cbbn"


class _Averages(NamedTuple):
    """What the layer keeps: moments (K, C) of classes, whether rows of them were seen (K,), moments (C,) over all."""

    mean: Tensor
    var: Tensor
    seen: Tensor
    all_mean: Tensor
    all_var: Tensor


class _Labels(NamedTuple):
    """Class of each row (N,), and 1 where a row is of a class (K, N)."""

    ids: Tensor
    member: Tensor


class ClassBalancedBatchNorm2d(BatchDependent, RowsAware):
    """Class-balanced batch normalisation of (N, C, H, W), https://arxiv.org/abs/2309.14949.

    In training it must be told the label of every row (``cilnorm.rows(..., labels=...)``). Parameters ``weight`` γ and
    ``bias`` β (C,); buffers ``local_mean``, ``local_var`` (K, C), ``global_mean``, ``global_var`` (C,), and ``seen``
    (K,), rows seen of each class. Loads the state of a ``BatchNorm2d``, from whose averages every class then starts.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum (η): weight of a row in the averages of its class; the authors use 0.01 for 10 classes, 0.05 for 100.
        affine: whether there are γ and β.
        track_running_stats: must be True, for the layer is made of its averages.
        device, dtype: of parameters and buffers.
        spread (Γ): how much of a step all classes share; the authors try 0, 0.1 and 0.5.
        over: which classes the mean is over: those ``seen``, or ``all`` as in the released code.
        start: where a class begins: with the moments of its first rows (``batch``), or with what was there as in the
            released code (``kept``).
        by: what averages are kept of: ``classes``, or ``tasks`` in their place.
        variant: the step size. ``v5``: as above; ``ema``: a_k = η / (n_k + 1e-5), so that a step moves a class by η
            whatever n_k, and no Γ.
        unlabelled: what a batch without labels does: an ``error``, or it moves the global averages alone (``batch``,
            as in the released code).
        classes (K): classes (or tasks) at most.

    Raises:
        ValueError: another option than these, a label of K or more (looked at on the CPU), no labels, an input that
            isn't (N, C, H, W).
        RuntimeError: training without knowing the rows.
    """

    needs_rows = True
    local_mean: Tensor
    local_var: Tensor
    global_mean: Tensor
    global_var: Tensor
    seen: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.05,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spread: float = 0.1,
        over: Over = "seen",
        start: Start = "batch",
        by: By = "classes",
        variant: Variant = "v5",
        unlabelled: Unlabelled = "error",
        classes: int = 100,
    ) -> None:
        super().__init__()
        if not track_running_stats:
            raise ValueError(f"{NAME} is made of its averages; track_running_stats can't be False")
        options = (
            ("over", over, Over),
            ("start", start, Start),
            ("by", by, By),
            ("variant", variant, Variant),
            ("unlabelled", unlabelled, Unlabelled),
        )
        for name, value, among in options:
            if value not in get_args(among):
                raise ValueError(f"{name} can't be {value!r}; it is one of {get_args(among)}")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.spread, self.over, self.start, self.by = spread, over, start, by
        self.variant, self.unlabelled, self.classes = variant, unlabelled, classes

        def empty(*size: int) -> Tensor:
            return torch.empty(*size, device=device, dtype=dtype)

        self.weight = nn.Parameter(empty(num_features)) if affine else None
        self.bias = nn.Parameter(empty(num_features)) if affine else None
        for name in ("local_mean", "local_var"):
            self.register_buffer(name, empty(classes, num_features))
        for name in ("global_mean", "global_var"):
            self.register_buffer(name, empty(num_features))
        self.register_buffer("seen", torch.zeros(classes, device=device, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ and the variances 1, everything else 0."""
        for ones in (self.weight, self.local_var, self.global_var):
            if ones is not None:
                nn.init.ones_(ones)
        for zeros in (self.bias, self.local_mean, self.global_mean, self.seen):
            if zeros is not None:
                nn.init.zeros_(zeros)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for kind in ("mean", "var"):
            average = state_dict.pop(f"{prefix}running_{kind}", None)
            if average is not None:
                state_dict[f"{prefix}global_{kind}"] = average
                state_dict[f"{prefix}local_{kind}"] = average.expand(self.classes, -1)
                state_dict[f"{prefix}seen"] = torch.zeros_like(self.seen)
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def reduce(self, rows: Rows) -> _Labels | None:
        ids = rows.labels if self.by == "classes" else rows.tasks
        if ids is None:
            if self.unlabelled == "error":
                named = "labels" if self.by == "classes" else "tasks"
                raise ValueError(f"{NAME} needs the {named[:-1]} of each row: tell {named}=")
            return None
        ranks = self.ranks() if self.synchronised else None
        key = NAME, self.by, self.classes, ranks and id(ranks.group)
        return rows.once(key, lambda: self._of_labels(ids, ranks))

    def _of_labels(self, ids: Tensor, ranks: Ranks | None) -> _Labels:
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < self.classes:
            raise ValueError(
                f"{NAME} was built for {self.classes} {self.by}; told of {int(ids.min())} to {int(ids.max())}: "
                "set classes="
            )
        if ranks:
            ids = ranks.gather(ids).flatten()
        every = torch.arange(self.classes, device=ids.device)
        return _Labels(ids, (ids == every[:, None]).to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        if not self.training:
            return F.batch_norm(x, self.global_mean, self.global_var, self.weight, self.bias, False, 0.0, self.eps)
        told = self.take(x)
        labels: _Labels | None = told.reduced
        if not recomputing():
            # What the step starts from; a repeated pass must start from there again.
            told.kept = _Averages(*(b.clone() for b in self._buffers_in_order()))
        before: _Averages = told.kept

        def algebra(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
            after = self._moved(before, labels, mean, var)
            scale = torch.rsqrt(after.all_var + self.eps)
            if weight is not None:
                scale = scale * weight.to(scale.dtype)
            shift = scale * (mean - after.all_mean)
            if bias is not None:
                shift = shift + bias.to(scale.dtype)
            return scale[None], shift, *(moment.detach() for moment in after)

        y, *after = normalise(x, algebra, self.ranks(), self.weight, self.bias)
        if not recomputing():
            with torch.no_grad():
                for buffer, value in zip(self._buffers_in_order(), after, strict=True):
                    buffer.copy_(value)
        return y

    def _buffers_in_order(self) -> _Averages:
        return _Averages(self.local_mean, self.local_var, self.seen, self.global_mean, self.global_var)

    def _moved(self, before: _Averages, labels: _Labels | None, mean: Tensor, var: Tensor) -> _Averages:
        """The averages after a step on rows of these moments (N, C)."""
        dtype = mean.dtype
        if labels is None:
            of_all = mean.mean(0)
            of_var = (var + (mean - of_all).square()).mean(0)
            return before._replace(
                all_mean=torch.lerp(before.all_mean.to(dtype), of_all, self.momentum),
                all_var=torch.lerp(before.all_var.to(dtype), of_var, self.momentum),
            )
        member = labels.member.to(dtype)
        count = member.sum(1, keepdim=True)  # (K, 1)
        new = (count > 0) & (before.seen[:, None] == 0) if self.start == "batch" else torch.zeros_like(count) > 0
        local_mean, local_var = self._steps(before, labels.ids, member, count, new, mean, var)
        if self.start == "batch":
            own = member @ mean / count.clamp(min=1)
            own_var = member @ (var + (mean - own[labels.ids]).square()) / count.clamp(min=1)
            local_mean, local_var = torch.where(new, own, local_mean), torch.where(new, own_var, local_var)
        seen = before.seen + count[:, 0].long()
        among = (seen > 0)[:, None].to(dtype) if self.over == "seen" else torch.ones_like(count)
        all_mean = (among * local_mean).sum(0) / among.sum()
        between = (among * (local_mean - all_mean).square()).sum(0) / (among.sum() - 1).clamp(min=1)
        return _Averages(local_mean, local_var, seen, all_mean, (among * local_var).sum(0) / among.sum() + between)

    def _steps(
        self, before: _Averages, ids: Tensor, member: Tensor, count: Tensor, new: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The classes' moments (K, C) after the step, those aside that begin with it."""
        old_mean, old_var = before.mean.to(mean.dtype), before.var.to(mean.dtype)
        present = ((count > 0) & ~new).to(mean.dtype)
        if self.variant == "v5":
            rate, shared = torch.where(count * self.momentum > 1, 1 / count.clamp(min=1), self.momentum), self.spread
        else:
            rate, shared = self.momentum / (count + 1e-5), 0.0
        from_old = mean - old_mean[ids]
        s = present * rate * (member @ from_old)
        q = present * rate * (member @ (var + from_old.square()))
        weight = present * rate * count
        local_mean = old_mean + (1 - shared) * s
        local_var = old_var + (1 - shared) * (q - weight * old_var - s.square())
        if shared:
            classes = present.sum().clamp(min=1)
            local_mean = local_mean + shared * s.sum(0) / classes
            pull = ((q - s.square()).sum(0) - weight.sum() * local_var) / classes
            local_var = local_var + shared * pull
        return local_mean, local_var

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}, "
            f"spread={self.spread}, over={self.over}, start={self.start}, by={self.by}, variant={self.variant}, "
            f"unlabelled={self.unlabelled}, classes={self.classes}"
        )


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm(NAME, ClassBalancedBatchNorm2d, paper="https://arxiv.org/abs/2309.14949", needs_rows=True)]
