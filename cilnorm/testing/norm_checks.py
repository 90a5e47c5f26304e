"""What a norm promises: ``build`` gives a layer that may stand in the place of any batch norm."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cilnorm.batch import Composition, CompositionAware, set_composition
from cilnorm.hookspecs import Norm
from cilnorm.norms import finish_norms, norm_factory
from cilnorm.rows_aware import RowsAware
from cilnorm.telling import tell_rows
from cilnorm.testing.checks import Broken, Check, NotChecked, attempt, equal, wants
from cilnorm.testing.layers import CHANNELS, all_equal, made, stepped
from cilnorm.testing.norm_numbers import NUMBERS
from cilnorm.testing.toys import describe, registry_with, rows, tell, toy_run
from cilnorm.testing.two_processes import two_processes

__all__ = ["graphs_of_ten_tasks", "norm_checks"]

WHERE = "cilnorm.hookspecs.Norm"
MOST_GRAPHS = 8  # of one function; after them torch.compile runs it eagerly


def signature(record: Norm) -> None:
    said = "build(num_features, eps=, momentum=, affine=, track_running_stats=, device=, dtype=) must be possible"
    wanted = {"eps": 0.02, "momentum": 0.2, "affine": True, "track_running_stats": True}
    attempt(lambda: record.build(CHANNELS, **wanted, device="cpu", dtype=torch.float32), said)
    plain = attempt(lambda: record.build(CHANNELS, affine=False), said)
    wants(isinstance(plain, nn.Module), f"build returned a {type(plain).__name__}, which is no torch.nn.Module")
    left = [name for name, _ in plain.named_parameters(recurse=False) if name in ("weight", "bias")]
    wants(not left, f"with affine=False the layer still has {' and '.join(left)}; make them only if affine is true")


def evaluation_by_row(record: Norm) -> None:
    """In evaluation, an image's output depends on it alone, and nothing is learned."""
    layer = made(record)
    stepped(layer, rows(CHANNELS, 3, 3))
    layer.eval()
    x, state = rows(CHANNELS, 3, 3, seed=1), copy.deepcopy(layer.state_dict())
    y = attempt(lambda: layer(x), "evaluation must need no telling")
    said = "in evaluation the output of an image depends on its company; use running statistics, or the image's own"
    equal(layer(x.flip(0)[:3]), y.flip(0)[:3], said, 1e-5)
    set_composition(layer, Composition(4, 4, 1), expect_listeners=False)
    equal(layer(x), y, "in evaluation the output depends on the composition; look at it in training only")
    changed = [key for key, value in layer.state_dict().items() if not torch.equal(value, state[key])]
    wants(not changed, f"evaluation changed {', '.join(changed)}; update buffers in training only")


def state_round_trip(record: Norm) -> None:
    layer = made(record)
    stepped(layer, rows(CHANNELS, 3, 3))
    other, x = made(record), rows(CHANNELS, 3, 3, seed=2)
    other.load_state_dict(layer.state_dict(), strict=True)
    said = "keep all that evaluation needs in parameters and buffers"
    expected = layer.eval()(x)
    equal(other.eval()(x), expected, f"a layer with the same state_dict computes otherwise; {said}")
    again = attempt(lambda: pickle.loads(pickle.dumps(layer)), f"the layer can't be pickled; {said}")
    equal(again(x), expected, f"the pickled layer computes otherwise; {said}")


def copies(record: Norm) -> None:
    """A teacher is a deep copy."""
    layer = made(record)
    stepped(layer, rows(CHANNELS, 3, 3))
    teacher = attempt(lambda: copy.deepcopy(layer), "the layer can't be deep-copied").eval().requires_grad_(False)
    before = teacher(rows(CHANNELS, 3, 3))
    wants(not before.requires_grad, "a frozen copy's output needs a gradient; keep nothing that autograd follows")
    for parameter in layer.parameters():
        parameter.data.add_(1)
    stepped(layer, rows(CHANNELS, 3, 3, seed=1))
    equal(teacher(rows(CHANNELS, 3, 3)), before, "training the layer changed a deep copy of it; share no tensors")


def compiled(record: Norm, backend: str = "aot_eager") -> None:
    torch._dynamo.reset()
    layer = made(record).double()
    try:
        other: Any = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=backend)
        for seed in range(2):
            x = rows(CHANNELS, 4, 4, dtype=torch.float64, seed=seed)
            found = stepped(other, x)
            all_equal(found, stepped(layer, x), "compiled it computes otherwise", 1e-9)
        y = other.eval()(x)
    except Broken:
        raise
    except Exception as error:
        raise Broken(
            f"torch.compile can't take it in one graph ({type(error).__name__}); read no value of a tensor, and derive "
            "numbers from the composition when it is told, not in forward"
        ) from error
    finally:
        torch._dynamo.reset()
    equal(y, layer.eval()(x), "compiled it evaluates otherwise", 1e-9)


