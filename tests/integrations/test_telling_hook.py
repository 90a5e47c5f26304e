"""Labels follow their images wherever the loop puts them, and every training pass is told its own rows."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cilnorm
from cilnorm.integrations.labelled_images import LabelledImages, UnknownImages, fingerprints, noting_loader
from cilnorm.integrations.telling_hook import LearnedClasses, TellingHook, adds_to_loss
from tests.integrations.loops import Witness, images_of, network, still_open

LABELS = torch.tensor([0, 5, 1, 7, 4, 2])


def test_labels_are_found_in_any_order_and_copy() -> None:
    known = LabelledImages()
    first, second = images_of(LABELS), images_of(LABELS[:3] + 1, seed=1)
    known.note(first, LABELS)
    known.note(second, LABELS[:3] + 1)
    order = torch.tensor([3, 0, 8, 5, 5, 6])
    mixed = torch.cat([first, second])[order]
    assert torch.equal(known.labels_of(mixed), torch.cat([LABELS, LABELS[:3] + 1])[order])
    assert torch.equal(known.labels_of(first), LABELS)
    assert torch.equal(known.labels_of(first.to(memory_format=torch.channels_last).clone()), LABELS)


def test_an_image_that_was_changed_or_forgotten_is_unknown() -> None:
    known, images = LabelledImages(keep=1), images_of(LABELS)
    known.note(images, LABELS)
    with pytest.raises(UnknownImages, match="2 of 6 rows"):
        known.labels_of(torch.cat([images[:4], images[4:].flip(-1)]))
    known.note(images_of(LABELS, seed=1), LABELS)
    with pytest.raises(UnknownImages, match="6 of 6 rows"):
        known.labels_of(images.clone())
    known.forget()
    with pytest.raises(UnknownImages):
        known.labels_of(images)


def test_one_image_under_two_labels_is_refused() -> None:
    known, images = LabelledImages(), images_of(LABELS)
    known.note(images, LABELS)
    known.note(images[:2].clone(), LABELS[:2] + 1)
    with pytest.raises(ValueError, match="two labels"):
        known.labels_of(images[1:3].clone())
    assert torch.equal(known.labels_of(images[2:].clone()), LABELS[2:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_a_fingerprint_is_that_of_the_values(dtype: torch.dtype) -> None:
    images = (torch.randn(50, 3, 40, 40) * 100).to(dtype)
    prints = fingerprints(images)
    assert len(prints.unique()) == 50
    assert torch.equal(fingerprints(images.flip(0).contiguous()), prints.flip(0))


def test_loaders_say_which_parts_are_images_and_labels() -> None:
    known, images = LabelledImages(), images_of(LABELS)
    pairs = enumerate(zip(images, LABELS, strict=True))
    data = [(number, image, int(label), image + 1) for number, (image, label) in pairs]
    for numbers, x, labels, changed in noting_loader(known)(data, batch_size=4, shuffle=True):
        assert torch.equal(known.labels_of(x), LABELS[numbers])
        assert torch.equal(known.labels_of(changed.clone()), labels)
    for nothing in ("text", images, [images], (LABELS, images), (images, LABELS.float()), (images, LABELS[:2])):
        known = LabelledImages()
        known.note_parts(nothing)
        with pytest.raises(UnknownImages):
            known.labels_of(images)


def test_classes_know_their_task_and_place() -> None:
    classes = LearnedClasses()
    classes.begin([7, 2])
    classes.begin([0, 4])
    tasks, order = classes.of(torch.tensor([4, 2, 0, 7]))
    assert tasks.tolist() == [1, 0, 1, 0]
    assert order.tolist() == [3, 0, 2, 1]
    assert classes.task == 1
    for label in (3, 8, -1):
        with pytest.raises(ValueError, match=f"label {label} is of none of the 2 tasks"):
            classes.of(torch.tensor([0, label]))
    with pytest.raises(ValueError, match="task 2 brings class 4 again"):
        classes.begin([9, 4])
    for wrong in ([], [-1, 9]):
        with pytest.raises(ValueError, match="labels count from 0"):
            classes.begin(wrong)


def watched(norm: str = "tbbn", **settings: Any) -> tuple[nn.Module, LabelledImages, TellingHook, Witness]:
    """A network in its third task of two classes each, the hook that tells it, and the witness behind the hook."""
    options = {"splits": "auto"} if norm == "tbbn" else {}
    model, known, classes = cilnorm.convert_norms(network(6), norm, **options), LabelledImages(), LearnedClasses()
    for task in range(3):
        classes.begin([2 * task, 2 * task + 1])
    hook = TellingHook("the loop", known, lambda: classes, **settings)
    hook.attach(model)
    hook.attach(model)
    witness = Witness({2: 4})
    witness.attach(model)
    return model, known, hook, witness


def test_every_training_pass_is_told_its_own_rows() -> None:
    model, known, hook, witness = watched()
    for labels in (torch.tensor([4, 0, 5, 1, 3]), torch.tensor([5, 4, 5]), torch.tensor([0, 1, 2, 3])):
        images = images_of(labels)
        known.note(images, labels)
        model(images.flip(0)).sum().backward()
        assert hook.last is not None
        assert torch.equal(hook.last, labels.flip(0) < 4)
        assert not still_open(model)
    assert witness.passes == [(2, 2, 3), (2, 3, 0), (2, 0, 4)]
    model.eval()
    model(torch.randn(2, 3, 8, 8))
    assert len(witness.passes) == 3


def test_it_is_as_telling_by_hand() -> None:
    model, known, _, _ = watched()
    alone = cilnorm.convert_norms(network(6), "tbbn", splits="auto")
    alone.load_state_dict(model.state_dict())
    labels = torch.tensor([4, 0, 5, 1, 3, 5, 4, 4])
    images = images_of(labels)
    known.note(images, labels)
    with cilnorm.rows(alone, past=labels < 4, task=2):
        expected = alone(images)
    assert torch.equal(model(images), expected)


def test_copies_in_training_mode_are_told_as_well() -> None:
    model, known, _, witness = watched()
    labels = torch.tensor([4, 0, 5, 1])
    images = images_of(labels)
    teacher = copy.deepcopy(model)
    known.note(images, labels)
    with torch.no_grad():
        expected = teacher(images)
    assert torch.equal(model(images), expected)
    assert witness.passes == [(2, 2, 2)] * 2
    known.forget()
    with pytest.raises(RuntimeError, match="the loop trains the network on images whose labels are not known"):
        teacher(images)
    with pytest.raises(RuntimeError, match="not known"):
        model(images)


def test_a_pass_that_fails_leaves_no_telling_behind() -> None:
    model, known, hook, _ = watched()
    labels = torch.tensor([4, 0, 5, 1])
    images = images_of(labels)[:, :2]
    known.note(images, labels)
    with pytest.raises((RuntimeError, AssertionError)):
        model(images)
    assert not still_open(model)
    assert not hook._open


def test_a_network_in_a_file_knows_no_loop() -> None:
    model, known, _, _ = watched()
    model._forward_pre_hooks.popitem()  # the witness
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    images = images_of(LABELS[:2])
    known.note(images, LABELS[:2])
    with pytest.raises(RuntimeError, match="does not know what the batch is made of"):
        loaded(images)
    loaded.eval()
    loaded(images)


def test_replicas_are_refused_with_what_to_set() -> None:
    model, known, _, _ = watched(alone="set one device")
    images = images_of(LABELS[:1])
    known.note(images, LABELS[:1])
    model._is_replica = True
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel cuts a batch .*; set one device"):
        model(images)


def test_terms_of_the_loss_need_a_place() -> None:
    assert adds_to_loss("adab2n", {}) == ["adab2n"]
    assert adds_to_loss("tbbn", {"splits": "exact"}) == adds_to_loss("bn", {}) == []
    labels = torch.tensor([4, 0, 5, 1])
    images = images_of(labels)
    taken: dict[str, Tensor] = {}
    for place in (None, taken.update):
        model, known, _, _ = watched("adab2n", add_terms=place)
        known.note(images, labels)
        if place:
            model(images)
        else:
            with pytest.raises(RuntimeError, match="no place for what the norm adds to the loss: adab2n"):
                model(images)
    assert taken["adab2n"].requires_grad


def test_a_network_that_needs_no_telling_is_left_alone() -> None:
    model, _, hook, _ = watched("bn")
    assert hook not in model._forward_pre_hooks.values()
    model(images_of(LABELS))
