"""The stream, from the first task to the last."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import Tensor

from cilnorm import registry as registries
from cilnorm.batch import Task
from cilnorm.experiment.assembly import Assembly, pick_device
from cilnorm.experiment.evaluation import describe, embed, held_out_loss, measure_classifier, scored_images
from cilnorm.experiment.exemplars import memory_with
from cilnorm.experiment.failures import RunStopped, record_failure
from cilnorm.experiment.feeding import Running, draw_phase_pool, feed_epoch, lay_out_epoch, seen_batches
from cilnorm.experiment.precise import measure_anew
from cilnorm.experiment.trials import RunContext, assemble_first, choose_by_trials, is_begun
from cilnorm.method import Past, Phase
from cilnorm.registry import Registry
from cilnorm.running import freeze_statistics
from cilnorm.spec import Spec
from cilnorm.storage.checkpoint import Checkpoints, RunState
from cilnorm.storage.event_log import EventLog, Watcher
from cilnorm.storage.events import AccuracyMeasured, EpochEnded, RunBegan, RunEnded, StepTaken, TaskBegan, Warned
from cilnorm.storage.figures import draw_figures
from cilnorm.storage.interruptions import Interruptions
from cilnorm.storage.run_folder import RunFolder, default_folder
from cilnorm.training.engine import Engine
from cilnorm.training.fast_engines import engine_class
from cilnorm.training.place import place
from cilnorm.training.precision import Precision, choose_precision, default_type, matmul_precision
from cilnorm.training.randomness import initial_weights
from cilnorm.training.ranks import joined

__all__ = ["Manner", "Result", "RunStopped", "resume", "run"]


ECHO = 10.0  # seconds in which torchrun hands on a signal that came already


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


class Manner(TypedDict, total=False):
    """How a run is done, whatever it computes; keywords of ``run`` and ``resume``.

    Attributes:
        device: torch's name for it, or ``auto``, which is what it is by default.
        data_root: where data sets lie; their own default otherwise.
        registry: what can be chosen; all that is installed by default.
        watch: called with every event, as events.jsonl has them, and with ``step`` events besides.
        checkpoint_every: seconds between checkpoints within an epoch; one is written after every epoch anyway.
        figures: whether the finished run is drawn, as by default; for a tiny one that is most of the time.
    """

    device: str
    data_root: Path | None
    registry: Registry | None
    watch: Sequence[Watcher]
    checkpoint_every: float | None
    figures: bool


def run(
    spec: Spec,
    out: Path | str | None = None,
    *,
    overwrite: bool = False,
    go_on: bool = False,
    **how: Unpack[Manner],
) -> Result:
    """Runs a spec from the first task to the last.

    Args:
        out: the run's folder; by default a new one under ``runs/``.
        overwrite: replace a run that is in ``out`` already.
        go_on: resume one of the same spec that is there.
        how: ``device``, ``data_root``, ``registry``, ``watch``, ``checkpoint_every`` and ``figures``, see ``Manner``.

    Raises:
        SpecError, DatasetError, FolderError: before anything is trained.
        RunStopped: during training; the folder keeps what was done.
        Interrupted: a signal ended it; what was done is saved.
    """
    with default_type(spec.precision), _context(**how) as context:
        registry, first = context.registry, context.ranks.first
        path = first(lambda: Path(out) if out else default_folder(spec))
        if not (go_on and first(lambda: is_begun(path, spec, registry))):
            if not go_on:  # else another process may be about to begin it
                first(lambda: RunFolder.check(path, overwrite, registry.logger_files))
            parts = assemble_first(context, spec)
            with context.at_work(path):
                # Another process may have begun it meanwhile.
                if not (go_on and first(lambda: is_begun(path, spec, registry))):
                    folder = context.create(path, spec, overwrite, registry.logger_files)
                    return _whole(context, folder, spec, parts)
        return _resume(context, path)


def resume(folder: Path | str, **how: Unpack[Manner]) -> Result:
    """Continues a run from its last checkpoint, to the same numbers as if it had never stopped.

    Args:
        how: see ``Manner``.

    Raises:
        SpecError, DatasetError, FolderError, CheckpointError: it can't be continued.
    """
    with _context(**how) as context:
        context.ranks.first(lambda: RunFolder.require(Path(folder)))  # nothing is made where no run is
        return _resume(context, Path(folder))


@contextmanager
def _context(
    device: str = "auto",
    data_root: Path | None = None,
    registry: Registry | None = None,
    watch: Sequence[Watcher] = (),
    checkpoint_every: float | None = None,
    figures: bool = True,
) -> Iterator[RunContext]:
    """What the run is done with, the processes that share it included; where they do, one alone is watched."""
    registry, here = registry or registries.load(), place()
    on = pick_device(device, here)
    with joined(here, on) as ranks:
        stops = Interruptions(checkpoint_every, 0.0 if ranks.alone else ECHO)
        yield RunContext(registry, on, data_root, watch if ranks.leads else (), stops, ranks, figures)


def _resume(context: RunContext, path: Path) -> Result:
    with context.at_work(path):
        folder = context.open(path)
        spec = folder.read_spec(context.registry)
        with default_type(spec.precision):
            return _whole(context, folder, spec)


def _whole(context: RunContext, folder: RunFolder, spec: Spec, parts: Assembly | None = None) -> Result:
    """Whatever is still to be done of a run: options that are to be chosen, and all that comes after the checkpoint."""
    chosen = choose_by_trials(context, folder, spec, _rest)
    return _rest(context, folder, chosen, parts or context.assemble(chosen))


def _rest(context: RunContext, folder: RunFolder, spec: Spec, parts: Assembly) -> Result:
    """All that comes after the last checkpoint; the whole run where there is none."""
    folder.sizes = tuple(task.new for task in parts.tasks(spec))
    state, warning = _read_state(spec, parts, folder)
    folder.reopen(state.logged, state.matrix)
    tell = EventLog(folder, context.watch, state.seconds)
    if warning:
        tell(Warned(warning))
    run = Running(spec, parts, state, folder, tell, context.stops)
    with closing(parts), matmul_precision(_precision(run)):
        return _learn(run, context)


def _read_state(spec: Spec, parts: Assembly, folder: RunFolder) -> tuple[RunState, str]:
    """Of the last checkpoint, in every process; one that is damaged is set aside by one of them before others look."""
    saved, leads = _checkpoints(spec, parts, folder), parts.ranks.leads
    return parts.ranks.in_turn(lambda: saved.read(parts.net, parts.stream.tasks, only_look=not leads))


def _learn(run: Running, context: RunContext) -> Result:
    """Task after task: grow, train phase after phase, measure anew, remember, choose exemplars, evaluate."""
    spec, parts, state, folder, tell = run.spec, run.parts, run.state, run.folder, run.tell
    with record_failure(spec, state, folder, tell, tasks=len(parts.tasks(spec))):
        about = parts.images, parts.order, parts.train.shape, parts.ranks.size
        changed = folder.write_environment(context.registry, parts.device, *about)
        if state.task < len(parts.tasks(spec)):  # who reads the summary of a finished run finds it finished
            folder.write_summary("running", state)
        at = parts.images.notice, state.steps, list(state.matrix)
        tell(RunBegan.of(spec, str(folder.path), folder.sizes, *at))
        if changed:
            tell(Warned(f"going on in another environment, which may change the numbers: {'; '.join(changed)}"))
        for task in parts.tasks(spec)[state.task :]:
            tell(TaskBegan(task.index + 1, task.new, task.seen, len(state.memory)))
            if not state.midway:
                _grow(run, task)
            for phase in parts.method.phases(task)[state.phase :]:
                _train(run, task, phase)
                state.phase, state.epoch, state.best, state.pool, state.optimizer = state.phase + 1, 0, None, None, None
            if spec.statistics.precise != "never":
                measure_anew(spec, parts, state.memory, task)
            state.past = _remember(run, task)
            _agree(parts, state)
            state.memory = memory_with(spec, parts, state.memory, task)
            describe_new = describe(parts.net, parts.train, parts.method.store, parts.ranks)
            state.stored = state.stored.after(state.memory.indices, describe_new)
            row = _evaluate(run, task)
            state.task, state.phase = task.index + 1, 0
            tell(row)
            folder.write_accuracy(state.matrix)
            folder.write_summary("running", state)
            _save(run)
        title = f"{spec.method} x {spec.norm}, {spec.backbone}, {spec.dataset}, seed {spec.seed}"
        if context.figures and parts.ranks.leads:
            draw_figures(folder.path / "figures", state.matrix, title, folder.sizes)
        summary = folder.write_summary("finished", state, steps=state.steps, seconds=round(tell.seconds, 2))
    tell(RunEnded(summary))
    return Result(folder.path, state.matrix, summary)


def _train(run: Running, task: Task, phase: Phase) -> None:
    """The epochs of a phase that are still to be done, a checkpoint after each."""
    spec, parts, state, net = run.spec, run.parts, run.state, run.parts.net
    schedule = phase.schedule_in(spec.schedule.in_task(task.index))
    if state.pool is None:  # the phase begins
        state.pool = draw_phase_pool(run, task, phase)
        if phase.fresh_head:
            with initial_weights(spec.seed, 1 + task.index, state.phase):
                net.head.redraw()
    task = replace(task, images=tuple(map(len, (*state.memory.exemplars, *parts.stream.by_class(task)))))
    if spec.statistics.freeze == "after-first" and task.index:
        freeze_statistics(net, spec.statistics.freeze_affine)
    made = engine_class(spec.engine, parts.device, parts.ranks.size)
    with parts.ranks.training(net):
        engine = made(net, parts.method, task, phase, schedule, state.past, spec.seed, _precision(run), parts.ranks)
        if state.optimizer is not None:
            engine.load_optimizer(state.optimizer)
        for epoch in range(state.epoch, schedule.epochs):
            _train_epoch(run, task, phase, engine, epoch)
    if state.best is not None:
        net.load_state_dict(state.best[1])


def _train_epoch(run: Running, task: Task, phase: Phase, engine: Engine, epoch: int) -> None:
    """One epoch, or what is left of it."""
    state, ranks, schedule = run.state, run.parts.ranks, engine.schedule
    plan = lay_out_epoch(run, task, phase, epoch)
    engine.start_epoch(epoch, state.step, state.sums)
    with run.stops.between_steps():
        batches = feed_epoch(run, plan, (task.index, state.phase, epoch), ranks)
        for step, _ in enumerate(engine.epoch(batches, state.step), state.step + 1):
            run.tell(StepTaken(step, plan.steps, epoch + 1, schedule.epochs))
            if step < plan.steps and ranks.most(run.stops.due):
                engine.finish_epoch()  # raises rather than save a network that is lost
                state.step, state.sums = step, engine.sums
                _save(run, engine)
        terms = engine.finish_epoch()
        state.epoch, state.step, state.sums, state.steps = epoch + 1, 0, {}, state.steps + plan.steps
        state.best = _best(run, task)
        where = (task.index + 1, phase.name, epoch + 1, schedule.epochs)
        run.tell(EpochEnded(*where, schedule.rate(epoch), plan.steps, terms))
        _save(run, engine)


def _precision(run: Running) -> Precision:
    return choose_precision(run.spec.precision, run.parts.device)


def _save(run: Running, engine: Engine | None = None) -> None:
    """Writes a checkpoint of all that was done and logged so far; then, if a signal asked for it, the run stops."""
    run.state.seconds, run.state.logged = run.tell.seconds, run.folder.logged()
    saved, ranks = _checkpoints(run.spec, run.parts, run.folder), run.parts.ranks
    ranks.first(lambda: saved.write(run.state, run.parts.net, engine))
    run.stops.saved(ranks.most)


def _checkpoints(spec: Spec, parts: Assembly, folder: RunFolder) -> Checkpoints:
    """Those of this spec and these images."""
    return Checkpoints.of(folder.checkpoints, spec, parts.images.digest)


def _remember(run: Running, task: Task) -> Past | None:
    """What the method keeps of the task; processes measure together what is a mean over rows."""
    parts = run.parts
    with parts.ranks.training(parts.net) if parts.method.measures_means else nullcontext():
        past = parts.method.remember(parts.net, task, partial(seen_batches, run, task))
    if past is not None:
        parts.ranks.part(past.net)
    return past


def _agree(parts: Assembly, state: RunState) -> None:
    """What every process has made by itself, on its own device, is the same everywhere from here on."""
    parts.ranks.agree(parts.net.state_dict())
    if state.past is not None:
        parts.ranks.agree({**state.past.net.state_dict(), **state.past.tensors})


def _grow(run: Running, task: Task) -> None:
    """New outputs, drawn from the task's own stream; the method may look at the new classes' embeddings for them."""
    parts = run.parts
    embedded = embed(parts.net, parts.train, parts.ranks)
    with initial_weights(run.spec.seed, 1 + task.index):
        parts.method.grow(parts.net, task, lambda: [embedded(images) for images in parts.stream.by_class(task)])
    parts.net.to(parts.device)


def _evaluate(run: Running, task: Task) -> AccuracyMeasured:
    """Adds the task's row to the matrix, and to their own those of the head and of other views; tells them all."""
    state, net, exemplars = run.state, run.parts.net, run.state.memory.exemplars
    by_head, by_view = None, {}
    for view in net.views[1:]:
        net.look(view)
        by_view[view] = measure_classifier(run.spec, run.parts, task, exemplars).accuracy
        state.by_view.setdefault(view, []).append(by_view[view])
    net.look()
    found = measure_classifier(run.spec, run.parts, task, exemplars)
    if run.spec.classifier == "nme":
        by_head = found.by_head
        state.by_head.append(by_head)
    state.matrix.append(found.accuracy)
    state.others.append(found.others)
    run.folder.write_confusion(found.confusion)
    told = (task.index + 1, found.accuracy, by_head, len(state.memory), by_view or None)
    return AccuracyMeasured(*told, seen=task.seen, **found.others)


def _best(run: Running, task: Task) -> tuple[float, dict[str, Tensor]] | None:
    """The best weights of the phase so far, by loss on the current task's held-out images alone; NaN is the worst."""
    parts, best = run.parts, run.state.best
    if run.spec.protocol.keep == "last":
        return None
    indices = scored_images(run.spec, parts.stream.validation(task))
    loss = held_out_loss(parts.net, parts.train, indices, parts.stream.targets[indices].to(parts.device), parts.ranks)
    loss = math.inf if math.isnan(loss) else loss
    if best is not None and best[0] <= loss:
        return best
    return loss, {name: tensor.clone() for name, tensor in parts.net.state_dict().items()}
