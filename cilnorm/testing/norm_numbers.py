"""What a norm computes, whatever the size, type and layout of images, and whoever calls it how often."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cilnorm.batch import Composition, set_composition
from cilnorm.hookspecs import Norm
from cilnorm.testing.checks import Broken, NotChecked, attempt, equal, wants
from cilnorm.testing.layers import CHANNELS, LAYOUTS, ROUNDING, age, all_equal, in_memory, made, stepped, takes
from cilnorm.testing.toys import rows, tell

__all__ = ["NUMBERS"]

HALVES = (torch.bfloat16, torch.float16)
WIDE = "compute in float32 inside and return the input's type"


def shape_and_type(record: Norm) -> None:
    for channels, size in ((CHANNELS, (3, 5)), (CHANNELS, (1, 1)), (1, (3, 3)), (1, (1, 1))):
        if not takes(record, channels):
            continue
        for dtype in (torch.float32, torch.float64):
            for mode in (True, False):
                layer = made(record, channels).to(dtype).train(mode)
                x = rows(channels, *size, dtype=dtype).requires_grad_()
                y = layer(x)
                said = f"images of {tuple(x.shape)}, {dtype}, became {tuple(y.shape)}, {y.dtype}"
                wants((y.shape, y.dtype) == (x.shape, x.dtype), f"{said}; a norm keeps shape and type")
                said = f"the output for images of {tuple(x.shape)}"
                wants(
                    y.device == x.device and y.is_contiguous(), f"{said} is laid out otherwise; keep the memory format"
                )
                wants(bool(torch.isfinite(y).all()), f"{said} is not finite")
                y.sin().sum().backward()
                assert x.grad is not None
                wants(bool(torch.isfinite(x.grad).all()), f"the gradient for images of {tuple(x.shape)} is not finite")
                said = "no gradient reaches the images; detach nothing that depends on x"
                wants((channels, size) != (CHANNELS, (3, 5)) or bool(x.grad.any()), said)


def channels_last(record: Norm) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, ROUNDING)):
        for mode in (True, False):
            layers = [made(record).to(dtype).train(mode) for _ in LAYOUTS]
            x = rows(CHANNELS, 3, 5, dtype=dtype)
            plain, other = (stepped(layer, in_memory(x, how)) for layer, how in zip(layers, LAYOUTS, strict=True))
            _alike(layers[0], other, plain, tolerance)
            kept = all(value.is_contiguous(memory_format=torch.channels_last) for value in other[:2])
            said = "channels_last images or gradients come out in another layout, so that what follows copies them"
            wants(kept, f"{said}; keep the memory format of x")


def _alike(layer: nn.Module, other: list[Tensor], plain: list[Tensor], tolerance: float) -> None:
    """Two steps of a layer; what is not a parameter's gradient is sharper in float32."""
    count, sharp = len(list(layer.parameters())), min(tolerance, 1e-5)
    said = "channels_last images give other numbers"
    for at, (one, two) in enumerate(zip(other, plain, strict=True)):
        all_equal([one], [two], said, tolerance) if 2 <= at < 2 + count else equal(one, two, said, sharp)


