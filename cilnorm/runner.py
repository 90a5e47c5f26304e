"""The stream, from the first task to the last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cilnorm import registry as registries
from cilnorm.assemble import Assembly, pick_device
from cilnorm.batch import Composition, Task
from cilnorm.capture import engine_class
from cilnorm.checkpoint import Checkpoints, State
from cilnorm.engine import Engine
from cilnorm.evaluation import accuracies, class_means, embed, held_out_loss, scored
from cilnorm.events import Teller, Watcher
from cilnorm.feed import Feed, feed
from cilnorm.figures import draw_figures
from cilnorm.folder import RunFolder, default_folder
from cilnorm.guard import Interruptions, RunStopped, held, recorded
from cilnorm.memory import Memory, per_class
from cilnorm.method import Phase
from cilnorm.precise import measure_anew
from cilnorm.precision import Precision, chosen_precision, products
from cilnorm.protocol import Part, Plan, Protocol, plan_epoch
from cilnorm.registry import Registry
from cilnorm.running import freeze_statistics
from cilnorm.spec import Spec, to_mapping
from cilnorm.streams import generator, initial_weights
from cilnorm.trials import Means, answered, choose, first_parts

__all__ = ["Result", "RunStopped", "resume", "run"]


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
        folder: where its files are.
        matrix: accuracies in percent; row t holds those on tasks 0 .. t after learning task t.
        summary: A_f, A_a, F, forgetting, A_l and BWT in percent, steps and seconds.
    """

    folder: Path
    matrix: list[list[float]]
    summary: dict[str, Any]


def run(
    spec: Spec,
    out: Path | str | None = None,
    *,
    device: str = "auto",
    data_root: Path | None = None,
    registry: Registry | None = None,
    watch: Sequence[Watcher] = (),
    overwrite: bool = False,
    go_on: bool = False,
    checkpoint_every: float | None = None,
) -> Result:
    """Runs a spec from the first task to the last.

    Args:
        out: the run's folder; by default a new one under ``runs/``.
        device: torch's name for it, or ``auto``.
        data_root: where data sets lie; their own default otherwise.
        watch: called with every event, as events.jsonl has them, and with ``step`` events besides.
        overwrite: replace a run that is in ``out`` already.
        go_on: resume one of the same spec that is there.
        checkpoint_every: seconds between checkpoints within an epoch; one is written after every epoch anyway.

    Raises:
        SpecError, DatasetError, FolderError: before anything is trained.
        RunStopped: during training; the folder keeps what was done.
        Interrupted: a signal ended it; what was done is saved.
    """
    registry = registry or registries.load()
    path = Path(out) if out else default_folder(spec)
    means = Means(registry, pick_device(device), data_root, watch, Interruptions(checkpoint_every))
    if not (go_on and answered(path, spec, registry)):
        if not go_on:  # else another process may be about to begin it
            RunFolder.check(path, overwrite, registry.logger_files)
        parts = first_parts(means, spec)
        with held(path), means.stops:
            if not (go_on and answered(path, spec, registry)):  # another process may have begun it meanwhile
                folder = RunFolder.create(path, spec, overwrite, registry.logger_files)
                return _whole(means, folder, spec, parts)
    return _resume(means, path)


def resume(
    folder: Path | str,
    *,
    device: str = "auto",
    data_root: Path | None = None,
    registry: Registry | None = None,
    watch: Sequence[Watcher] = (),
    checkpoint_every: float | None = None,
) -> Result:
    """Continues a run from its last checkpoint, to the same numbers as if it had never stopped.

    Raises:
        SpecError, DatasetError, FolderError, CheckpointError: it can't be continued.
    """
    registry = registry or registries.load()
    RunFolder.require(Path(folder))  # nothing is made where no run is
    means = Means(registry, pick_device(device), data_root, watch, Interruptions(checkpoint_every))
    return _resume(means, Path(folder))


def _resume(means: Means, path: Path) -> Result:
    with held(path), means.stops:
        folder = RunFolder(path)
        return _whole(means, folder, folder.read_spec(means.registry))


def _whole(means: Means, folder: RunFolder, spec: Spec, parts: Assembly | None = None) -> Result:
    """Whatever is still to be done of a run: options that are to be chosen, and all that comes after the checkpoint."""
    chosen = choose(means, folder, spec, _rest)
    return _rest(means, folder, chosen, parts or means.assemble(chosen))


def _rest(means: Means, folder: RunFolder, spec: Spec, parts: Assembly) -> Result:
    """All that comes after the last checkpoint; the whole run where there is none."""
    state, warning = _checkpoints(spec, parts, folder).read(parts.net, parts.stream.tasks)
    folder.reopen(state.logged, state.matrix)
    tell = Teller(folder, means.watch, state.seconds)
    if warning:
        tell("warning", text=warning)
    run = _Run(spec, parts, state, folder, tell, means.stops)
    with products(_precision(run)):
        return _learn(run, means.registry)


