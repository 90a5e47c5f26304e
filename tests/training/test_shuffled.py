"""Shuffled batches: one pass over current and stored images together, whose compositions nobody knows beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cilnorm.batch import Composition, CompositionAware, Task
from cilnorm.experiment.assembly import assemble
from cilnorm.experiment.runner import resume, run
from cilnorm.registry import Registry, load
from cilnorm.spec import Spec, SpecError
from cilnorm.training.batches import EpochBatches, draw_batches
from cilnorm.training.engine import Engine
from cilnorm.training.epoch_plan import EpochPlan, VaryingComposition, VaryingRows, draw_pool, phase_sources, plan_epoch
from cilnorm.training.fast_engines import CapturedEngine, CaptureRefused, CompiledEngine
from cilnorm.training.pixels import Augmentation, Pixels
from cilnorm.training.precision import matmul_precision
from cilnorm.training.protocol import Protocol
from cilnorm.training.randomness import generator
from tests.experiment.test_runner import Power, bits, events, failing_at
from tests.training.test_engine import CPU, Remembered, learned, learner

pytestmark = pytest.mark.slow

SHUFFLED = Protocol(batches="shuffled")
TASK = Task(1, (3, 3))
seeds = st.integers(0, 2**31)


def planned(
    current: int, past: int, rows: tuple[int, int] = (48, 16), kind: Any = "mixed", task: Task = TASK, **where: Any
) -> EpochPlan:
    """Images 0 .. current - 1 are the task's, the next ``past`` ones the memory's."""
    own, stored = torch.arange(current), torch.arange(current, current + past)
    pool = draw_pool(kind, own, stored, SHUFFLED, torch.Generator())
    sources, composition = phase_sources(kind, pool, (current, stored), rows, task, SHUFFLED)
    at = {"seed": 0, "position": (1, 0), "epoch": 0, **where}
    return plan_epoch(sources, composition, SHUFFLED, **at)


@given(st.integers(1, 90), st.integers(1, 60), st.integers(1, 12), st.integers(1, 8), seeds)
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_one_pass_with_current_rows_first(
    current: int, past: int, rows_current: int, rows_past: int, seed: int
) -> None:
    rows = rows_current + rows_past
    plan = planned(current, past, (rows_current, rows_past), seed=seed)
    assert plan.steps == len(plan.compositions) == -(-(current + past) // rows)
    met, draws = [], []
    for line, drawn, told in zip(plan.indices, plan.draws, plan.compositions, strict=True):
        assert (line[: told.current] < current).all()
        assert (line[told.current : told.rows] >= current).all()
        assert (told.task, told.classes) == (1, (3, 3))
        met += line[: told.rows].tolist()
        draws += drawn[: told.rows].tolist()
    assert sorted(met) == list(range(current + past))
    assert len(set(draws)) == len(draws)  # every image has a crop of its own
    assert [told.rows for told in plan.compositions[:-1]] == [rows] * (plan.steps - 1)


def test_steps_and_compositions_are_those_of_the_usual_protocols() -> None:
    """128 rows on CIFAR-100: 55 steps an epoch for ten classes beside 2000 images, the last of 88 rows."""
    plan = planned(5000, 2000, (96, 32))
    assert (plan.steps, plan.compositions[-1].rows) == (55, 88)
    past = torch.tensor([told.past for told in plan.compositions[:-1]], dtype=torch.float)
    assert past.mean().item() == pytest.approx(36.6, abs=1)
    assert 3 < past.std().item() < 8
    assert planned(2500, 2000, (96, 32)).steps == 36
    assert planned(5000, 1000, (96, 32)).steps == 47  # B50-10 with 20 of each class
    assert planned(5000, 0, (96, 32), task=Task(0, (10,))).compositions[-1] == Composition(8, 0, 0, (0, 10))


def test_an_epoch_is_a_function_of_seed_position_and_number() -> None:
    others: list[dict[str, Any]] = [{}, {"seed": 1}, {"epoch": 1}, {"position": (2, 0)}, {"position": (1, 1)}]
    found = [planned(60, 20, **other).indices.tolist() for other in others]
    assert len({str(each) for each in found}) == len(others)
    assert planned(60, 20).indices.tolist() == found[0]


def test_what_full_batches_agree_in_is_known_and_nothing_else() -> None:
    first = planned(100, 0, (12, 4), task=Task(0, (3,)))
    assert first.composition == Composition(16, 0, 0, (0, 3))
    assert first.compositions[-1] == Composition(4, 0, 0, (0, 3))
    mixed = planned(60, 20, (12, 4)).composition
    assert isinstance(mixed, VaryingComposition)
    assert (mixed.rows, mixed.task, mixed.classes) == (16, 1, (3, 3))
    assert mixed == VaryingComposition(16, 1, (3, 3)) != VaryingComposition(8, 1, (3, 3))
    assert len({mixed, VaryingComposition(16, 1, (3, 3))}) == 1
    assert "16" in repr(mixed)
    for name in ("current", "past"):
        with pytest.raises(VaryingRows, match="shuffled batches differ in how many rows are current"):
            getattr(mixed, name)


def test_a_memory_that_counts_twice_comes_by_twice() -> None:
    plan = planned(10, 5, (4, 4), kind="doubled")
    met = torch.cat([line[: told.rows] for line, told in zip(plan.indices, plan.compositions, strict=True)])
    assert met.bincount().tolist() == [1] * 10 + [2] * 5
    assert sum(told.past for told in plan.compositions) == 10


def test_the_rule_of_cycles_is_for_stratified_batches() -> None:
    with pytest.raises(ValueError, match="epoch: cycle is a rule for batches: stratified"):
        Protocol(batches="shuffled", epoch="cycle")


# Steps


def epochs(device: torch.device = CPU, rows: tuple[int, int] = (12, 4), count: int = 3) -> list[EpochBatches]:
    """Epochs of the second task: 60 new and 23 stored images of six classes, so five batches and one of three rows."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (120, 3, 8, 8), dtype=torch.uint8)
    pixels = Pixels(images.to(device), (0.5,) * 3, (0.3,) * 3, Augmentation(pad=1, crop="resized", flip=True))
    targets = torch.arange(6).repeat_interleave(20)
    stored = torch.cat([torch.arange(0, 60, 3), torch.tensor([1, 22, 43])])
    pool = torch.cat([torch.arange(60, 120), stored])
    sources, composition = phase_sources("mixed", pool, (60, stored), rows, TASK, SHUFFLED)
    plans = [plan_epoch(sources, composition, SHUFFLED, 0, (1, 0), epoch) for epoch in range(count)]
    return [draw_batches(plan, pixels, targets, generator(0, "views", at)) for at, plan in enumerate(plans)]


