"""Arithmetic in float32 on tensors of half precision, a block at a time: a float32 copy of the whole would cost more
memory and time than half precision saves."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class WideBlock:
    """Memory for one block of half-precision values in float32, the same for every block.

    A block of float32 or float64 needs none: it stands for itself.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def like(self, block: Tensor) -> Tensor:
        """Somewhere to compute the values of ``block``; what it holds is of no meaning."""
        if block.dtype not in HALF:
            return block
        if len(self._memory) < block.numel():
            self._memory = torch.empty(block.numel(), dtype=torch.float32)
        return self._memory[: block.numel()].view(block.shape)

    def read(self, block: Tensor) -> Tensor:
        """The values of ``block``."""
        return self.like(block).copy_(block) if block.dtype in HALF else block


def subtract(block: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """block − value in the precision of ``out``, in one pass where that is the block's own."""
    return torch.sub(block, value, out=out) if block.dtype == out.dtype else out.copy_(block).sub_(value)


def write(wide: Tensor, out: Tensor) -> None:
    """Rounds what was computed to where it belongs, unless it is there already."""
    if wide is not out:
        out.copy_(wide)