@dataclass(frozen=True, eq=False)
class _Run:
    """What every part of a run needs; ``state`` alone changes."""

    spec: Spec
    parts: Assembly
    state: State
    folder: RunFolder
    tell: Teller
    stops: Interruptions


def _learn(run: _Run, registry: Registry) -> Result:
    """Task after task: grow, train phase after phase, measure anew, remember, choose exemplars, evaluate."""
    spec, parts, state, folder, tell = run.spec, run.parts, run.state, run.folder, run.tell
    names = {name: getattr(spec, name) for name in ("method", "norm", "backbone", "dataset", "preset", "seed")}
    with recorded(spec, state, folder, tell):
        changed = folder.write_environment(registry, parts.device, parts.images, parts.order)
        if state.task < (spec.stop_after or spec.tasks):  # who reads the summary of a finished run finds it finished
            folder.write_summary("running", state.matrix, state.by_head)
        tell(
            "run",
            folder=str(folder.path),
            tasks=spec.stop_after or spec.tasks,
            notice=parts.images.notice,
            steps=state.steps,
            matrix=list(state.matrix),
            **names,
        )
        if changed:
            tell("warning", text=f"going on in another environment, which may change the numbers: {'; '.join(changed)}")
        for task in parts.stream.tasks[state.task : spec.stop_after]:
            tell("task", task=task.index + 1, classes=task.new, seen=task.seen, memory=len(state.memory))
            if not state.midway:
                _grow(run, task)
            for phase in parts.method.phases(task)[state.phase :]:
                _train(run, task, phase)
                state.phase, state.epoch, state.best, state.pool, state.optimizer = state.phase + 1, 0, None, None, None
            if spec.statistics.precise != "never":
                measure_anew(spec, parts, state.memory, task)
            state.past = parts.method.remember(parts.net, task, partial(_seen_batches, run, task))
            state.memory = _memory_with(run, task)
            scores = _evaluate(run, task)
            state.task, state.phase = task.index + 1, 0
            tell("accuracy", task=task.index + 1, **scores, memory=len(state.memory))
            folder.write_accuracy(state.matrix)
            folder.write_summary("running", state.matrix, state.by_head)
            _save(run)
        title = f"{spec.method} x {spec.norm}, {spec.backbone}, {spec.dataset}, seed {spec.seed}"
        draw_figures(folder.path / "figures", state.matrix, title)
        facts = {"steps": state.steps, "seconds": round(tell.seconds, 2)}
        summary = folder.write_summary("finished", state.matrix, state.by_head, **facts)
    tell("finished", **summary)
    return Result(folder.path, state.matrix, summary)


def _train(run: _Run, task: Task, phase: Phase) -> None:
    """The epochs of a phase that are still to be done, a checkpoint after each."""
    spec, parts, state, net = run.spec, run.parts, run.state, run.parts.net
    schedule = phase.schedule_in(spec.schedule.in_task(task.index))
    if state.pool is None:
        state.pool = _pool(run, task, phase)
    if spec.statistics.freeze == "after-first" and task.index:
        freeze_statistics(net, spec.statistics.freeze_affine)
    made = engine_class(spec.engine, parts.device)
    engine = made(net, parts.method, task, phase, schedule, state.past, spec.seed, _precision(run))
    if state.optimizer is not None:
        engine.load_optimizer(state.optimizer)
    for epoch in range(state.epoch, schedule.epochs):
        plan = _plan(run, task, phase, epoch)
        engine.start_epoch(epoch, state.step, state.sums)
        with run.stops.between_steps():
            batches = _feed(run, plan, (task.index, state.phase, epoch))
            for step, _ in enumerate(engine.epoch(batches, state.step), state.step + 1):
                run.tell.step(step, plan.steps, epoch, schedule.epochs)
                if run.stops.due and step < plan.steps:
                    engine.finish_epoch()  # raises rather than save a network that is lost
                    state.step, state.sums = step, engine.sums
                    _save(run, engine)
            terms = engine.finish_epoch()
            state.epoch, state.step, state.sums, state.steps = epoch + 1, 0, {}, state.steps + plan.steps
            state.best = _best(run, task)
            where = {"task": task.index + 1, "phase": phase.name, "epoch": epoch + 1, "of": schedule.epochs}
            run.tell("epoch", **where, lr=schedule.rate(epoch), steps=plan.steps, terms=terms)
            _save(run, engine)
    if state.best is not None:
        net.load_state_dict(state.best[1])


def _precision(run: _Run) -> Precision:
    return chosen_precision(run.spec.precision, run.parts.device)


def _save(run: _Run, engine: Engine | None = None) -> None:
    """Writes a checkpoint of all that was done and logged so far; then, if a signal asked for it, the run stops."""
    run.state.seconds, run.state.logged = run.tell.seconds, run.folder.logged()
    _checkpoints(run.spec, run.parts, run.folder).write(run.state, run.parts.net, engine)
    run.stops.saved()


