"""Three tasks of CIFAR-100 in Avalanche, PyCIL or Mammoth: accuracies, what the norm was told, a step's cost.

    python -m benchmarks.frameworks pycil --checkout PyCIL --data DATA --method replay --norm tbbn
    python -m benchmarks.frameworks mammoth --checkout mammoth --data DATA --method er --norm none
    python -m benchmarks.frameworks avalanche --data DATA --method replay --norm tbbn

``DATA`` holds ``cifar-100-python``; ``--norm none`` is the framework as it is. Every class has few images and training
is short, so the accuracies show that it runs, not how good it is. What the loss is given is compared with what the norm
was told in the same pass. Seconds are CPU time of this process from a batch to the end of the optimiser's step, the
median over the third task; batches are loaded in this process. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from torchvision.datasets import cifar

from cilnorm import registry
from cilnorm.integrations import avalanche, mammoth, pycil, telling_hook
from cilnorm.integrations.launcher import Framework, parse_command
from cilnorm.norms import convert_norms

TASKS, NEW, TESTED = 3, 10, 5  # tasks, classes of each, images of a class to test on


class Record:
    """What a run does, step by step.

    Attributes:
        known: gives the number of classes learned before the running task.
        told: passes whose rows were told; how many had past rows besides current ones.
        checked: passes whose rows were compared with the targets of the loss that came next.
        left: passes with another one before the next loss, of a teacher in training mode say.
        accuracies: in %, over all classes so far, after each task.
        seconds: of each step, a list a task.
    """

    def __init__(self) -> None:
        self.known: Callable[[], int] = lambda: 0
        self.told = self.mixed = self.checked = self.left = 0
        self.accuracies: list[float] = []
        self.seconds: list[list[float]] = [[]]
        self._waiting: list[Tensor] = []
        self._since = 0.0

    def watch(self) -> None:
        """Wraps what every run passes through: tellings, losses, loaders, optimisers."""
        tell, iterate, begin = telling_hook.tell_rows, DataLoader.__iter__, DataLoader.__init__

        def in_this_process(loader: Any, *args: Any, **keywords: Any) -> None:
            begin(loader, *args, **(keywords | {"num_workers": 0}))

        def tell_rows(*models: Any, **rows: Any) -> Any:
            past = rows["past"]
            self._waiting.append(past)
            self.told, self.mixed = self.told + 1, self.mixed + bool(past.any() and not past.all())
            return tell(*models, **rows)

        def timed(loader: Any) -> Iterator[Any]:
            for batch in iterate(loader):
                self._since = time.process_time()
                yield batch

        telling_hook.tell_rows = tell_rows  # type: ignore[assignment]
        DataLoader.__init__ = in_this_process  # type: ignore[method-assign]
        DataLoader.__iter__ = timed  # type: ignore[assignment,method-assign]
        register_optimizer_step_post_hook(self._stepped)
        for name in ("cross_entropy", "binary_cross_entropy_with_logits", "mse_loss"):
            setattr(F, name, self.compared(getattr(F, name)))

    def compared(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The loss, which first compares its targets with the rows that were told for the pass before it."""

        def compare(logits: Tensor, targets: Tensor, *args: Any, **keywords: Any) -> Any:
            if self._waiting and torch.is_grad_enabled():
                past, known = self._waiting.pop(), self.known()
                self.left, self._waiting = self.left + len(self._waiting), []
                if targets.dim() == 1:
                    self._equal(past, targets < known)
                elif loss.__name__ == "binary_cross_entropy_with_logits":
                    self._equal(past, targets[:, known:].amax(1) < 1)
            return loss(logits, targets, *args, **keywords)

        return compare

    def task_ends(self, accuracy: float) -> None:
        """Notes a task's accuracy; the next one begins."""
        self.accuracies.append(round(accuracy, 1))
        self.seconds.append([])

    def _equal(self, told: Tensor, true: Tensor) -> None:
        if not torch.equal(told, true.cpu()):
            raise AssertionError(f"{int(told.sum())} of {len(told)} rows were told to be past, {int(true.sum())} are")
        self.checked += 1

    def _stepped(self, *_: Any) -> None:
        self.seconds[-1].append(time.process_time() - self._since)


