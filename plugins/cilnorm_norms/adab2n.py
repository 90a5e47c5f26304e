"""AdaB²N: batch normalisation that learns how much each task weighs in the statistics.

    w_k = (e^ψ_k + n_k) / Σ_l (e^ψ_l + n_l),   a_j = w_k(j) / n_k(j)
    m = Σ_j a_j m_j,   v = Σ_j a_j (v_j + (m_j − m)²),   y = γ · (x − m) / √(v + ε) + β

over the rows j of a batch, of moments m_j and v_j, n_k of them of task k; ψ_k is a parameter, e^ψ the prior of a
Dirichlet distribution over the t + 1 tasks met so far. Running averages follow m and v at the rate

    η_1 = momentum^κ,   η_n = η_{n-1} / (η_{n-1} + (1 − momentum)^κ)

which is a constant one for κ = 1 and an average over all steps for κ = 0. To the loss comes

    λ · Σ_layers mean_C (m − r_m)² + mean_C (v − r_v)²,   r_m and r_v the averages after this step

Lyu et al., "Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and Adaptation", NeurIPS
2023, https://arxiv.org/abs/2310.08855. In the first task, and in evaluation, it is batch normalisation.

The defaults follow the released code. There the weight of a task that a batch has no row of is lost, so that the a_j
sum to less than 1, and the running variance is the biased one; ``absent`` and ``variance`` correct that. It counts the
steps of η from the layer's construction, so that a resumed run overwrites its averages; here the count is a buffer,
and that of a converted batch norm is taken over. Its ψ is as long as the run has tasks; here it is longer, which
changes nothing: ψ of tasks to come has no effect and no gradient. Weight decay leaves ψ alone unless ``decay`` is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm.rows_aware import Rows, RowsAware, Told, recomputing
from cilnorm_norms._base import BatchNormBase, Ranks, check_images
from cilnorm_norms._row_moments import normalise

Absent = Literal["lost", "redistributed"]
Variance = Literal["biased", "unbiased"]
NAME = "adab2n"


class _Tasks(NamedTuple):
    """Rows reduced to what the layer computes with.

    Attributes:
        first: whether it is the first task.
        wants_term: whether the loss is to have the term.
        part (T, N): 1 / n_k for the rows of task k, else 0.
        rows (T,): n_k.
        met (T,): whether a task has been met.
    """

    first: bool
    wants_term: bool
    part: Tensor
    rows: Tensor
    met: Tensor


@dataclass(frozen=True, eq=False)
class _Algebra:
    """Scale (1, C) and shift (N, C) of the rows, and m and v (C,), from the moments (N, C) of the rows."""

    tasks: _Tasks
    absent: Absent
    eps: float

    def __call__(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, prior: Tensor
    ) -> tuple[Tensor, ...]:
        return self.forward(mean, var, weight, bias, prior)[0]

    def forward(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, prior: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """The same, and what ``gradient`` needs."""
        share, mass = self._shares(prior, mean)
        of_row = share @ self.tasks.part.to(mean.dtype)
        if self.tasks.first:
            of_row = torch.full_like(of_row, 1 / len(mean)) + 0 * of_row  # a gradient, if only of zeros
        m = of_row @ mean
        centred = mean - m
        around = torch.addcmul(var, centred, centred)
        v = of_row @ around
        inverse = torch.rsqrt(v + self.eps)
        scale = inverse if weight is None else inverse * weight.to(inverse.dtype)
        shift = scale * centred
        if bias is not None:
            shift = shift + bias.to(scale.dtype)
        return (scale[None], shift, m, v), (mean, centred, around, inverse, of_row, share, mass, prior, weight, bias)

    def gradient(
        self,
        kept: Sequence[Tensor | None],
        of_scale: Tensor,
        of_shift: Tensor,
        of_m: Tensor | None = None,
        of_v: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Of mean and var (N, C), γ and β (C,) and ψ (T,), from those of scale and shift (N, C), m and v (C,)."""
        mean, centred, around, inverse, of_row, share, mass, prior = (each for each in kept[:-2] if each is not None)
        weight, bias = kept[-2:]
        of_scale = torch.addcmul(of_scale, of_shift, centred).sum(0)
        dweight = None if weight is None else (of_scale * inverse).to(weight.dtype)
        dbias = None if bias is None else of_shift.sum(0).to(bias.dtype)
        gamma = torch.ones_like(inverse) if weight is None else weight.to(inverse.dtype)
        dv = of_scale * gamma * inverse.pow(3) * -0.5
        dv = dv if of_v is None else dv + of_v
        dvar = of_row[:, None] * dv
        of_centred = torch.addcmul(of_shift * (inverse * gamma), dvar, centred, value=2)
        dm = -of_centred.sum(0)
        dm = dm if of_m is None else dm + of_m
        dmean = torch.addcmul(of_centred, of_row[:, None], dm)
        if self.tasks.first:
            return dmean, dvar, dweight, dbias, torch.zeros_like(prior)
        of_share = self.tasks.part.to(mean.dtype) @ (mean @ dm + around @ dv)
        of_mass = (of_share - share @ of_share) / mass.sum()
        dprior = torch.where(self._counted(), of_mass * prior.to(of_mass.dtype).exp(), 0.0)
        return dmean, dvar, dweight, dbias, dprior.to(prior.dtype)

    def _shares(self, prior: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """w (T,), and e^ψ + n, of which it is the shares."""
        mass = prior.to(like.dtype).exp() + self.tasks.rows.to(like.dtype)
        mass = torch.where(self._counted(), mass, 0.0)
        return mass / mass.sum(), mass

    def _counted(self) -> Tensor:
        """The tasks that have a share in the weights (T,)."""
        return self.tasks.met if self.absent == "lost" else self.tasks.met & (self.tasks.rows > 0)


class AdaptiveBalanceBatchNorm2d(BatchNormBase, RowsAware):
    """AdaB²N of (N, C, H, W), https://arxiv.org/abs/2310.08855.

    In training it must be told the task of every row (``cilnorm.rows(..., tasks=...)``); after one learned task, past
    or not is enough. State of ``BatchNorm2d``, and besides ``task_weight`` ψ (T,) and ``updates``, the steps of η.

    Args:
        num_features: C.
        momentum: weight of a step in the running averages at κ = 1; None is κ = 0.
        kappa (κ): how far the running averages go from an average over all steps (0) to a constant rate (1); the paper
            tries 0.1, 0.4, 0.7 and 1.
        strength (λ): weight of the term in the loss; the paper tries 0.01 to 10. 0 for none.
        strength_from: tasks learned before the term is first added; the paper tries 0 and 1.
        absent: what becomes of the weight of tasks that a batch has no row of. ``lost``: as in the released code;
            ``redistributed``: w is normalised over the tasks in the batch.
        variance: of the running average: ``biased`` as in the released code, or ``unbiased`` as in ``BatchNorm2d``.
        decay: whether weight decay acts on ψ too, which pulls the prior towards one row a task.
        tasks (T): tasks at most.

    Raises:
        ValueError: another option than these, more tasks than T, tasks of rows not told, or an input that isn't
            (N, C, H, W).
        RuntimeError: training without knowing the rows; a term that reentrant activation checkpointing would lose.
    """

    needs_rows = True
    updates: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kappa: float = 0.4,
        strength: float = 0.1,
        strength_from: int = 1,
        absent: Absent = "lost",
        variance: Variance = "biased",
        decay: bool = False,
        tasks: int = 100,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not 0 <= kappa <= 1:
            raise ValueError(f"kappa is a number in [0, 1], not {kappa}")
        for name, value, among in (("absent", absent, Absent), ("variance", variance, Variance)):
            if value not in get_args(among):
                raise ValueError(f"{name} can't be {value!r}; it is one of {get_args(among)}")
        self.kappa, self.strength, self.strength_from = kappa, strength, strength_from
        self.absent, self.variance, self.decay, self.tasks = absent, variance, decay, tasks
        self.bessel = variance == "unbiased"
        self.task_weight = nn.Parameter(torch.zeros(tasks, device=device, dtype=dtype))
        counted = torch.zeros((), dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("updates", counted)

    @property
    def without_decay(self) -> tuple[str, ...]:
        """Parameters that weight decay leaves alone."""
        return () if self.decay else ("task_weight",)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Takes the state of a ``BatchNorm2d`` as well: its averages are as old as it has seen batches."""
        batches = state_dict.get(f"{prefix}num_batches_tracked")
        if batches is not None:
            state_dict.setdefault(f"{prefix}updates", batches)
            state_dict.setdefault(f"{prefix}task_weight", self.task_weight.detach())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def reduce(self, rows: Rows) -> _Tasks:
        if rows.task >= self.tasks:
            raise ValueError(f"{NAME} was built for {self.tasks} tasks; this is number {rows.task + 1}: set tasks=")
        wants_term = bool(self.strength) and rows.task >= self.strength_from and self.running_mean is not None
        ranks = self.ranks() if self.synchronised else None
        key = NAME, self.tasks, ranks and id(ranks.group)
        return _Tasks(not rows.task, wants_term, *rows.once(key, lambda: self._of_tasks(rows, ranks)))

    def _of_tasks(self, rows: Rows, ranks: Ranks | None) -> tuple[Tensor, Tensor, Tensor]:
        tasks = rows.tasks
        if tasks is None:
            if rows.task > 1:
                raise ValueError(f"{NAME} needs the task of each row: tell tasks=")
            tasks = rows.task - rows.past.long()
        if ranks:
            tasks = ranks.gather(tasks).flatten()
        every = torch.arange(self.tasks, device=tasks.device)
        member = (tasks == every[:, None]).to(torch.float64)
        count = member.sum(1)
        return member / count.clamp(min=1)[:, None], count, every <= rows.task

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        if not self.training:
            return self.batch_norm(x)
        told = self.take(x)
        tasks: _Tasks = told.reduced
        y, mean, var = normalise(
            x, _Algebra(tasks, self.absent, self.eps), self.ranks(), self.weight, self.bias, self.task_weight
        )
        if self.running_mean is None or self.running_var is None:
            return y
        if recomputing():
            averages = self._as_before(told, tasks)
        else:
            self._move(mean.detach(), var.detach(), tasks.part.shape[1] * x.shape[2] * x.shape[3])
            averages = told.kept = (self.running_mean.clone(), self.running_var.clone(), mean.requires_grad)
        if tasks.wants_term:
            # A repeated pass computes it again, for checkpointing wants as many tensors saved as the first time.
            term = (mean - averages[0]).square().mean() + (var - averages[1]).square().mean()
            if not recomputing():
                told.telling.add_term(NAME, self.strength * term)
        return y

    def _as_before(self, told: Told, tasks: _Tasks) -> tuple[Tensor, Tensor, bool]:
        """The averages that the first pass compared its statistics to."""
        averages = told.kept
        if tasks.wants_term and not averages[2] and told.telling.taken[0]:
            raise RuntimeError(
                f"checkpoint(..., use_reentrant=True) keeps no graph of the first pass, so {NAME}'s term of the loss "
                "would have no gradient; use_reentrant=False keeps it"
            )
        return averages

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Moves the averages towards m and v (C,)."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        self.updates.add_(1)
        dtype = self.running_mean.dtype
        if self.variance == "unbiased":
            var = var * (count / max(count - 1, 1))
        rate = self._rate().to(dtype)
        self.running_mean.lerp_(mean.to(dtype), rate)
        self.running_var.lerp_(var.to(dtype), rate)

    def _rate(self) -> Tensor:
        """η of this step, float64, from the counter on the device; the recursion in closed form."""
        assert self.num_batches_tracked is not None
        if self.momentum is None or self.kappa == 0:
            return self.num_batches_tracked.double().reciprocal()
        kept = (1 - self.momentum) ** self.kappa
        limit = 1 / (1 - kept) if kept < 1 else 1.0
        return (limit + kept ** (self.updates.double() - 1) * (self.momentum**-self.kappa - limit)).reciprocal()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, kappa={self.kappa}, strength={self.strength}, "
            f"strength_from={self.strength_from}, absent={self.absent}, variance={self.variance}, "
            f"decay={self.decay}, tasks={self.tasks}"
        )


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm(NAME, AdaptiveBalanceBatchNorm2d, paper="https://arxiv.org/abs/2310.08855", needs_rows=True)]