def learns_alone(record: Norm) -> None:
    """Parameters learn where the images need no gradient, as behind frozen layers."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, ROUNDING)):
        found = []
        for layout in LAYOUTS[:1] if _dies_alone(made(record)) else LAYOUTS:
            layer, x = made(record).to(dtype), in_memory(rows(CHANNELS, 3, 5, dtype=dtype), layout)
            y = layer(x)
            wants(y.is_contiguous(memory_format=layout), "images that need no gradient come out in another layout")
            if not list(layer.parameters()):
                return
            y.square().mul(rows(CHANNELS, 3, 5, dtype=dtype, seed=1)).sum().backward()
            still = [name for name, value in layer.named_parameters() if value.grad is None or not value.grad.any()]
            wants(not still, f"{', '.join(still)} gets no gradient where the images need none, as in the first layer")
            found.append([value.grad for value in layer.parameters() if value.grad is not None])
        all_equal(found[-1], found[0], "gradients of parameters for channels_last images are other ones", tolerance)


def _dies_alone(layer: nn.Module) -> bool:
    """Whether the group norm of torch 2.6 would end the process here: it writes to a gradient that is not there."""
    old = tuple(int(part) for part in torch.__version__.split(".")[:2]) <= (2, 6)
    return old and any(isinstance(module, nn.GroupNorm) for module in layer.modules())


def half_types(record: Norm) -> None:
    """Far from 0, where a mean in bfloat16 would be off by a per cent, statistics are those of float32."""
    for dtype in HALVES:
        layer, x = made(record), rows(CHANNELS, 4, 4, dtype=dtype) + 20
        said = f"{dtype} images"
        y, gx, *others = attempt(partial(stepped, layer, x), f"{said} can't be taken; {WIDE}")
        expected = stepped(made(record), x.float())
        wants(y.dtype == dtype, f"{said} came out as {y.dtype}; {WIDE}")
        wants(gx.dtype == dtype, f"the gradient for {said} is {gx.dtype}; {WIDE}")
        equal(y.float(), expected[0], f"{said} lose more than their rounding; {WIDE}", 2e-2)
        narrow = [value for value in others if value.is_floating_point() and value.dtype != torch.float32]
        wants(not narrow, f"{said} turned buffers or gradients of parameters into another type; {WIDE}")
        for one, other in zip(layer.buffers(), expected[len(expected) - len(list(layer.buffers())) :], strict=True):
            equal(one, other, f"{said} gave buffers that float32 images do not; {WIDE}", 1e-5)


def half_rounding(record: Norm) -> None:
    """Output and gradients are those of float64, rounded once."""
    for dtype in HALVES:
        for layout in LAYOUTS:
            layer = made(record)
            exact, unit = copy.deepcopy(layer).double(), torch.finfo(dtype).eps
            x, g = (in_memory(rows(CHANNELS, 6, 5, dtype=dtype, seed=seed), layout) for seed in range(2))
            wide = x.double().requires_grad_()
            y, expected = layer(x.requires_grad_()), exact(wide)
            y.backward(g)
            expected.backward(g.double())
            assert x.grad is not None
            assert wide.grad is not None
            said = f"of {dtype} images is off by more than one rounding of the exact one; {WIDE}"
            wants(y.is_contiguous(memory_format=layout), f"{dtype} images come out in another layout")
            equal(y.double(), expected, f"the output {said}", unit)
            equal(x.grad.double(), wide.grad, f"the gradient {said}", unit)
            for one, other in zip(layer.parameters(), exact.parameters(), strict=True):
                scale = max(float(_gradient(other).abs().max()), 1e-9)
                found, right = _gradient(one).double() / scale, _gradient(other) / scale
                equal(found, right, f"a parameter's gradient {said}", 1e-4)
            for buffer, right in zip(layer.buffers(), exact.buffers(), strict=True):
                equal(buffer.double(), right.double(), f"a buffer {said}", 1e-5)


def autocast(record: Norm) -> None:
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), made(record))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(rows(3, 6, 6))
    wants(y.dtype == torch.bfloat16, f"under autocast the convolution's bfloat16 came out as {y.dtype}; keep x.dtype")
    y.float().square().sum().backward()
    wrong = [
        name
        for name, value in net.named_parameters()
        if value.grad is None or value.grad.dtype != torch.float32 or not bool(torch.isfinite(value.grad).all())
    ]
    wants(not wrong, f"under autocast the gradients of {', '.join(wrong)} are missing, not float32 or not finite")
    for layout in LAYOUTS:
        plain, other, x = made(record), made(record), in_memory(rows(CHANNELS, 6, 5), layout)
        expected = plain(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = other(x)
        said = "under autocast float32 images give other numbers; leave out what autocast turns into bfloat16 (matmul)"
        equal(found, expected, said)
        for one, two in zip(other.buffers(), plain.buffers(), strict=True):
            equal(one, two, said)


def gradients(record: Norm) -> None:
    layer = made(record, 2 if takes(record, 2) else CHANNELS).double()
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        fresh = copy.deepcopy(layer)
        found: Tensor = torch.func.functional_call(fresh, dict(zip(names, parameters, strict=True)), x)
        return found

    channels = 2 if takes(record, 2) else CHANNELS
    values = [rows(channels, 2, 1, dtype=torch.float64), *(value.detach() for value in layer.parameters())]
    try:
        torch.autograd.gradcheck(function, [value.requires_grad_() for value in values], atol=1e-6)
    except Exception as error:
        said = "the gradient is not that of the function (torch.autograd.gradcheck); detach nothing that depends on x"
        raise Broken(said) from error


def checkpointing(record: Norm) -> None:
    """Activation checkpointing repeats the forward pass; buffers must not move twice."""
    said = "the pass that activation checkpointing repeats counts twice; look at cilnorm.rows_aware.recomputing()"
    for reentrant in (False, True):
        plain, repeated = made(record), made(record)
        for step in range(3):
            if step == 1:
                age(plain, repeated)
            x = rows(CHANNELS, 3, 3, seed=step).requires_grad_()
            twin = x.detach().clone().requires_grad_()
            y, z = plain(x), checkpoint(repeated, twin, use_reentrant=reentrant)
            y.sin().sum().backward()
            z.sin().sum().backward()
            assert x.grad is not None
            assert twin.grad is not None
            equal(z, y, f"{said}: the output differs")
            for one, other in zip(plain.buffers(), repeated.buffers(), strict=True):
                equal(other, one, f"{said}: a buffer differs")
            equal(twin.grad, x.grad, f"{said}: the gradient differs")
        for one, other in zip(plain.parameters(), repeated.parameters(), strict=True):
            all_equal([_gradient(other)], [_gradient(one)], f"{said}: a parameter's gradient differs")


def two_forwards(record: Norm) -> None:
    """As where a replayed batch gets a forward pass of its own, before one backward pass through both."""
    kinds = (Composition(16, 0, 3), Composition(12, 4, 3))
    said = "two training passes before one backward pass give other gradients than one after the other"
    said += "; keep what the backward pass needs with the pass (save_for_backward), not in the layer"
    for old in (False, True):
        for order in [(one, other) for one in kinds for other in kinds]:
            for layout in LAYOUTS:
                together, apart = made(record), made(record)
                if old:
                    age(together, apart)
                total, inputs, twins = torch.zeros(()), [], []
                for seed, told in enumerate(order):
                    x = in_memory(rows(CHANNELS, 3, 5, seed=seed), layout)
                    inputs.append(x.clone().requires_grad_())
                    twins.append(x.clone().requires_grad_())
                    for layer in (together, apart):
                        set_composition(layer, told, expect_listeners=False)
                    total = total + together(inputs[-1]).sin().sum()
                    apart(twins[-1]).sin().sum().backward()
                attempt(total.backward, said)
                for x, twin in zip(inputs, twins, strict=True):
                    equal(_gradient(x), _gradient(twin), said)
                    wants(bool(_gradient(x).any()), "no gradient reaches the images of one of two training passes")
                for one, other in zip(together.parameters(), apart.parameters(), strict=True):
                    equal(_gradient(one), _gradient(other), said, 1e-6)
                for mine, theirs in zip(together.buffers(), apart.buffers(), strict=True):
                    equal(mine, theirs, f"{said}: a buffer differs")


def on_a_gpu(record: Norm) -> None:
    if not torch.cuda.is_available():
        raise NotChecked("there is no CUDA device here")
    layer = made(record)
    moved = copy.deepcopy(layer).cuda()
    tell(moved)  # what was told before stays where the layer was
    found = [value.cpu() for value in stepped(moved, rows(CHANNELS, 5, 5).cuda())]
    for one, other in zip(found, stepped(layer, rows(CHANNELS, 5, 5)), strict=True):
        equal(one, other, "a GPU computes otherwise", 1e-4)


def _gradient(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


NUMBERS = [
    shape_and_type, channels_last, learns_alone, half_types, half_rounding, gradients, autocast, checkpointing,
    two_forwards, on_a_gpu,
]  # fmt: skip
