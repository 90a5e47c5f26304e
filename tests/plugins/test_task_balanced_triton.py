"""The Triton kernels against the torch path. Without a GPU they run in Triton's interpreter, in a process of their own:
Triton decides when it is imported whether to interpret."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from cilnorm_norms._task_balanced.function import Plan, TaskBalancedFunction

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parent.parent.parent
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed")
runnable = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no CUDA device, not interpreted")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


TILES = {"BLOCK_C": 16, "BLOCK_P": 64, "BLOCK_S": 16, "BLOCK_OWN": 4, "BLOCK_PAST": 16}
FLOATS = {"own_share", "eps", "unbiased", "inverse_count", "own_gain", "past_gain", "current_weight"}
BY_NAME = tuple(map(int, version("triton").split(".")[:2])) < (3, 3)  # how the compiler knows constants
KERNELS = ["row_moments", "split_moments", "apply", "row_sums", "split_gradients", "apply_gradient"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels can't be compiled")
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu_that_need_not_be_here(
    name: str, affine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs Python that the compiler refuses, so the compiler has a look as well."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from cilnorm_norms._task_balanced import kernels as _task_balanced_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(_task_balanced_kernels, name)
    types: dict[str, str] = {}
    constants: dict[Any, int | None] = {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in TILES or (argument in {"weight", "bias"} and not affine):
            types[argument], constants[argument if BY_NAME else (place,)] = "constexpr", TILES.get(argument)
        elif argument in FLOATS:
            types[argument] = "fp32"
        elif argument in {"rows", "current", "splits", "channels", "area"} or argument.startswith("stride"):
            types[argument] = "i32"
        else:
            types[argument] = "*bf16" if argument in {"x", "y", "g", "dx"} else "*fp32"
    compiled = compile_kernel(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["ptx"]


PLANS = [
    Plan(16, 12, 4),
    Plan(16, 12, 6, current_gain=0.4, past_gain=2.4),
    Plan(64, 48, 24),
    Plan(9, 7, 7),
    Plan(10, 7, 1, weight=0.3),
    Plan(12, 2, 1, weight=2.5, past_gain=0.4),
    Plan(16, 12, 4, weight=4.0),
]
SHAPES = [(1, 1, 1), (17, 1, 5), (130, 1, 2), (1, 40, 30)]
CASES = [
    *((plan, (3, 2, 3), True) for plan in PLANS),
    *((Plan(6, 4, 2), shape, True) for shape in SHAPES),
    (Plan(6, 4, 2), (3, 2, 3), False),
]


@runnable
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("plan", "shape", "affine"), CASES, ids=str)
def test_equals_the_torch_path(
    plan: Plan, shape: tuple[int, ...], layout: torch.memory_format, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(2, plan.rows, *shape, device=DEVICE).unbind(0)
    x = x * 3 + 5
    weight, bias = torch.randn(2, shape[0], device=DEVICE).unbind(0) if affine else (None, None)

    def results(wide: bool) -> list[torch.Tensor]:
        dtype = torch.float64 if wide else torch.float32
        inputs = [None if value is None else value.detach().to(dtype).requires_grad_() for value in (x, weight, bias)]
        with torch.no_grad():
            inputs[0] = inputs[0].contiguous(memory_format=layout).requires_grad_()
        y, mean, var = TaskBalancedFunction.apply(*inputs, 1e-5, plan, None)
        y.backward(g.to(dtype).contiguous(memory_format=layout))
        assert y.is_contiguous(memory_format=layout)
        return [y.detach(), mean, var, *(value.grad for value in inputs if value is not None)]

    expected = results(wide=True)
    monkeypatch.setattr("cilnorm_norms._task_balanced.function.wants_triton", lambda x: True)
    for actual, value in zip(results(wide=False), expected, strict=True):
        scale = value.abs().max().item() + 1e-3
        assert (actual - value).abs().max().item() < 2e-5 * scale


@runnable
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_only_what_it_writes(dtype: torch.dtype) -> None:
    from cilnorm_norms._task_balanced import triton as kernels

    torch.manual_seed(0)
    x, g = (torch.randn(2, 16, 5, 3, 3, device=DEVICE) * 2 + 30).to(dtype).unbind(0)
    weight, bias = torch.rand(2, 5, device=DEVICE).unbind(0)
    sizes = kernels.Sizes(16, 12, 4, 5, 9)
    half = kernels.forward(x, weight, bias, 1e-5, sizes, 1.0)
    full = kernels.forward(x.float(), weight, bias, 1e-5, sizes, 1.0)
    assert half[0].dtype == dtype
    # Up to one unit in the last place, for the interpreter cuts bfloat16 off where a GPU rounds.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(half[0].float(), full[0], rtol=unit, atol=unit)
    assert all(torch.equal(one, other) for one, other in zip((*half[1], *half[2]), (*full[1], *full[2]), strict=True))
    back = [kernels.backward(g.to(x), x, weight, half[1], sizes, 1.0, (1.0, 1.0)) for g, x in ((g, x), (g, x.float()))]
    torch.testing.assert_close(back[0][0].float(), back[1][0], rtol=unit, atol=unit)
    assert torch.equal(back[0][1], back[1][1])


@runnable
def test_statistics_survive_a_large_offset() -> None:
    from cilnorm_norms._task_balanced import triton as kernels

    x = torch.randn(16, 1, 30, 40, device=DEVICE) + 2000
    _, found, _ = kernels.forward(x, None, None, 1e-5, kernels.Sizes(16, 12, 4, 1, 1200), 1.0)
    parts = [torch.cat([x[split:12:4], x[12:]]).double() for split in range(4)]
    expected = torch.stack([part.var((0, 2, 3), correction=0) for part in parts])
    torch.testing.assert_close(found.var.double(), expected, rtol=1e-4, atol=0)
