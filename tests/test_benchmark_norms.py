"""The benchmark of the norms runs, and what it says about memory, which other load can't disturb, is as promised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.norms import SHAPES, cases, main, peak_bytes, step
from cilnorm import registry
from cilnorm.norms import norm_factory

pytestmark = pytest.mark.slow


def test_every_norm_is_measured() -> None:
    assert set(registry.load().norms) <= set(cases([]))


def test_the_table_has_a_row_a_norm(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--only", "gn", "--pairs", "1"])
    *_, head, _, row = capsys.readouterr().out.strip().splitlines()
    assert head.count("|") == row.count("|") == len(SHAPES) + 3
    assert row.startswith("| gn |")


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("norm", "tensors"), [("tbbn", 2), ("brn", 3), ("sn", 3)])
def test_half_precision_makes_no_float32_copy(norm: str, tensors: int, dtype: torch.dtype, channels_last: bool) -> None:
    """Output and gradient, those of the moments apart where the layer has them, and some blocks in float32."""
    shape = (64, 16, 64, 64)
    peak = peak_bytes(step(norm_factory(norm)(16), shape, "cpu", channels_last, dtype), "cpu")
    tensor = 2 * 64 * 16 * 64 * 64
    assert peak <= (tensors + 0.4) * tensor  # a copy would be two more


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_balancing_takes_no_more_memory_than_batch_norm(shape: tuple[int, ...]) -> None:
    """At most 1.3 of BatchNorm2d; the released layer, which repeats the past rows, takes 17 times as much."""
    balanced = peak_bytes(step(norm_factory("tbbn")(shape[1]), shape, "cpu"), "cpu")
    tensor = 4 * 64 * shape[1] * shape[2] * shape[3]
    assert 2 * tensor <= balanced <= 2.3 * tensor  # the output and the input's gradient, and statistics
    assert balanced <= 1.3 * peak_bytes(step(nn.BatchNorm2d(shape[1]), shape, "cpu"), "cpu")
