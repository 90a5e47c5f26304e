"""Named streams of randomness, each derived from (seed, name, position) alone.

No generator is shared, so a consumer more or less moves no other, and a resumed run needs no generator state.
Everything is drawn on the CPU, so a run sees the same rows and the same crops on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["generator", "initial_weights", "stream_seed"]


def stream_seed(seed: int, name: str, *position: int) -> int:
    """A 63-bit seed for the stream ``name`` at ``position`` (task, phase, epoch, ...)."""
    text = "/".join(map(str, (seed, name, *position)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, name: str, *position: int) -> torch.Generator:
    """A fresh CPU generator for the stream ``name`` at ``position``."""
    return torch.Generator().manual_seed(stream_seed(seed, name, *position))


@contextmanager
def initial_weights(seed: int, *position: int) -> Iterator[None]:
    """Inside, torch's global generator is the stream of initial weights; outside it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "weights", *position))
        yield
