"""What a method promises: losses that are finite and its own, a past that stands still, and the same bits on resume."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cilnorm import registry as registries
from cilnorm.batch import Batch, Composition, Task
from cilnorm.experiment import runner
from cilnorm.hookspecs import Method as Record
from cilnorm.method import Method, Past, Phase, Step
from cilnorm.network import Network
from cilnorm.settings.options import options_of
from cilnorm.testing import toys
from cilnorm.testing.checks import Broken, Check, attempt, wants
from cilnorm.testing.method_runs import past_stands_still, terms_are_finite, watched, weights_stand_still

__all__ = ["method_checks"]

WHERE = "cilnorm.method.Method"
TASK = Task(1, toys.SIZES, images=(8, 8, 24, 24))
# One that every backbone of ours is like: stage maps and one ReLU left out; four stages; the 224-pixel ones are alike.
BACKBONES = ("resnet8", "resnet32-rebuffi", "resnet18")
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}


def built(record: Record) -> Method:
    found: Method = record.build()
    return found


def is_a_method(record: Record) -> None:
    build = record.build
    wants(isinstance(build, type) and issubclass(build, Method), "build must be a class derived from this one")
    frozen = getattr(build, "__dataclass_params__", None)
    wants(frozen is not None and frozen.frozen, "put @dataclass(frozen=True) above the class: its fields are options")
    attempt(lambda: built(record), "every option needs a default, so that `--method NAME` alone works")


def options_are_told(record: Record) -> None:
    blank = [name for name, option in options_of("method", record.build).items() if not option.meaning]
    text = f"nobody said what {', '.join(blank)} means; give the docstring an entry each under `Attributes:`"
    wants(not blank, f"{text} (cilnorm.settings.options has the form), and `cilnorm show {record.name}` prints it")


def released_names_fields(record: Record) -> None:
    from cilnorm.training.protocol import Protocol

    own = {field.name for field in dataclasses.fields(record.build)}  # type: ignore[arg-type]
    own |= {f"protocol.{field.name}" for field in dataclasses.fields(Protocol)}
    strange = sorted(set(getattr(record.build, "released", {})) - own)
    wants(not strange, f"`released` names {', '.join(strange)}, which are no fields of it nor `protocol.FIELD`")


Stored = dict[str, Tensor]


def network(method: Method, backbone: str, norm: str = "bn") -> tuple[Network, Past | None, Stored]:
    """A network at the start of the second task, what the first one left, and what is stored beside a batch's rows."""
    shelf = registries.load()
    torch.manual_seed(0)
    build = shelf.backbones[backbone].build
    net = method.network(lambda: build(shelf.norms[norm].build, signed_embedding=method.signed_embedding))
    first, images = Task(0, toys.SIZES), toys.rows(3, 32, 32)

    def embedded(seed: int) -> Tensor:
        with torch.no_grad():
            found: Tensor = net.backbone(toys.rows(3, 32, 32, count=4, seed=seed))[0]
        return found

    method.grow(net, first, lambda: [embedded(at) for at in range(first.new)])
    net.observe(Composition(16, 0, 0))
    net(images)
    batches = [Batch(images, torch.arange(16) % first.new, Composition(16, 0, 0))]
    past = method.remember(net, first, lambda: iter(batches))
    with torch.no_grad():
        kept = method.store(net.eval()(toys.batch(TASK, 32).images[12:]))
    stored = {name: torch.cat([torch.full((12, *rows.shape[1:]), math.nan), rows]) for name, rows in kept.items()}
    net.train()
    method.grow(net, TASK, lambda: [embedded(at) for at in range(TASK.new)])
    return net, past, stored


def loss_of(method: Method, net: Network, past: Past | None, stored: Stored, phase: Phase) -> dict[str, Tensor]:
    batch = replace(toys.batch(TASK, 32), stored=stored)
    net.look(phase.view)
    net.train()
    net.backbone.train(phase.backbone == "train")
    net.observe(batch.composition)
    with torch.no_grad():
        old = past.net(batch.images) if past else None
    return method.loss(Step(net(batch.images), old, past, batch, TASK, phase, net))


def terms_are_named_numbers(record: Record) -> None:
    method = built(record)
    for backbone in BACKBONES:
        net, past, stored = network(method, backbone)
        for phase in method.phases(TASK):
            terms = loss_of(method, net, past, stored, phase)
            said = f"in phase {phase.name!r} with {backbone} loss returned "
            wants(isinstance(terms, dict) and bool(terms), f"{said}{terms!r:.60}; return a dict of terms by name")
            for name, term in terms.items():
                fine = isinstance(term, Tensor) and term.shape == () and term.is_floating_point()
                wants(isinstance(name, str) and fine, f"{said}the term {name!r} of {term!r:.60}; a term is one number")
                wants(math.isfinite(term.item()), f"{said}{name} = {term.item()}; terms must be finite")
            wants(any(term.requires_grad for term in terms.values()), f"{said}terms that depend on no weight")


