"""In which precision the arithmetic of a run is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor

from cilnorm.network import Network, Output

__all__ = ["Precision", "choose_precision", "default_type", "forward", "matmul_precision"]

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp64"]
AMPERE = (8, 0)  # the first GPUs that know tf32


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """What ``auto`` means on a device: tf32 where there is such a thing, else fp32."""
    if name != "auto":
        return name
    return "tf32" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE else "fp32"


@contextmanager
def default_type(precision: Precision) -> Iterator[None]:
    """Inside, what is made without saying of which type is of float64 with ``fp64``: network, images and all else.

    For comparisons: rounding, which differs between processors and with the number of processes, then stays small.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if precision == "fp64" else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Inside, products of float32 matrices and convolutions on a GPU are rounded to tf32, or are not (fp32).

    The older of torch's two interfaces to these switches, for it is the one that every supported version has.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision not in ("fp32", "fp64")
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def forward(net: Network, images: Tensor, precision: Precision) -> Output:
    """The network's output for images (N, 3, H, W), in float32 whatever it was computed in, or in float64 throughout.

    So no loss is computed in half precision, and none meets a function that refuses it (``binary_cross_entropy``).
    """
    with autocast(images.device, precision):
        out = net(images)
    if precision != "bf16":
        return out
    maps = [each.float() for each in out.maps]
    return Output(out.logits.float(), out.scores.float(), out.embedding.float(), maps)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Inside, torch chooses bfloat16 where that is safe; only for ``bf16``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
