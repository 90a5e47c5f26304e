"""
A norm of one's own in a plain loop
===================================

A norm that is told which rows of a batch are past ones takes a dozen lines. This one lets past rows carry a given share
of the statistics, however few they are; a loop without any of cilnorm's protocol trains with it.
"""

import matplotlib.pyplot as plt
import torch
from small_stream import COLOURS, TASKS, learn, network
from torch import Tensor, nn

import cilnorm
from cilnorm.hookspecs import Norm
from cilnorm.rows_aware import RowsAware

# %%
# The layer
# ---------
# ``take`` returns what was told of the rows of this very batch. In evaluation it is batch norm.


class SharedBatchNorm2d(nn.BatchNorm2d, RowsAware):
    """Batch norm of (N, C, H, W) in whose statistics past rows together weigh ``share``, current ones the rest."""

    def __init__(self, num_features: int, *, share: float = 0.5, **keywords: object) -> None:
        super().__init__(num_features, **keywords)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        past = self.take(x).rows.past
        counts = past.sum(), (~past).sum()
        share = self.share if min(counts) > 0 else past.float().mean()
        weights = torch.where(past, share / counts[0].clamp(min=1), (1 - share) / counts[1].clamp(min=1))
        mean = torch.einsum("n,nchw->c", weights, x) / x[0, 0].numel()
        centred = x - mean[:, None, None]
        var = torch.einsum("n,nchw->c", weights, centred.square()) / x[0, 0].numel()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return centred * (var + self.eps).rsqrt()[:, None, None] * self.weight[:, None, None] + self.bias[:, None, None]


record = Norm("shared", SharedBatchNorm2d, needs_rows=True)

# %%
# Training
# --------
# ``convert_norms`` takes a record as well as a name, so nothing need be installed. The loop tells the rows of each
# batch with ``cilnorm.rows``.

curves = {}
for share in (0.2, 0.8):
    torch.manual_seed(0)
    net = cilnorm.convert_norms(network(), record, share=share)
    curves[share] = [sum(row) / len(row) for row in learn(net)]
    print(f"share {share}:", *(f"{value:5.1f}" for value in curves[share]))

# %%
# One seed each: enough to see that it trains. To be chosen by ``--norm`` and held to what cilnorm promises, it
# becomes a package: the tutorial "A norm of your own".

figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
for (share, values), marker, colour in zip(curves.items(), "os", COLOURS, strict=False):
    axes.plot(range(1, TASKS + 1), values, marker=marker, color=colour, label=f"past rows weigh {share}")
axes.set(xticks=range(1, TASKS + 1), xlabel="tasks learned", ylabel="accuracy in %, mean over tasks", ylim=(0, 100))
axes.legend()
plt.show()