def write_few(root: Path, folder: Path, each: int, tested: int = TESTED) -> None:
    """The first images of every class, as CIFAR-100's own files."""
    data = registry.load().datasets["cifar100"].build(root)
    train, test = (data.train_images, data.train_labels, each), (data.test_images, data.test_labels, tested)
    contents: dict[str, Any] = {"meta": {"fine_label_names": list(data.class_names)}}
    for name, (images, labels, count) in (("train", train), ("test", test)):
        rows = torch.cat([(labels == label).nonzero()[:count, 0] for label in labels.unique()])
        contents[name] = {"data": images[rows].flatten(1).numpy(), "fine_labels": labels[rows].tolist()}
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))


def prepare_pycil(
    record: Record, method: str, numbers: Mapping[str, Any], settings: Mapping[str, Any], score: str = "cnn"
) -> list[str]:
    """Has three tasks of PyCIL's method recorded; returns its arguments.

    Args:
        numbers: constants of the method's module, in the place of its own where it has them.
        settings: beside those that every run here has.
        score: which of PyCIL's two accuracies is noted, ``cnn`` or ``nme``.
    """
    manager, factory = importlib.import_module("utils.data_manager"), importlib.import_module("utils.factory")
    module, get_model = importlib.import_module(f"models.{method}"), factory.get_model

    def watched_model(name: str, args: Any) -> Any:
        learner = get_model(name, args)
        evaluate = learner.eval_task

        def eval_task(*args: Any) -> Any:
            found = evaluate(*args)
            record.task_ends(float(found[("cnn", "nme").index(score)]["top1"]))
            return found

        record.known, learner.eval_task = lambda: learner._known_classes, eval_task
        return learner

    for name, value in numbers.items():
        if hasattr(module, name):
            setattr(module, name, value)
    factory.get_model = watched_model
    manager.DataManager.nb_tasks = property(lambda self: TASKS)
    fixed = {"dataset": "cifar100", "shuffle": True, "init_cls": NEW, "increment": NEW, "device": [-1]}
    Path("settings.json").write_text(json.dumps({**fixed, "model_name": method, **settings}), encoding="utf-8")
    return ["--config", "settings.json"]


def run_pycil(asked: argparse.Namespace, record: Record) -> list[str]:
    """Prepares PyCIL; returns its arguments."""
    module = importlib.import_module(f"models.{asked.method}")
    if hasattr(module, "nca"):
        module.nca = record.compared(module.nca)
    write_few(asked.data, Path("data/cifar-100-python"), asked.images)
    settings = {
        "prefix": "three", "memory_size": asked.memory, "seed": [1993],
        "convnet_type": "cosine_resnet32" if asked.method == "podnet" else "resnet32",
    }  # fmt: skip
    short = {"init_epoch": 1, "epochs": 1, "ft_epochs": 1, "batch_size": asked.rows}
    return prepare_pycil(record, asked.method, short, settings)


def run_mammoth(asked: argparse.Namespace, record: Record) -> list[str]:
    """Prepares Mammoth; returns its arguments."""
    here = Path.cwd()
    learner = importlib.import_module("models.utils.continual_model").ContinualModel
    os.chdir(asked.checkout)  # where Mammoth looks for its own files
    begin_task, end_eval = learner.meta_begin_task, learner.meta_end_eval

    def watched_begin(self: Any, dataset: Any) -> Any:
        record.known = lambda: self.n_past_classes
        return begin_task(self, dataset)

    def watched_end(self: Any, dataset: Any, accuracies: Any) -> Any:
        record.task_ends(float(np.mean(accuracies[0])))
        return end_eval(self, dataset, accuracies)

    learner.meta_begin_task, learner.meta_end_eval = watched_begin, watched_end
    write_few(asked.data, here / "CIFAR100/cifar-100-python", asked.images)
    words = f"--model {asked.method} --dataset seq-cifar100 --backbone reduced-resnet18 --lr 0.05"
    words += f" --buffer_size {asked.memory} --batch_size {asked.rows} --n_epochs 1 --stop_after {TASKS} --seed 0"
    words += f" --base_path {here}/ --non_verbose 1" + (" --alpha 0.1 --beta 0.5" if asked.method == "derpp" else "")
    return words.split()


