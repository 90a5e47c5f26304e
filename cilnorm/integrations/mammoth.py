"""Mammoth with another norm, in a checkout that stays as it is.

    cd mammoth
    python -m cilnorm.integrations.mammoth --norm tbbn -- --model er --dataset seq-cifar100 --buffer_size 200 --lr 0.1

Mammoth imports every data set at its start, and some of those load CLIP at that moment; ``--without-clip`` (before the
``--``) does without, for all others.

The backbone gets the norm. Which rows of a batch are past is known from the labels that come with the stream and that
the buffer keeps: a row of the running task that comes from the buffer is current. Where a model passes stream and
buffer through the network one after the other, each pass is told its own rows.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cilnorm.integrations.labelled_images import LabelledImages, noting_loader
from cilnorm.integrations.launcher import Framework, Launch, parse_command
from cilnorm.integrations.telling_hook import LearnedClasses, TellingHook

__all__ = ["MAMMOTH", "WITHOUT_CLIP", "install", "leave_out_clip", "main"]

WITHOUT_CLIP = "without-clip"
MAMMOTH = Framework(
    "Mammoth",
    "e75a491",
    ("main.py", "models/utils/continual_model.py", "utils/buffer.py"),
    {WITHOUT_CLIP: "import Mammoth's data sets without open_clip, whose weights it would download at once"},
    {"open_clip": WITHOUT_CLIP},
)
ALONE = "leave --distributed at no"
READS = ("get_data", "get_balanced_data", "get_data_by_index", "get_all_data")  # of the buffer


class _Model:
    """The model that trains, and the classes of its tasks, which Mammoth numbers in the order of learning."""

    def __init__(self) -> None:
        self.model: Any = None
        self.learned = LearnedClasses()

    def follow(self, model: Any) -> None:
        """Looks at a model from now on.

        Raises:
            SystemExit: its data set has no classes that only one task has.
        """
        if model is not self.model:
            if model.SETTING not in ("class-il", "task-il"):
                raise SystemExit(
                    f"the data set's setting is {model.SETTING}, where a label does not say the task of a row; "
                    "class-il and task-il can be used"
                )
            self.model, self.learned = model, LearnedClasses()

    def classes(self) -> LearnedClasses:
        """The classes of its tasks so far."""
        while self.learned.task < self.model.current_task:
            start, end = self.model.get_offsets(len(self.learned.tasks))
            self.learned.begin(range(int(start), int(end)))
        return self.learned


def install(launch: Launch) -> TellingHook:
    """Wraps what Mammoth builds its backbone, batches and steps with; must come before Mammoth is imported.

    Raises:
        SystemExit: Mammoth lacks what is to be wrapped.
    """
    launch.enter()
    if WITHOUT_CLIP in launch.switches:
        leave_out_clip()
    images, model = LabelledImages(keep=16), _Model()
    hook = TellingHook("Mammoth", images, model.classes, alone=ALONE)
    torch.utils.data.DataLoader = noting_loader(images)  # type: ignore[misc]
    backbone = MAMMOTH.find("backbone", "get_backbone")
    buffer = MAMMOTH.find("utils.buffer", *(f"Buffer.{name}" for name in READS)).Buffer
    steps = ("meta_begin_task", "meta_observe", "get_offsets", "current_task")
    learner = MAMMOTH.find("models.utils.continual_model", *(f"ContinualModel.{name}" for name in steps)).ContinualModel
    get_backbone, begin_task, observe = backbone.get_backbone, learner.meta_begin_task, learner.meta_observe

    def converted_backbone(args: Any) -> nn.Module:
        if args.distributed != "no" or args.code_optimization == 3:
            raise SystemExit(f"a network that is spread or compiled can't be told its rows; {ALONE}, and no -O 3")
        network = get_backbone(args)
        launch.convert(network, hook)
        return network

    def followed_begin_task(self: Any, dataset: Any) -> Any:
        model.follow(self)
        return begin_task(self, dataset)

    def noted_observe(self: Any, inputs: Any, labels: Any, *args: Any, **kwargs: Any) -> Any:
        images.forget()
        images.note(inputs, labels)
        return observe(self, inputs, labels, *args, **kwargs)

    backbone.get_backbone = converted_backbone
    learner.meta_begin_task, learner.meta_observe = followed_begin_task, noted_observe
    for name in READS:
        setattr(buffer, name, _noted_read(getattr(buffer, name), images))
    return hook


def leave_out_clip() -> None:
    """Stands in for ``open_clip``: Mammoth imports all its data sets, and some of them load CLIP when imported."""
    module: Any = types.ModuleType("open_clip")
    module.create_model_and_transforms = lambda *_, **__: (None, None, None)
    sys.modules["open_clip"] = module


def _noted_read(read: Callable[..., Any], images: LabelledImages) -> Callable[..., Any]:
    @functools.wraps(read)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        parts = read(self, *args, **kwargs)
        if hasattr(self, "labels"):  # then they are the first thing behind the images
            images.note_parts(parts)
        return parts

    return noted


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    launch = parse_command(MAMMOTH, argv)
    install(launch)
    launch.run()


if __name__ == "__main__":
    main()