def nothing_is_read_back(record: Record) -> None:
    """A step that waits for the device is slow, and can't be captured as a CUDA graph."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name().partition(".")[0] in WAITS:
                raise Broken(
                    f"loss reads a value from the device ({func.name()}: .item(), `if tensor:`, a mask as an index); "
                    "use torch.where, sums and counts of step.batch.composition"
                )
            return func(*args, **(kwargs or {}))

    method = built(record)
    net, past, stored = network(method, "resnet8")
    batch = replace(toys.batch(TASK, 32), stored=stored)
    net.observe(batch.composition)
    for phase in method.phases(TASK):
        net.look(phase.view)
        net.train()
        with torch.no_grad():
            old = past.net(batch.images) if past else None
        out = net(batch.images)
        with Watch():
            method.loss(Step(out, old, past, batch, TASK, phase, net))


def nothing_flows_into_the_past(record: Record) -> None:
    method = built(record)
    net, past, stored = network(method, "resnet8")
    if past is None:
        return
    mine = {parameter.data_ptr() for parameter in net.parameters()}
    shared = [name for name, parameter in past.net.named_parameters() if parameter.data_ptr() in mine]
    wants(not shared, f"remember kept the network itself, so {shared[:1]} trains along; keep copy.deepcopy(net)")
    wants(not past.net.training, "remember left the past network in training mode; call .eval()")
    before = {name: tensor.clone() for name, tensor in past.net.state_dict().items()}
    for phase in method.phases(TASK):
        torch.stack(list(loss_of(method, net, past, stored, phase).values())).sum().backward()
    moved = [name for name, tensor in past.net.state_dict().items() if not torch.equal(tensor, before[name])]
    moved += [name for name, parameter in past.net.named_parameters() if parameter.grad is not None]
    moved += [name for name, tensor in past.tensors.items() if tensor.requires_grad]
    wants(not moved, f"a step reaches {moved[:1]} of the past; detach it, and call .requires_grad_(False) on the copy")


def what_stands_still_stands_still(record: Record) -> None:
    """``parameters`` gives weights of the network, and nothing else moves."""
    method = built(record)
    net, past, stored = network(method, "resnet8")
    own = {id(parameter) for parameter in net.parameters()}
    for phase in method.phases(TASK):
        moving = list(method.parameters(net, phase))
        wants(bool(moving), f"parameters gives no weight to train in phase {phase.name!r}")
        wants({id(p) for p in moving} <= own, f"parameters gives weights that are not the network's in {phase.name!r}")
        before = copy.deepcopy(net.state_dict())
        loss_of(method, net, past, stored, phase)
        names = {name for name, _ in net.named_parameters()}
        changed = [name for name in names if not torch.equal(net.state_dict()[name], before[name])]
        wants(not changed, f"loss changed {changed[:1]} by itself; leave updates to the optimiser")


def two_tasks(record: Record) -> None:
    """Through whole phases the terms are finite, the past stands still, and nothing moves that is not to be trained."""
    registry = toys.registry_with("method", record)
    for norm in ("bn", "tbbn"):
        visits = watched(toys.toy_spec(registry, method=record.name, norm=norm), registry)
        wants(visits[-1].task == 1, f"a run over two tasks with {norm} did not end")
        terms_are_finite(visits)
        past_stands_still(visits)
        weights_stand_still(visits, built(record))


def resumed_to_the_bit(record: Record) -> None:
    """Stopped before the checkpoint of the second task's last epoch."""
    registry = toys.registry_with("method", record)
    spec = toys.toy_spec(registry, method=record.name, norm="tbbn", epochs=2)
    seen = itertools.count(1)
    last = sum(
        phase.schedule_in(spec.schedule.in_task(task.index)).epochs
        for task in (Task(0, toys.SIZES), TASK)
        for phase in built(record).phases(task)
    )

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and next(seen) == last:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder, toys.one_thread():
        where: dict[str, Any] = {"device": "cpu", "registry": registry, "figures": False}
        whole = runner.run(spec, Path(folder) / "whole", **where)
        with suppress(KeyboardInterrupt):
            runner.run(spec, Path(folder) / "cut", watch=[stop], **where)
            raise Broken("a run over two tasks had fewer epochs than its phases say")
        resumed = runner.resume(Path(folder) / "cut", **where)
        ends = [torch.load(run.folder / "checkpoints/last.pt", weights_only=True)["net"] for run in (whole, resumed)]
    differ = [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])]
    said = f"stopped in the second task and resumed, {differ[:1] or 'accuracy'} differs from an unbroken run"
    said += "; keep what a task needs in Past.tensors, and draw nothing at random yourself"
    wants(not differ and resumed.matrix == whole.matrix, said)


CHECKS: list[tuple[Callable[[Record], None], bool]] = [
    (is_a_method, False), (options_are_told, False), (released_names_fields, False),
    (terms_are_named_numbers, False), (nothing_is_read_back, False), (nothing_flows_into_the_past, False),
    (what_stands_still_stands_still, False), (two_tasks, False), (resumed_to_the_bit, False),
]  # fmt: skip


def method_checks(record: Record) -> Iterator[Check]:
    """The checks of a method, quick ones first."""
    for work, slow in CHECKS:
        yield Check("method", record.name, work.__name__, work, record, WHERE, slow)
