"""What a norm promises: ``build`` gives a layer that may stand in the place of any batch norm."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cilnorm.batch import Composition, CompositionAware
from cilnorm.hookspecs import Norm
from cilnorm.norms import finish_norms, norm_factory
from cilnorm.rows_aware import RowsAware
from cilnorm.testing.checks import Broken, Check, attempt, equal, wants
from cilnorm.testing.toys import registry_with, rows, tell, toy_run
from cilnorm.testing.two_processes import two_processes

__all__ = ["norm_checks"]

WHERE = "cilnorm.hookspecs.Norm"
Layer = Callable[..., nn.Module]
CHANNELS = 8


def made(record: Norm, channels: int = CHANNELS, told: bool = True) -> nn.Module:
    """A layer with γ and β that aren't trivial, told of 12 + 4 rows."""
    layer = finish_norms(norm_factory(record)(channels), record)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    if told:
        tell(layer)
    return layer


def stepped(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """One training step: output, gradient of the input, gradients of the parameters, buffers."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(torch.sin(y.detach()))
    assert x.grad is not None
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters()]
    return [y.detach(), x.grad, *gradients, *(buffer.clone() for buffer in layer.buffers())]


def all_equal(one: list[Tensor], other: list[Tensor], otherwise: str, tolerance: float = 0.0) -> None:
    names = ["output", "gradient of the input"]
    for at, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        what = names[at] if at < len(names) else "a gradient or buffer"
        equal(mine, theirs, f"{otherwise}: {what} differs", tolerance)


def signature(record: Norm) -> None:
    said = "build(num_features, eps=, momentum=, affine=, track_running_stats=, device=, dtype=) must be possible"
    wanted = {"eps": 0.02, "momentum": 0.2, "affine": True, "track_running_stats": True}
    attempt(lambda: record.build(CHANNELS, **wanted, device="cpu", dtype=torch.float32), said)
    plain = attempt(lambda: record.build(CHANNELS, affine=False), said)
    wants(isinstance(plain, nn.Module), f"build returned a {type(plain).__name__}, which is no torch.nn.Module")
    left = [name for name, _ in plain.named_parameters(recurse=False) if name in ("weight", "bias")]
    wants(not left, f"with affine=False the layer still has {' and '.join(left)}; make them only if affine is true")


def shape_and_type(record: Norm) -> None:
    for size in ((CHANNELS, 3, 5), (CHANNELS, 1, 1)):
        for dtype in (torch.float32, torch.float64):
            for mode in (True, False):
                layer, x = made(record).to(dtype).train(mode), rows(*size, dtype=dtype)
                y = layer(x)
                said = f"images of {tuple(x.shape)}, {dtype}, became {tuple(y.shape)}, {y.dtype}"
                wants((y.shape, y.dtype) == (x.shape, x.dtype), f"{said}; a norm keeps shape and type")
                wants(bool(torch.isfinite(y).all()), f"the output for images of {tuple(x.shape)} is not finite")


def channels_last(record: Norm) -> None:
    x = rows(CHANNELS, 3, 5)
    other = x.contiguous(memory_format=torch.channels_last)
    all_equal(stepped(made(record), other), stepped(made(record), x), "channels_last images give other numbers", 1e-4)


def half_types(record: Norm) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer, x = made(record), rows(CHANNELS, 4, 4, dtype=dtype) + 20
        y, expected = layer(x), made(record)(x.float())
        said = "compute in float32 inside and return the input's type"
        wants(y.dtype == dtype, f"{dtype} images came out as {y.dtype}; {said}")
        equal(y.float(), expected, f"{dtype} images lose more than their rounding; {said}", 3e-2)
        wrong = [n for n, b in layer.named_buffers() if b.is_floating_point() and b.dtype != torch.float32]
        wants(not wrong, f"{dtype} images turned the buffers {', '.join(wrong)} into another type; {said}")


def evaluation_by_row(record: Norm) -> None:
    """In evaluation, an image's output depends on it alone, and nothing is learned."""
    layer = made(record)
    stepped(layer, rows(CHANNELS, 3, 3))
    layer.eval()
    x, state = rows(CHANNELS, 3, 3, seed=1), copy.deepcopy(layer.state_dict())
    y = attempt(lambda: layer(x), "evaluation must need no telling")
    said = "in evaluation the output of an image depends on its company; use running statistics, or the image's own"
    equal(layer(x.flip(0)[:3]), y.flip(0)[:3], said, 1e-5)
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
    teacher = attempt(lambda: copy.deepcopy(layer), "the layer can't be deep-copied").eval()
    before = teacher(rows(CHANNELS, 3, 3))
    for parameter in layer.parameters():
        parameter.data.add_(1)
    stepped(layer, rows(CHANNELS, 3, 3, seed=1))
    equal(teacher(rows(CHANNELS, 3, 3)), before, "training the layer changed a deep copy of it; share no tensors")


def gradients(record: Norm) -> None:
    layer = made(record).double()
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        fresh = copy.deepcopy(layer)
        found: Tensor = torch.func.functional_call(fresh, dict(zip(names, parameters, strict=True)), x)
        return found

    values = [rows(CHANNELS, 2, 1, dtype=torch.float64), *(value.detach() for value in layer.parameters())]
    try:
        torch.autograd.gradcheck(function, [value.requires_grad_() for value in values], atol=1e-6, fast_mode=True)
    except Exception as error:
        said = "the gradient is not that of the function (torch.autograd.gradcheck); detach nothing that depends on x"
        raise Broken(said) from error


def autocast(record: Norm) -> None:
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), made(record))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(rows(3, 6, 6))
    wants(y.dtype == torch.bfloat16, f"under autocast the convolution's bfloat16 came out as {y.dtype}; keep x.dtype")
    y.float().square().sum().backward()
    wrong = [n for n, p in net.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())]
    wants(not wrong, f"under autocast the gradients of {', '.join(wrong)} are missing or not finite")