def _checkpoints(spec: Spec, parts: Assembly, folder: RunFolder) -> Checkpoints:
    """Those of this spec and these images."""
    return Checkpoints(folder.checkpoints, {"spec": spec.key, "images": parts.images.digest}, to_mapping(spec))


def _grow(run: _Run, task: Task) -> None:
    """New outputs, drawn from the task's own stream; the method may look at the new classes' embeddings for them."""
    parts = run.parts
    embedded = embed(parts.net, parts.train)
    with initial_weights(run.spec.seed, 1 + task.index):
        parts.method.grow(parts.net, task, lambda: [embedded(images) for images in parts.stream.by_class(task)])
    parts.net.to(parts.device)


def _pool(run: _Run, task: Task, phase: Phase) -> Tensor:
    """The images that a phase's first rows are drawn from, as ``Phase.rows`` says."""
    if phase.rows == "balanced":
        return _memory_with(run, task).indices
    spec, state = run.spec, run.state
    current, stored = run.parts.stream.train(task), state.memory.indices
    if phase.rows == "even":
        order = torch.randperm(len(current), generator=generator(spec.seed, "even", task.index, state.phase))
        return torch.cat([stored, current[order[: len(stored)]]])
    times = 2 if phase.rows == "doubled" else int(spec.protocol.current_rows == "union")
    return torch.cat([current, *[stored] * times])


def _plan(run: _Run, task: Task, phase: Phase, epoch: int) -> Plan:
    """The epoch's batches: current rows beside past ones, or, where there is no such cut, rows of one kind."""
    spec, state = run.spec, run.state
    assert state.pool is not None
    rows = sum(spec.rows)
    sources, composition = [Part(state.pool, rows, phase.rows)], Composition(rows, 0, task.index)
    if phase.rows in ("mixed", "doubled") and task.index:
        current, past = spec.rows
        sources = [Part(state.pool, current, "current"), Part(state.memory.indices, past, "past")]
        composition = Composition(current, past, task.index)
    return plan_epoch(sources, composition, spec.protocol, spec.seed, (task.index, state.phase), epoch)


def _feed(run: _Run, plan: Plan, position: tuple[int, ...]) -> Feed:
    """The plan's batches; ``position`` names the epoch's stream of augmentation."""
    stream = generator(run.spec.seed, "augmentation", *position)
    return feed(plan, run.parts.train, run.parts.stream.targets, stream)


def _seen_batches(run: _Run, task: Task) -> Feed:
    """One pass over all that the task was trained on, current and remembered, for methods that measure something."""
    spec, state = run.spec, run.state
    pool = torch.cat([run.parts.stream.train(task), state.memory.indices])
    rows = sum(spec.rows)
    composition, position = Composition(rows, 0, task.index), (task.index, state.phase)
    plan = plan_epoch([Part(pool, rows, "seen")], composition, Protocol(), spec.seed, position, 0)
    return _feed(run, plan, (*position, 0))


def _memory_with(run: _Run, task: Task) -> Memory:
    """The memory with the task's classes in it, chosen by the network as it is."""
    protocol = run.spec.protocol
    return run.state.memory.collect(
        run.parts.stream.by_class(task),
        embed(run.parts.net, run.parts.train),
        per_class(run.spec.memory, task.seen, protocol.budget),
        protocol.herding,
        protocol.herd_again,
    )


def _evaluate(run: _Run, task: Task) -> dict[str, list[float]]:
    """Adds the task's row to the matrix, and the head's to its own where it does not fill the matrix; returns both."""
    state, parts = run.state, run.parts
    by_head, confusion = accuracies(run.spec, parts, task)
    scores = {"accuracy": by_head}
    if run.spec.classifier == "nme":
        means = class_means(parts.net, parts.train, state.memory.exemplars)
        accuracy, confusion = accuracies(run.spec, parts, task, means)
        state.by_head.append(by_head)
        scores = {"accuracy": accuracy, "by_head": by_head}
    state.matrix.append(scores["accuracy"])
    run.folder.write_confusion(confusion)
    return scores


def _best(run: _Run, task: Task) -> tuple[float, dict[str, Tensor]] | None:
    """The best weights of the phase so far, by loss on the current task's held-out images alone; NaN is the worst."""
    parts, best = run.parts, run.state.best
    if run.spec.protocol.keep == "last":
        return None
    indices = scored(run.spec, parts.stream.validation(task))
    loss = held_out_loss(parts.net, parts.train, indices, parts.stream.targets[indices].to(parts.device))
    loss = math.inf if math.isnan(loss) else loss
    if best is not None and best[0] <= loss:
        return best
    return loss, {name: tensor.clone() for name, tensor in parts.net.state_dict().items()}