def graphs_of_ten_tasks(record: Norm) -> int:
    """How many graphs torch.compile makes of a composition-aware layer that is told of ten tasks."""
    torch._dynamo.reset()
    layer, graphs = made(record), []

    def count(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    try:
        other: Any = torch.compile(layer, fullgraph=True, backend=count)
        for task in range(10):
            set_composition(layer, Composition(48, 16, task) if task else Composition(64, 0, 0))
            x = rows(CHANNELS, 2, 2, count=64)
            expected = copy.deepcopy(layer)(x)
            equal(other(x), expected, f"compiled it computes otherwise in task {task + 1}", 1e-5)
    finally:
        torch._dynamo.reset()
    return len(graphs)


def compiled_for_ten_tasks(record: Norm) -> None:
    if not record.composition_aware or record.needs_rows:
        raise NotChecked("it takes no composition")
    said = "reduce the composition to few numbers in compose(), and read only those in forward()"
    try:
        count = graphs_of_ten_tasks(record)
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"torch.compile gives up within ten tasks ({type(error).__name__}); {said}") from error
    wants(count <= MOST_GRAPHS, f"torch.compile makes {count} graphs for ten tasks and gives up after 8; {said}")


def claims(record: Norm) -> None:
    """``composition_aware`` and ``needs_rows`` are what the layer is."""
    layer = made(record, told=False)
    aware = any(isinstance(module, CompositionAware) for module in layer.modules())
    hearing = any(isinstance(module, RowsAware) and module.needs_rows for module in layer.modules())
    said = "the record says {0}={1}, its layers {2} from cilnorm.{3}; say what is so"
    if record.composition_aware != aware and not hearing:
        way = "derive" if aware else "do not derive"
        raise Broken(said.format("composition_aware", record.composition_aware, way, "batch.CompositionAware"))
    if record.needs_rows != hearing:
        way = "derive" if hearing else "do not derive"
        raise Broken(said.format("needs_rows", record.needs_rows, way, "rows_aware.RowsAware with needs_rows = True"))


def untold(record: Norm) -> None:
    """A layer that must be told raises where nobody told it, or of another size."""
    if not (record.composition_aware or record.needs_rows):
        return
    layer, x = made(record, told=False), rows(CHANNELS, 2, 2)
    for text, module, images in (
        ("was told nothing", layer, x),
        ("was told of 16 rows and given 9", made(record), x[:9]),
    ):
        try:
            module(images)
        except (RuntimeError, ValueError):
            continue
        raise Broken(f"in training a layer that {text} computed all the same; raise, or results are wrong in silence")
    if record.composition_aware and not record.needs_rows:
        one, other = made(record), made(record)
        tell(other, Composition(16, 0, 3))
        wants(
            not torch.allclose(one(x), other(x)), "12 + 4 rows and 16 + 0 rows give the same; is it composition-aware?"
        )


def rows_in_any_order(record: Norm) -> None:
    """A layer that is told the task and label of every row goes by them, and not by where a row stands."""
    if not record.needs_rows:
        return
    layer, other, x = made(record), made(record), rows(CHANNELS, 3, 5)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    tasks, labels = (each[order] for each in describe())
    task = int(tasks.max())
    tell_rows(other, past=tasks < task, task=task, tasks=tasks, labels=labels)
    y = layer(x)
    said = "with its rows in another order, and told so, a batch gives other numbers; go by `self.take(x).rows`"
    equal(other(x[order]), y[order], said, 1e-5)
    for one, two in zip(other.buffers(), layer.buffers(), strict=True):
        equal(one, two, f"{said}: a buffer differs", 1e-5)
    said = "it needs to know each row, and rows told as those of other tasks and classes change nothing"
    wants(not torch.allclose(made(record)(x[order]), y[order]), said)


def timm(record: Norm) -> None:
    import timm as library

    said = "timm.create_model('resnet18', norm_layer=cilnorm.norm_factory(...)) must train"
    make = norm_factory(record)
    model = attempt(lambda: library.create_model("resnet18", num_classes=4, norm_layer=make), said)
    finish_norms(model, record)
    tell(model)
    attempt(lambda: model(rows(3, 32, 32)).sum().backward(), said)
    wants(all(p.grad is not None for p in model.parameters()), f"{said}: some parameters have no gradient")


def trains(record: Norm) -> None:
    """Two tasks of the runner."""
    result = toy_run(registry_with("norm", record), norm=record.name)
    wants(len(result.matrix) == 2, "a run over two tasks did not end")


CHECKS: list[tuple[Callable[[Norm], None], bool]] = [
    (signature, False), *((work, False) for work in NUMBERS), (evaluation_by_row, False), (state_round_trip, False),
    (copies, False), (claims, False), (untold, False), (rows_in_any_order, False), (timm, False), (trains, False),
    (two_processes, True), (compiled, True), (compiled_for_ten_tasks, True),
]  # fmt: skip


def norm_checks(record: Norm) -> Iterator[Check]:
    """The checks of a norm, quick ones first."""
    for work, slow in CHECKS:
        yield Check("norm", record.name, work.__name__, work, record, WHERE, slow)