def run_avalanche(asked: argparse.Namespace, record: Record) -> None:
    """Trains a SlimResNet18 with Avalanche, classes in the order of their labels."""
    from avalanche.benchmarks.scenarios import class_incremental_benchmark
    from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
    from avalanche.models import SlimResNet18
    from avalanche.training import plugins
    from avalanche.training.supervised import Naive

    made = {
        "replay": lambda: [plugins.ReplayPlugin(mem_size=asked.memory)],
        "lwf": lambda: [plugins.ReplayPlugin(mem_size=asked.memory), plugins.LwFPlugin()],
        "agem": lambda: [plugins.AGEMPlugin(patterns_per_experience=asked.memory // TASKS, sample_size=asked.rows)],
    }[asked.method]()
    data = registry.load().datasets["cifar100"].build(asked.data)
    parts = (data.train_images, data.train_labels, asked.images), (data.test_images, data.test_labels, TESTED)
    datasets = []
    for images, labels, each in parts:
        rows = torch.cat([(labels == label).nonzero()[:each, 0] for label in range(TASKS * NEW)])
        pixels = (images[rows].float() / 255 - 0.5) * 4
        datasets.append(_make_taskaware_tensor_classification_dataset(pixels, labels[rows], task_labels=0))
    order = list(range(TASKS * NEW))
    stream = class_incremental_benchmark(
        {"train": datasets[0], "test": datasets[1]}, class_order=order, num_experiences=TASKS
    )
    torch.manual_seed(0)
    model = SlimResNet18(TASKS * NEW)
    if asked.norm != "none":
        options = {"splits": "auto"} if asked.norm == "tbbn" else {}
        convert_norms(model, asked.norm, **options)
        made.append(avalanche.CompositionPlugin())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    strategy = Naive(
        model=model, optimizer=optimiser, train_mb_size=asked.rows, train_epochs=1, plugins=made,
        evaluator=plugins.EvaluationPlugin(),
    )  # fmt: skip
    record.known = lambda: NEW * strategy.experience.current_experience
    for task, experience in enumerate(stream.train_stream):
        strategy.train(experience)
        seen = datasets[1].targets.data  # class after class
        model.eval()
        with torch.no_grad():
            images = torch.stack([datasets[1][row][0] for row in range((task + 1) * NEW * TESTED)])
            guesses = model(images)[:, : (task + 1) * NEW].argmax(1)
        record.task_ends(100 * (guesses == torch.as_tensor(seen[: len(guesses)])).float().mean().item())


def run_checkout(asked: argparse.Namespace, record: Record) -> None:
    """Trains with PyCIL or Mammoth, by their own ``main.py``."""
    module, prepare = {"pycil": (pycil, run_pycil), "mammoth": (mammoth, run_mammoth)}[asked.framework]
    framework: Framework = getattr(module, asked.framework.upper())
    words = ["--norm", asked.norm, "--checkout", str(asked.checkout)]
    if asked.framework == "mammoth":
        words.append(f"--{mammoth.WITHOUT_CLIP}")
        mammoth.leave_out_clip()
    if asked.norm == "none":
        sys.path.insert(0, str(asked.checkout))
    else:
        module.install(parse_command(framework, words))
    record.watch()
    torch.set_num_threads = lambda _: None  # Mammoth asks for two, and seconds are those of all threads
    cifar.check_integrity = lambda path, md5=None: Path(path).is_file()  # for there are fewer images
    with tempfile.TemporaryDirectory() as folder:
        main_file = str(asked.checkout / "main.py")
        os.chdir(folder)
        sys.argv = [main_file, *prepare(asked, record)]
        runpy.run_path(main_file, run_name="__main__")
        os.chdir(asked.checkout)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs one method with one norm; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=["avalanche", "mammoth", "pycil"])
    parser.add_argument("--checkout", type=Path, default=Path(), help="of PyCIL or Mammoth")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", required=True, help="theirs; of Avalanche: replay, lwf, agem")
    parser.add_argument("--norm", required=True)
    parser.add_argument("--images", type=int, default=20, help="of each class, to train on")
    parser.add_argument("--memory", type=int, default=200, help="images that are kept")
    parser.add_argument("--rows", type=int, default=16, help="of a batch")
    asked = parser.parse_args(argv)
    asked.checkout, asked.data = asked.checkout.resolve(), asked.data.resolve()
    record = Record()
    if asked.framework == "avalanche":
        record.watch()
        run_avalanche(asked, record)
    else:
        run_checkout(asked, record)
    found = {
        "framework": asked.framework, "method": asked.method, "norm": asked.norm, "accuracies": record.accuracies,
        "told": record.told, "mixed": record.mixed, "checked": record.checked, "left": record.left,
        "step": round(statistics.median(record.seconds[TASKS - 1]), 4),
    }  # fmt: skip
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
