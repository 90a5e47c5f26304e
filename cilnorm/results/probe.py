"""How much of a run's forgetting is in its normalisation layers: re-tune them alone, on the data of all tasks.

The motivation of Cha et al., CVPR 2023 (https://arxiv.org/abs/2201.12559). The released code does not hold this
experiment; what is computed here: the network after the last task, all of it frozen but its norm layers, and those
changed on the training images of all tasks together in one of three ways,

    statistics   running averages measured anew, γ and β as they were
    affine       γ and β trained by cross-entropy over all logits, running averages as they were
    both         γ and β trained, running averages following

Beside it, layer by layer, how far the running averages lie from what the same layer measures on the images of all
tasks, of the old tasks, of the newest one, and of each task: mean over channels of |μ_run − μ| / σ, and of
|log(σ_run / σ)|.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm import registry as registries
from cilnorm.batch import Composition, Task, modules_within, set_composition
from cilnorm.experiment.assembly import Assembly
from cilnorm.experiment.evaluation import measure_accuracy
from cilnorm.experiment.finished import opened
from cilnorm.files import write_atomically
from cilnorm.network import Network
from cilnorm.registry import Registry
from cilnorm.results.probe_section import task_distances
from cilnorm.spec import Spec
from cilnorm.storage.figures import COLOURS, save
from cilnorm.storage.run_folder import FolderError, RunFolder
from cilnorm.telling import tell_batch
from cilnorm.training.batches import EpochBatches, draw_batches
from cilnorm.training.epoch_plan import RowSource, plan_epoch
from cilnorm.training.protocol import Protocol
from cilnorm.training.randomness import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Probe", "bn_bias", "distances", "norm_layers"]

VARIANTS = ("statistics", "affine", "both")
MEASURED = 10_000  # images on which statistics are measured, at most
OF_TASK = 2_000  # the same of a single task


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        accuracy: percent on each task, ``before`` and after each variant; ``statistics`` is missing for layers that
            keep no averages.
        layers: a row a layer and kind of images: ``layer``, ``images`` (all, old, new), ``mean``, ``scale``.
        tasks: a row a layer and task: ``layer``, ``images`` (task), ``task`` (from 1), ``mean``, ``scale``.
    """

    accuracy: dict[str, list[float]]
    layers: list[dict[str, Any]]
    settings: dict[str, Any]
    tasks: list[dict[str, Any]] = field(default_factory=list)


def bn_bias(
    folder: Path,
    *,
    epochs: int = 5,
    lr: float | None = None,
    device: str = "auto",
    data_root: Path | None = None,
    registry: Registry | None = None,
    tell: Callable[[str], None] = lambda text: None,
    out: Path | None = None,
) -> Probe:
    """Probes a finished run; writes ``bn-bias.json``, ``.csv``, ``.png`` and ``.svg``, and changes nothing of the run.

    Args:
        out: the folder of these files; ``probes/`` in the run's own by default.
        epochs: passes over the images of all tasks, for the variants that train.
        lr: their learning rate; a tenth of the run's own by default. Momentum and weight decay are the run's.
        tell: hears a line about each step.

    Raises:
        FolderError: the run is not finished, or ``out`` can't be written.
        SpecError, DatasetError, CheckpointError: it can't be loaded.
    """
    registry = registry or registries.load()
    spec = RunFolder(folder).read_spec(registry)
    out = out or folder / "probes"
    try:  # to know before the work whether its result has a place
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise FolderError(f"can't write {out}: {error.strerror or error}; give --out another folder") from error
    with opened(folder, spec, registry, device, data_root) as (parts, _):
        tasks = parts.tasks(spec)
        lr = spec.schedule.lr / 10 if lr is None else lr
        work = _Work(spec, replace(parts, net=parts.net.eval()), tasks, registry)
        accuracy = {"before": measure_accuracy(spec, parts, tasks[-1])[0]}
        tell(_line("before", accuracy["before"]))
        for variant in VARIANTS:
            if variant != "affine" and not work.keeps_averages:
                continue
            net = work.retuned(variant, epochs, lr)
            accuracy[variant] = measure_accuracy(spec, replace(parts, net=net), tasks[-1])[0]
            tell(_line(variant, accuracy[variant]))
        layers, by_task = (work.layers(), work.by_task()) if work.keeps_averages else ([], [])
    settings = {"epochs": epochs, "lr": lr, "momentum": spec.schedule.momentum, "norm": spec.norm, "seed": spec.seed}
    probe = Probe(accuracy, layers, settings, by_task)
    _write(probe, out, f"{spec.method} x {spec.norm}, seed {spec.seed}")
    return probe


