"""Named streams of randomness: apart from one another, and from torch's own generator."""

from __future__ import annotations

import itertools

import torch

from cilnorm.training.randomness import generator, initial_weights, stream_seed


def test_streams_are_told_apart_by_seed_name_and_position() -> None:
    keys = list(itertools.product((0, 1, 10), ("rows", "weights"), ((), (0,), (1,), (1, 0), (10,))))
    assert len({stream_seed(seed, name, *position) for seed, name, position in keys}) == len(keys)
    assert all(0 <= stream_seed(seed, name, *position) < 2**63 for seed, name, position in keys)


def test_a_stream_never_changes() -> None:
    """A recorded value: another one would move every result."""
    assert stream_seed(0, "weights") == 133441691874178746
    assert generator(3, "rows", 1).initial_seed() == stream_seed(3, "rows", 1)


def test_initial_weights_come_from_their_stream_and_leave_the_global_one_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with initial_weights(5, 2):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with initial_weights(5, 2):
        assert torch.equal(torch.rand(3), inside)
    with initial_weights(5, 3):
        assert not torch.equal(torch.rand(3), inside)
