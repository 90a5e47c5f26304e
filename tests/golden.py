"""Reading the golden vectors under ``tests/assets/golden``: what the released layers themselves computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "assets" / "golden"
FURTHER = FOLDER.with_name("golden-norms")  # of norms that the TBBN paper doesn't compare
METHODS = FOLDER.with_name("golden-methods")  # likewise of methods; meta has the ``kind`` and its settings


class Golden:
    """One file: arrays by key, and the settings that made them in ``meta``."""

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        with np.load(folder / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays["meta"]))

    def tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        """An array as a tensor of ``dtype``; integers stay what they are."""
        value = torch.from_numpy(self.arrays[key].copy())
        return value.to(dtype) if value.is_floating_point() else value

    def expected(self, key: str, dtype: torch.dtype) -> Tensor:
        """The released layer's own result: of its float64 run, or of its float32 run, as ``dtype`` says."""
        return self.tensor(key + "64" if dtype == torch.float64 and key + "64" in self.arrays else key, dtype)


def names(prefix: str, folder: Path = FOLDER) -> list[str]:
    """The files of one family."""
    return sorted(path.stem for path in folder.glob(f"{prefix}*.npz"))


def check(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Holds the largest difference, measured in the largest expected value, below ``tolerance``."""
    assert actual.numel() == expected.numel(), what
    largest = expected.abs().max().item()
    difference = (actual.detach() - expected.reshape(actual.shape)).abs().max().item()
    assert difference <= tolerance * largest, f"{what}: off by {difference / max(largest, 1e-300):.2e} of {largest:.2e}"


def load_initial_state(layer: nn.Module, golden: Golden) -> None:
    """Loads every ``init_*`` array into the parameter or buffer of that name."""
    state = layer.state_dict()
    for key in golden.arrays:
        name = key.removeprefix("init_")
        if name != key:
            assert name in state, f"{key} has no place in {sorted(state)}"
            state[name] = torch.from_numpy(golden.arrays[key].copy()).reshape(state[name].shape)
    layer.load_state_dict(state)


def replay(layer: nn.Module, golden: Golden, prefix: str, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    """One training step: compares output, gradients and buffers; ``tolerance[""]`` is for what it doesn't name."""
    layer.zero_grad()
    x = golden.tensor(prefix + "x", dtype).requires_grad_()
    y = layer(x)
    y.backward(golden.tensor(prefix + "gy", dtype))
    results = {"y": y, "gx": x.grad, **dict(layer.named_buffers())}
    results |= {f"g_{name}": parameter.grad for name, parameter in layer.named_parameters()}
    for name, value in results.items():
        key = prefix + name
        assert key in golden.arrays, f"nothing recorded for {name}"
        if not value.is_floating_point():
            assert value.item() == golden.arrays[key].item(), key
        else:
            check(value, golden.expected(key, dtype), tolerance.get(name, tolerance[""]), key)


def replay_all(layer: nn.Module, golden: Golden, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    """The whole procedure for a layer file: initial state, every step, evaluation."""
    load_initial_state(layer, golden)
    layer.to(dtype).train()
    for step in range(golden.meta["steps"]):
        replay(layer, golden, f"s{step}_", dtype, tolerance)
    layer.eval()
    with torch.no_grad():
        y = layer(golden.tensor("eval_x", dtype))
    check(y, golden.expected("eval_y", dtype), tolerance.get("y", tolerance[""]), "evaluation")