def compiled(record: Norm) -> None:
    torch._dynamo.reset()
    layer, x = made(record).double(), rows(CHANNELS, 4, 4, dtype=torch.float64)
    try:
        other: Any = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
        found = stepped(other, x)
    except Exception as error:
        raise Broken(
            f"torch.compile can't take it in one graph ({type(error).__name__}); read no value of a tensor, and derive "
            "numbers from the composition when it is told, not in forward"
        ) from error
    finally:
        torch._dynamo.reset()
    all_equal(found, stepped(layer, x), "compiled it computes otherwise", 1e-9)


def checkpointing(record: Norm) -> None:
    """Activation checkpointing repeats the forward pass; buffers must not move twice."""
    plain, repeated = made(record), made(record)
    x = rows(CHANNELS, 3, 3).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    plain(x).sin().sum().backward()
    checkpoint(repeated, twin, use_reentrant=False).sin().sum().backward()
    said = "the pass that activation checkpointing repeats counts twice; look at cilnorm.rows_aware.recomputing()"
    for one, other in zip(plain.buffers(), repeated.buffers(), strict=True):
        equal(other, one, f"{said}: a buffer differs")
    assert x.grad is not None
    assert twin.grad is not None
    equal(twin.grad, x.grad, f"{said}: the gradient differs")


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
        wants(not torch.equal(one(x), other(x)), "12 + 4 rows and 16 + 0 rows give the same; is it composition-aware?")


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
    (signature, False), (shape_and_type, False), (channels_last, False), (half_types, False),
    (evaluation_by_row, False), (state_round_trip, False), (copies, False), (gradients, False), (autocast, False),
    (checkpointing, False), (claims, False), (untold, False), (timm, False), (trains, False), (two_processes, True),
    (compiled, True),
]  # fmt: skip


def norm_checks(record: Norm) -> Iterator[Check]:
    """The checks of a norm, quick ones first."""
    for work, slow in CHECKS:
        yield Check("norm", record.name, work.__name__, work, record, WHERE, slow)
