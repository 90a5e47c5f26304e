"""Exemplars: budgets, both herdings against the released numbers and the definition, lists that are cut or redone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cilnorm.training.memory import HERDINGS, Draws, Memory, herd_greedy, herd_icarl, per_class
from tests import golden as gold


def greedily(features: Tensor, count: int) -> list[int]:
    """argmin_i ||mu - (S + f_i) / (k + 1)|| written down as it stands."""
    rows = F.normalize(features.double(), dim=1)
    mean = rows.mean(0)
    picked: list[int] = []
    while len(picked) < min(count, len(rows)):
        left = [i for i in range(len(rows)) if i not in picked]
        distances = [(mean - rows[[*picked, i]].mean(0)).norm().item() for i in left]
        picked.append(left[distances.index(min(distances))])
    return picked


@pytest.mark.parametrize("name", gold.names("herding_facil"))
def test_greedy_herding_is_the_released_one(name: str) -> None:
    golden = gold.Golden(name)
    features, labels = golden.tensor("features", torch.float32), golden.tensor("labels", torch.long)
    selected = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        selected += members[herd_greedy(features[members], golden.meta["per_class"])].tolist()
    assert selected == golden.arrays["selected"].tolist()


@pytest.mark.parametrize("name", gold.names("herding_icarl"))
def test_icarl_herding_is_the_released_one(name: str) -> None:
    golden = gold.Golden(name)
    selected = herd_icarl(golden.tensor("features", torch.float32), golden.meta["m"])
    assert selected.tolist() == golden.arrays["selected"].tolist()


@given(st.integers(3, 25), st.integers(1, 30), st.integers(0, 2**16))  # two rows always tie
@settings(max_examples=30, deadline=None)
def test_greedy_herding_is_its_definition(rows: int, count: int, seed: int) -> None:
    features = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))
    assert herd_greedy(features, count).tolist() == greedily(features, count)


def test_the_first_of_equals_wins() -> None:
    assert herd_greedy(torch.ones(5, 3), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("herding", sorted(HERDINGS))
@given(rows=st.integers(1, 20), count=st.integers(1, 20), seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_herding_picks_once_and_shorter_lists_are_beginnings(herding: str, rows: int, count: int, seed: int) -> None:
    features = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    (picked,) = (order.tolist() for order in HERDINGS[herding]([features], count))
    assert len(set(picked)) == len(picked) <= min(rows, count)
    assert set(picked) <= set(range(rows))
    assert HERDINGS[herding]([features], max(1, count // 2))[0].tolist() == picked[: max(1, count // 2)]
    assert HERDINGS[herding]([features * 4], count)[0].tolist() == picked


@pytest.mark.parametrize(("herding", "alone"), [("greedy", herd_greedy), ("icarl", herd_icarl)])
def test_classes_side_by_side_are_herded_as_each_alone(herding: str, alone: Callable[[Tensor, int], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(size, 6, generator=generator) for size in (40, 7, 90, 1)]
    together = HERDINGS[herding](features, 12)
    assert [order.tolist() for order in together] == [alone(of_class, 12).tolist() for of_class in features]
    assert [len(order) for order in together] == [12, 7, 12, 1]


def test_icarl_herding_gives_up_after_its_limit() -> None:
    assert len(herd_icarl(torch.randn(50, 3, generator=torch.Generator().manual_seed(1)), 50, limit=5)) <= 5


@given(st.integers(1, 5000), st.integers(1, 200))
def test_floor_keeps_within_the_budget_and_ceil_barely_exceeds_it(budget: int, classes: int) -> None:
    if budget < classes:
        with pytest.raises(ValueError, match=f"a memory of {budget} can't hold one exemplar of each of {classes}"):
            per_class(budget, classes)
        return
    floor, ceil = per_class(budget, classes), per_class(budget, classes, "ceil")
    assert floor * classes <= budget < (floor + 1) * classes
    assert (ceil - 1) * classes < budget <= ceil * classes


@pytest.mark.parametrize(("classes", "kept"), [(10, 200), (30, 67), (60, 34), (70, 29), (90, 23)])
def test_released_budget(classes: int, kept: int) -> None:
    assert per_class(2000, classes, "ceil") == kept


def features_of(scale: float) -> Tensor:
    return torch.randn(60, 4, generator=torch.Generator().manual_seed(int(scale)))


def after_two_tasks(herd_again: bool) -> tuple[Memory, Memory]:
    """Memories after a task of two classes and after another, which a different model sees."""
    first, second = features_of(1), features_of(2)
    pools = [torch.arange(start, start + 15) for start in (0, 15, 30, 45)]
    one = Memory().collect(pools[:2], lambda indices: first[indices], 8, "greedy", herd_again)
    two = one.collect(pools[2:], lambda indices: second[indices], 4, "greedy", herd_again)
    return one, two


def test_stored_lists_are_cut() -> None:
    one, two = after_two_tasks(herd_again=False)
    assert [len(stored) for stored in two.exemplars] == [4, 4, 4, 4]
    for before, after in zip(one.exemplars, two.exemplars, strict=False):
        assert after.tolist() == before[:4].tolist()


def test_stored_lists_are_ranked_anew_by_the_new_model() -> None:
    one, two = after_two_tasks(herd_again=True)
    features = features_of(2)
    for before, after in zip(one.exemplars, two.exemplars, strict=False):
        assert after.tolist() == before[greedily(features[before], 4)].tolist()
    assert any(b[:4].tolist() != a.tolist() for b, a in zip(one.exemplars, two.exemplars, strict=False))


def test_new_classes_are_chosen_among_their_own_images() -> None:
    _, two = after_two_tasks(herd_again=False)
    assert set(two.exemplars[2].tolist()) <= set(range(30, 45))
    assert set(two.exemplars[3].tolist()) <= set(range(45, 60))
    assert len(two) == len(two.indices) == len(two.indices.unique()) == 16


def test_an_empty_memory_has_no_indices() -> None:
    assert len(Memory()) == 0
    assert Memory().indices.tolist() == []


# The rules that herding is compared with


def test_the_closest_are_those_nearest_to_the_mean_of_their_class() -> None:
    features = features_of(3)[:15]
    units = F.normalize(features.double(), dim=1)
    distances = [(unit - units.mean(0)).norm().item() for unit in units]
    nearest = sorted(range(15), key=lambda at: distances[at])
    assert HERDINGS["closest"]([features], 6)[0].tolist() == nearest[:6]
    assert HERDINGS["closest"]([torch.ones(5, 3)], 3)[0].tolist() == [0, 1, 2]


def chosen_at_random(draws: Draws, count: int = 8, again: bool = False) -> Memory:
    pools = [torch.arange(start, start + 15) for start in (0, 15)]
    return Memory().collect(pools, _no_features, count, "random", again, draws)


def _no_features(indices: Tensor) -> Tensor:
    raise AssertionError("chance needs no embeddings")


def test_random_exemplars_are_of_their_class_and_of_the_seed() -> None:
    first, second = chosen_at_random(Draws(0)).exemplars
    assert set(first.tolist()) <= set(range(15))
    assert set(second.tolist()) <= set(range(15, 30))
    assert len(first.unique()) == len(second.unique()) == 8
    assert first.tolist() == chosen_at_random(Draws(0)).exemplars[0].tolist()
    assert first.tolist() != chosen_at_random(Draws(1)).exemplars[0].tolist()
    assert first.tolist() != (second - 15).tolist()
    assert first[:3].tolist() == chosen_at_random(Draws(0), 3).exemplars[0].tolist()


def test_every_image_is_as_likely_as_any_other_to_be_chosen_at_random() -> None:
    found = torch.cat([chosen_at_random(Draws(seed), 5).exemplars[0] for seed in range(600)])
    counts = found.bincount(minlength=15)
    assert counts.sum() == 3000
    assert ((counts - 200).abs() < 5 * 200**0.5).all()


def reservoir(seed: int, sizes: tuple[int, ...] = (30, 10, 20), size: int = 12) -> Memory:
    """After a task a size, each of one class; images are numbered through."""
    memory, met = Memory(), 0
    for task, count in enumerate(sizes):
        memory, met = memory.fill([torch.arange(met, met + count)], size, met, Draws(seed, task)), met + count
    return memory


def test_a_reservoir_holds_what_fits_and_knows_its_classes() -> None:
    assert [len(kept) for kept in reservoir(0, (5, 4), 12).exemplars] == [5, 4]
    memory = reservoir(0)
    assert len(memory) == len(memory.indices.unique()) == 12
    for kept, (start, end) in zip(memory.exemplars, ((0, 30), (30, 40), (40, 60)), strict=True):
        assert set(kept.tolist()) <= set(range(start, end))
    assert memory.indices.tolist() == reservoir(0).indices.tolist() != reservoir(1).indices.tolist()


def test_a_reservoir_keeps_every_image_with_the_same_probability_whenever_it_came_by() -> None:
    counts = torch.cat([reservoir(seed).indices for seed in range(1500)]).bincount(minlength=60)
    assert counts.sum() == 1500 * 12
    assert ((counts - 300).abs() < 5 * 300**0.5).all()


@pytest.mark.parametrize("herding", ["greedy", "icarl", "random", "closest"])
def test_no_exemplars_are_none_of_each_class(herding: str) -> None:
    pools = [torch.arange(15), torch.arange(15, 30)]
    memory = Memory().collect(pools, _no_features, 0, herding, False)  # type: ignore[arg-type]
    assert [len(kept) for kept in memory.exemplars] == [0, 0]
    assert per_class(0, 10) == per_class(0, 10, "ceil") == 0
