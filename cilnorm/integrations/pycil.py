"""PyCIL with another norm, in a checkout that stays as it is.

    cd PyCIL
    python -m cilnorm.integrations.pycil --norm tbbn -- --config exps/replay.json

Every convnet that PyCIL builds gets the norm. Which rows of a batch are past is known from the labels that its data
loaders hand out with the images. PyCIL trains on several GPUs with ``nn.DataParallel``, which is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cilnorm.integrations.labelled_images import LabelledImages, noting_loader
from cilnorm.integrations.launcher import Framework, Launch, parse_command
from cilnorm.integrations.telling_hook import LearnedClasses, TellingHook

__all__ = ["PYCIL", "install", "main"]

PYCIL = Framework("PyCIL", "f3509b8", ("main.py", "trainer.py", "utils/inc_net.py"))
OF_LEARNERS = ("_cur_task", "incremental_train")
ALONE = 'name one device in the configuration: "device": ["0"], or [-1] for the CPU'


class _Learner:
    """The learner that trains, and the classes of its tasks, which PyCIL numbers in the order of learning."""

    def __init__(self) -> None:
        self.learner: Any = None
        self.sizes: Any = None
        self.learned = LearnedClasses()

    def follow(self, learner: Any) -> None:
        """Looks at another learner from now on."""
        if missing := [name for name in OF_LEARNERS if not hasattr(learner, name)]:
            raise SystemExit(f"PyCIL's learner has no {missing[0]}; this integration was written for {PYCIL.commit}")
        train = learner.incremental_train

        def incremental_train(data_manager: Any) -> Any:
            self.sizes = data_manager.get_task_size
            return train(data_manager)

        self.learner, self.learned = learner, LearnedClasses()
        learner.incremental_train = incremental_train

    def classes(self) -> LearnedClasses:
        """The classes of its tasks so far."""
        while self.learned.task < self.learner._cur_task:
            start = sum(map(len, self.learned.tasks))
            self.learned.begin(range(start, start + self.sizes(len(self.learned.tasks))))
        return self.learned


def install(launch: Launch) -> TellingHook:
    """Wraps what PyCIL builds its networks, loaders and learners with; must come before PyCIL is imported.

    Raises:
        SystemExit: PyCIL lacks what is to be wrapped.
    """
    launch.enter()
    images, learner = LabelledImages(), _Learner()
    hook = TellingHook("PyCIL", images, learner.classes, alone=ALONE)
    torch.utils.data.DataLoader = noting_loader(images)  # type: ignore[misc]
    inc_net, factory = PYCIL.find("utils.inc_net", "get_convnet"), PYCIL.find("utils.factory", "get_model")
    get_convnet, get_model = inc_net.get_convnet, factory.get_model

    def converted_convnet(args: dict[str, Any], pretrained: bool = False) -> nn.Module:
        network = get_convnet(args, pretrained)
        if not isinstance(network, nn.Module):
            raise SystemExit(f"{args['convnet_type']} comes in two parts, and only the first is given images")
        launch.convert(network, hook)
        return network

    def followed_model(model_name: str, args: dict[str, Any]) -> Any:
        if len(args["device"]) > 1:
            raise SystemExit(f"nn.DataParallel cuts a batch without saying which rows go where; {ALONE}")
        model = get_model(model_name, args)
        learner.follow(model)
        return model

    inc_net.get_convnet, factory.get_model = converted_convnet, followed_model
    return hook


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    launch = parse_command(PYCIL, argv)
    install(launch)
    launch.run()


if __name__ == "__main__":
    main()