def _line(name: str, row: Sequence[float]) -> str:
    old = sum(row[:-1]) / max(len(row) - 1, 1)
    means = (sum(row) / len(row), old, row[-1])
    return "{:>10}: {:6.2f} % on all tasks, {:6.2f} on the old ones, {:6.2f} on the newest".format(name, *means)


@dataclass(frozen=True, eq=False)
class _Work:
    """A finished network and the images of its tasks; the network stays as it is."""

    spec: Spec
    parts: Assembly
    tasks: Sequence[Task]
    registry: Registry

    @property
    def keeps_averages(self) -> bool:
        return any(_averages(layer) is not None for layer in self._layers(self.parts.net))

    def _layers(self, net: nn.Module) -> list[nn.Module]:
        return list(norm_layers(net, self.spec, self.registry).values())

    def images(self, tasks: Sequence[Task]) -> Tensor:
        return torch.cat([self.parts.stream.train(task) for task in tasks])

    def retuned(self, variant: str, epochs: int, lr: float) -> Network:
        """A copy of the network whose norm layers alone were changed, as ``variant`` says."""
        net = copy.deepcopy(self.parts.net).requires_grad_(False).eval()
        for module in modules_within(net, "learning", "frozen"):
            module.__dict__["role"] = "learning"
        layers = self._layers(net)
        pool = self.images(self.tasks)
        if variant != "affine":
            for layer in layers:
                _start_anew(layer)
                layer.train()
            self._observe(net)
            with torch.no_grad():
                for batch in self._batches(pool, "statistics", 0):
                    tell_batch(net, batch, self.tasks[-1])
                    net(batch.images)
        if variant != "statistics":
            for layer, original in zip(layers, self._layers(self.parts.net), strict=True):
                layer.momentum = getattr(original, "momentum", None)  # type: ignore[assignment]
            self._train(net, layers, pool, epochs, lr)
        return net.eval()

    def _train(self, net: Network, layers: Sequence[nn.Module], pool: Tensor, epochs: int, lr: float) -> None:
        parameters = [p.requires_grad_() for layer in layers for p in layer.parameters()]
        if not parameters:
            return
        schedule = self.spec.schedule
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay)
        for epoch in range(epochs):
            for batch in self._batches(pool, "affine", epoch):
                loss = F.cross_entropy(net(batch.images).logits, batch.targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        net.requires_grad_(False)

    def layers(self) -> list[dict[str, Any]]:
        """Distances of the running averages from what each layer measures on three kinds of images."""
        kinds = {"all": self.tasks, "old": self.tasks[:-1], "new": self.tasks[-1:]}
        rows = []
        for kind, tasks in kinds.items():
            if tasks:
                rows += [{"layer": name, "images": kind, **far} for name, far in self._far(self.images(tasks)).items()]
        return rows

    def by_task(self) -> list[dict[str, Any]]:
        """The same distances from what each layer measures on the images of each task alone, as many of all."""
        rows = []
        for task in self.tasks:
            far = self._far(self.images([task]), OF_TASK)
            rows += [{"layer": name, "images": "task", "task": task.index + 1, **found} for name, found in far.items()]
        return rows

    def _far(self, pool: Tensor, most: int = MEASURED) -> dict[str, dict[str, float]]:
        net = self.parts.net.eval()
        layers = {name: layer for name, layer in norm_layers(net, self.spec, self.registry).items() if _averages(layer)}
        recorders = {name: copy.deepcopy(layer).train() for name, layer in layers.items()}
        told = nn.ModuleList(recorders.values())
        self._observe(told)
        handles = []
        for name, layer in layers.items():
            _start_anew(recorders[name])
            handles.append(layer.register_forward_pre_hook(_recording(recorders[name])))
        shuffled = torch.randperm(len(pool), generator=generator(self.spec.seed, "probe"))[:most]
        with torch.no_grad():
            for batch in self._batches(pool[shuffled], "measure", 0):
                tell_batch(told, batch, self.tasks[-1])
                net(batch.images)
        for handle in handles:
            handle.remove()
        return {name: distances(layer, recorders[name]) for name, layer in layers.items()}

    def _observe(self, net: nn.Module) -> None:
        """Rows of every task in one batch have no cut between current and past ones."""
        composition = Composition.of_one_kind(sum(self.spec.rows), self.tasks[-1].index)
        set_composition(net, composition, expect_listeners=False)

    def _batches(self, pool: Tensor, name: str, epoch: int) -> EpochBatches:
        """One pass, augmented as in training."""
        spec, parts, rows = self.spec, self.parts, sum(self.spec.rows)
        composition = Composition.of_one_kind(rows, self.tasks[-1].index)
        plan = plan_epoch([RowSource(pool, rows, f"probe {name}")], composition, Protocol(), spec.seed, (0, 0), epoch)
        stream = generator(spec.seed, f"probe {name} augmentation", epoch)
        return draw_batches(plan, parts.train, parts.stream.targets, stream)


def norm_layers(net: nn.Module, spec: Spec, registry: Registry) -> dict[str, nn.Module]:
    """The layers of a network that the spec's norm built and that are used, by name."""
    kind = type(registry.norms[spec.norm].build(16, **spec.norm_options))
    used = modules_within(net, "learning", "frozen")
    known = set(map(id, used))
    return {name: module for name, module in net.named_modules() if type(module) is kind and id(module) in known}


def _averages(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Running mean and deviation (C,), or None where a layer keeps none."""
    mean = getattr(layer, "running_mean", None)
    std, var = getattr(layer, "running_std", None), getattr(layer, "running_var", None)
    if mean is None or (std is None and var is None):
        return None
    return mean, std if std is not None else (var + layer.eps).sqrt()


def _recording(recorder: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that shows a layer's input to another layer as well."""

    def show(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        recorder(inputs[0])

    return show


def distances(layer: nn.Module, measured: nn.Module) -> dict[str, float]:
    """Mean over channels of |μ_run − μ| / σ and of |log(σ_run / σ)| between the averages of two layers."""
    ours, theirs = _averages(layer), _averages(measured)
    assert ours is not None
    assert theirs is not None
    (mean, std), (mean_there, std_there) = ours, theirs
    scale = (std / std_there).log().abs().mean()
    return {"mean": float(((mean - mean_there).abs() / std_there).mean()), "scale": float(scale)}


def _start_anew(layer: Any) -> None:
    """Averages from nothing, over all batches alike where the layer can do so."""
    if hasattr(layer, "reset_running_stats"):
        layer.reset_running_stats()
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.momentum = None


def _write(probe: Probe, folder: Path, title: str) -> None:
    content = {"accuracy": probe.accuracy, "layers": probe.layers, "settings": probe.settings, "tasks": probe.tasks}
    write_atomically(folder / "bn-bias.json", json.dumps(content, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, ["layer", "images", "mean", "scale", "task"], lineterminator="\n")
    writer.writeheader()
    writer.writerows([*probe.layers, *probe.tasks])
    write_atomically(folder / "bn-bias.csv", text.getvalue())
    save(figure(probe, title), folder, "bn-bias")


def figure(probe: Probe, title: str) -> Figure:
    """Accuracy before and after on the old tasks, the newest and all; the distances by layer, and by task."""
    from matplotlib.figure import Figure

    panels = 4 if probe.layers else 1
    drawing = Figure(figsize=(4.6 * panels, 3.8), layout="constrained")
    axes = drawing.subplots(1, panels, squeeze=False)[0]
    names = ["old tasks", "newest task", "all tasks"]
    room = 0.8 / len(probe.accuracy)
    for number, (variant, row) in enumerate(probe.accuracy.items()):
        heights = [sum(row[:-1]) / max(len(row) - 1, 1), row[-1], sum(row) / len(row)]
        places = [at - 0.4 + room * (number + 0.5) for at in range(3)]
        colour = "#8a8f98" if variant == "before" else COLOURS[number - 1]
        bars = axes[0].bar(places, heights, room * 0.92, color=colour, label=variant)
        axes[0].bar_label(bars, fmt="%.0f", fontsize=7)
    axes[0].set(xticks=range(3), xticklabels=names, ylabel="accuracy (%)", title=title)
    axes[0].set_ylim(0, 1.25 * axes[0].get_ylim()[1])  # room for the legend
    axes[0].legend(frameon=False, fontsize=8)
    labels = {"mean": r"$|\mu_{run}-\mu|\,/\,\sigma$", "scale": r"$|\log(\sigma_{run}/\sigma)|$"}
    for ax, (measure, label) in zip(axes[1:], labels.items(), strict=False):
        for number, kind in enumerate(dict.fromkeys(row["images"] for row in probe.layers)):
            values = [row[measure] for row in probe.layers if row["images"] == kind]
            depths = range(1, len(values) + 1)
            ax.plot(depths, values, "o-", markersize=3.5, color=COLOURS[number], label=f"from {kind} images")
        ax.set(xlabel="norm layer, from the input on", ylabel=label, title="distance of running averages")
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=8)
        ax.grid(alpha=0.25)
    if probe.layers:
        for number, (name, points) in enumerate(task_distances({"tasks": probe.tasks}).items()):
            axes[3].plot(*zip(*points, strict=True), "o-", markersize=3.5, color=COLOURS[number], label=name)
        tasks = sorted({row["task"] for row in probe.tasks})
        axes[3].set(xlabel="task", ylabel="mean over layers", title="distance from each task", xticks=tasks)
        axes[3].set_ylim(bottom=0)
        axes[3].legend(frameon=False, fontsize=8)
        axes[3].grid(alpha=0.25)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return drawing