def test_batches_know_their_own_rows() -> None:
    [feed] = epochs(count=1)
    assert (len(feed), feed.full) == (6, 5)
    for batch, told in zip(feed, feed.compositions, strict=True):
        assert len(batch.images) == len(batch.targets) == batch.composition.rows == told.rows
        assert (batch.targets[batch.current] >= 3).all()
        assert (batch.targets[batch.past] < 3).all()
    assert len(feed.batch(5).images) == 3
    by_tensor = feed.batch(torch.tensor([2]))
    assert torch.equal(by_tensor.images, feed.batch(2).images)
    assert isinstance(by_tensor.composition, VaryingComposition)


@pytest.mark.parametrize("norm", sorted(load().norms))
def test_one_graph_serves_every_composition(registry: Registry, norm: str) -> None:
    """A step that knows rows by their tasks alone learns what one learns that is told their numbers."""
    terms, weights = learned(learner(Engine, registry, "ft", norm=norm), epochs())
    Remembered.captures = 0
    again, same = learned(learner(Remembered, registry, "ft", norm=norm), epochs())
    assert Remembered.captures == 1
    for one, other in zip(terms, again, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_loss_that_must_know_the_numbers_is_not_captured(registry: Registry) -> None:
    terms, weights = learned(learner(Engine, registry, "ssil"), epochs())
    with pytest.warns(
        CaptureRefused, match=r"can't be captured \(shuffled batches differ in how many rows are"
    ) as told:
        again, same = learned(learner(Remembered, registry, "ssil"), epochs())
    assert sum(issubclass(each.category, CaptureRefused) for each in told) == 1
    assert again == terms
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


class Counting(nn.BatchNorm2d, CompositionAware):
    """A stranger's norm, which knows numbers of rows alone."""

    def compose(self, composition: Composition) -> None:
        self.told = composition.current


def test_a_layer_that_must_know_the_numbers_is_not_captured(registry: Registry) -> None:
    def made(kind: type[Engine]) -> Engine:
        engine = learner(kind, registry, "ft", norm="bn")
        engine.net.backbone.norm = Counting(8)
        engine.parameters = list(engine.net.parameters())
        return engine

    terms = learned(made(Engine), epochs(count=1))[0]
    with pytest.warns(
        CaptureRefused, match="Counting must know how many rows are current, and shuffled batches differ"
    ):
        assert learned(made(Remembered), epochs(count=1))[0] == terms


def test_a_compiled_backbone_that_knows_numbers_is_left_as_it_is(registry: Registry) -> None:
    terms = learned(learner(Engine, registry, "ft"), epochs(count=1))[0]
    with pytest.warns(
        RuntimeWarning, match="shuffled batches differ .* so the backbone isn't compiled; going on eager"
    ):
        assert learned(learner(CompiledEngine, registry, "ft"), epochs(count=1))[0] == terms
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", sorted(load().norms))
def test_one_cuda_graph_serves_every_composition(registry: Registry, norm: str) -> None:
    cuda = torch.device("cuda", 0)
    with matmul_precision("fp32"):
        terms = learned(learner(Engine, registry, "lucir", cuda, norm), epochs(cuda))[0]
        engine = learner(CapturedEngine, registry, "lucir", cuda, norm)
        again = learned(engine, epochs(cuda))[0]
    assert not engine._refused
    assert len(engine._recordings) == 1
    for one, other in zip(terms, again, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-3)


# Runs


@pytest.mark.parametrize("norm", sorted(load().norms))
def test_every_norm_learns_from_shuffled_batches_and_goes_on_to_the_same_bits(
    norm: str, tiny: Callable[..., Spec], registry: Registry, tmp_path: Path
) -> None:
    options = {"splits": "exact"} if norm.startswith("tbbn") else {"groups": 4} if norm == "cn*" else {}
    spec = tiny(norm=norm, **options, batches="shuffled", tasks=2, train_per_class=9, rows="6:2", memory=9)
    check_goes_on(spec, registry, tmp_path)


@pytest.mark.parametrize("method", sorted(load().methods))
def test_every_method_learns_from_shuffled_batches_and_goes_on_to_the_same_bits(
    method: str, tiny: Callable[..., Spec], registry: Registry, tmp_path: Path
) -> None:
    spec = tiny(
        method=method, norm="tbbn", splits="auto", batches="shuffled", tasks=2, train_per_class=9, rows="6:2", memory=9
    )
    check_goes_on(spec, registry, tmp_path)


def check_goes_on(spec: Spec, registry: Registry, folder: Path) -> None:
    """Stops a run within the second task, between two steps; both runs end with the same bits."""
    whole = run(spec, folder / "whole", device="cpu", registry=registry)
    begun = [event for event in events(whole.folder, "epoch") if event["task"] == 1]
    assert begun[0]["steps"] == 4  # 27 images in batches of 8: the last holds three
    steps = sum(event["steps"] for event in begun)
    with pytest.raises(Power):
        run(
            spec,
            folder / "halted",
            device="cpu",
            registry=registry,
            watch=[failing_at("step", steps + 3)],
            checkpoint_every=1e-9,
        )
    resume(folder / "halted", device="cpu", registry=registry)
    assert bits(folder / "halted") == bits(whole.folder)


def test_a_fixed_number_of_splits_can_not_fit(tiny: Callable[..., Spec], registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"task 2, phase main: \d+ current rows can't be cut into 4 splits"):
        run(tiny(norm="tbbn", splits=4, batches="shuffled"), tmp_path / "run", device="cpu", registry=registry)


def test_released_splits_say_that_they_hardly_fit(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="splits='released' finds no way to split .* take splits='exact'"):
        run(tiny(norm="tbbn", batches="shuffled", epochs=1), tmp_path / "run", device="cpu", registry=registry)


def test_a_shuffled_run_is_another_one(tiny: Callable[..., Spec], registry: Registry, tmp_path: Path) -> None:
    assert tiny(batches="shuffled").key != tiny().key == tiny(batches="stratified").key
    parts = assemble(tiny(), registry, CPU)
    assert isinstance(parts.stream.targets, Tensor)
    whole = run(tiny(batches="shuffled", epochs=1), tmp_path / "run", device="cpu", registry=registry)
    assert [event["steps"] for event in events(whole.folder, "epoch")] == [3, 5, 5]  # 48, and 72 images, in 16 rows


def test_streamed_images_give_the_same_bits(tiny: Callable[..., Spec], registry: Registry, tmp_path: Path) -> None:
    """A shorter last batch, too."""
    found = []
    for residence in ("device", "stream"):
        spec = tiny(batches="shuffled", tasks=2, train_per_class=9, rows="6:2", memory=9, residence=residence)
        found.append(bits(run(spec, tmp_path / residence, device="cpu", registry=registry).folder))
    assert found[0] == found[1]
