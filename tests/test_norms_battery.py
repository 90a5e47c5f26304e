"""What every norm must survive, a stranger's as well: one list of properties, run over the registry."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cilnorm import registry
from cilnorm.batch import Composition, set_composition
from cilnorm.norms import finish_norms, norm_factory
from cilnorm.testing.toys import tell

pytestmark = pytest.mark.slow

REGISTRY = registry.load().norms
# Options that make another layer of a norm: with its own activation, or without.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "frn act": ("frn", {"act": True}),
    "evonorm-s0 bare": ("evonorm-s0", {"act": False}),
}
SHELF = {**REGISTRY, **{name: REGISTRY[of] for name, (of, _) in VARIANTS.items()}}
NAMES = list(SHELF)
AWARE = [name for name in NAMES if SHELF[name].composition_aware]
TOLD = Composition(12, 4, 3)
# The gradient of nbn's γ is what is left of a hundred times as large a one when its part along γ is taken away.
ROUNDING = {"nbn": 3e-4}


def factory(name: str, **options: object) -> Callable[..., nn.Module]:
    """What ``norm_factory`` gives for a norm or a variant of one."""
    return norm_factory(SHELF[name], **{**VARIANTS.get(name, ("", {}))[1], **options})


def make(name: str, channels: int = 8, **options: object) -> nn.Module:
    """A layer that has been told of 12 + 4 rows, with γ and β that aren't trivial; groups cut to what fits."""
    if channels < 8 and "groups" in inspect.signature(SHELF[name].build).parameters:
        options["groups"] = 1
    layer = finish_norms(factory(name, **options)(channels), SHELF[name])
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    tell(layer, TOLD)
    return layer


def rows(*size: int, count: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A batch (count, *size), not centred."""
    return (torch.randn(count, *size, generator=torch.Generator().manual_seed(seed)) * 2 + 1).to(dtype)


def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """One training step: output, every gradient (0 where a parameter has no part in it), every buffer."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(torch.sin(y.detach()))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters()]
    return [y.detach(), x.grad, *gradients, *(b.clone() for b in layer.buffers())]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, check_stride=False)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("size", [(8, 3, 5), (8, 1, 1), (1, 3, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_keeps_shape_and_dtype_and_is_finite(name: str, dtype: torch.dtype, size: tuple[int, ...], mode: bool) -> None:
    layer = make(name, size[0]).to(dtype).train(mode)
    x = rows(*size, dtype=dtype).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    assert y.is_contiguous()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0 or size == (1, 1, 1) or name in {"in", "ln2d", "gn", "cn", "cn*", "tbbn+cn"}


@pytest.mark.parametrize("name", NAMES)
def test_learns_where_what_comes_before_stands_still(name: str) -> None:
    """As in the first layer, or behind frozen ones; in both layouts."""
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        layer = make(name)
        x = rows(8, 3, 5).contiguous(memory_format=layout)
        y = layer(x)
        assert y.is_contiguous(memory_format=layout)
        y.square().mul(rows(8, 3, 5, seed=1)).sum().backward()
        assert not x.requires_grad
        gradients.append([parameter.grad for parameter in layer.parameters()])
        assert all(g.abs().max() > 0 for g in gradients[-1])
    assert_same(*gradients, ROUNDING.get(name, 1e-5))


@pytest.mark.parametrize("name", NAMES)
def test_takes_images_only(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got one of 3 dimensions"):
        make(name)(rows(8, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_computes_the_same(name: str) -> None:
    layer = make(name)
    on_gpu = copy.deepcopy(layer).cuda()
    tell(on_gpu, TOLD)  # what was told before stays where the layer was
    assert_same([value.cpu() for value in step(on_gpu, rows(8, 5, 5).cuda())], step(layer, rows(8, 5, 5)), 1e-4)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_channels_last_is_kept_and_equal(name: str, mode: bool) -> None:
    layer = make(name).train(mode)
    other = copy.deepcopy(layer)
    actual = step(other, rows(8, 3, 5).contiguous(memory_format=torch.channels_last))
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in actual[:2])
    assert_same(actual, step(layer, rows(8, 3, 5)), ROUNDING.get(name, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs_have_float32_statistics(name: str, dtype: torch.dtype) -> None:
    """Statistics and averages as of the same values in float32; a mean in bfloat16 would be off by 1 %."""
    layer = make(name)
    other = copy.deepcopy(layer)
    x = rows(8, 4, 4, dtype=dtype) + 20
    actual, expected = step(layer, x), step(other, x.float())
    assert actual[0].dtype == actual[1].dtype == dtype
    assert all(value.dtype in (torch.float32, torch.long) for value in actual[2:])
    buffers = len(list(layer.buffers()))
    assert_same(actual[len(actual) - buffers :], expected[len(expected) - buffers :], 1e-5)
    torch.testing.assert_close(actual[0].float(), expected[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_costs_no_more_than_its_rounding(
    name: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Output and gradients against those of the same values in float64."""
    layer = make(name)
    exact = copy.deepcopy(layer).double()
    x = rows(8, 6, 5, dtype=dtype).contiguous(memory_format=layout)
    g = rows(8, 6, 5, dtype=dtype, seed=1).contiguous(memory_format=layout)
    wide = x.double().requires_grad_()
    y, expected = layer(x.requires_grad_()), exact(wide)
    y.backward(g)
    expected.backward(g.double())
    unit = torch.finfo(dtype).eps
    assert y.dtype == x.grad.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y.double(), expected, rtol=unit, atol=unit)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=unit, atol=unit)
    for one, other in zip([p.grad for p in layer.parameters()], [p.grad for p in exact.parameters()], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    for one, other in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_statistics_of_float32_alone(name: str, layout: torch.memory_format) -> None:
    layer, other = make(name), make(name)
    x = rows(8, 6, 5).contiguous(memory_format=layout)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(other(x), expected)
    assert all(torch.equal(one, two) for one, two in zip(layer.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_hands_on_what_the_convolution_gave(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), make(name))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(rows(3, 6, 6))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in NAMES), ("tbbn", "inductor"), ("brn", "inductor")]
)
def test_compiles_in_one_piece(name: str, backend: str) -> None:
    torch._dynamo.reset()
    layer = make(name).double()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=backend)
    for seed in range(2):
        x = rows(8, 4, 4, seed=seed, dtype=torch.float64)
        assert_same(step(compiled, x), step(layer, x), 1e-9)
    torch.testing.assert_close(compiled.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("name", AWARE)
def test_ten_tasks_compile_no_more_often_than_there_are_splits(name: str) -> None:
    """dynamo gives up and runs eagerly after eight; numbers derived inside ``forward`` cost one a task."""
    torch._dynamo.reset()
    layer, graphs = make(name), []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for task in range(10):
        set_composition(layer, Composition(48, 16, task) if task else Composition(64, 0, 0))
        x = rows(8, 2, 2, count=64)
        torch.testing.assert_close(compiled(x), copy.deepcopy(layer)(x))
    assert 1 < len(graphs) <= 5  # r = 1, 2, 4, 8, 16; dynamo of torch 2.6 takes all after the first in one graph


@pytest.mark.parametrize("name", NAMES)
def test_copies_stand_alone_and_can_be_frozen(name: str) -> None:
    layer = make(name)
    step(layer, rows(8, 3, 3))
    teacher = copy.deepcopy(layer).eval().requires_grad_(False)
    assert all(p.is_leaf for p in teacher.parameters())
    before = teacher(rows(8, 3, 3))
    for parameter in layer.parameters():
        parameter.data.add_(1)
    step(layer, rows(8, 3, 3, seed=1))
    assert torch.equal(teacher(rows(8, 3, 3)), before)
    assert not before.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_to_another_layer_and_through_pickle(name: str) -> None:
    layer = make(name)
    step(layer, rows(8, 3, 3))
    loaded = make(name)
    loaded.load_state_dict(layer.state_dict(), strict=True)
    x = rows(8, 3, 3, seed=2)
    expected = layer.eval()(x)
    assert torch.equal(loaded.eval()(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)


@pytest.mark.parametrize("name", ["bn", "cn", "cn*", "tbbn", "tbbn+cn"])
def test_state_is_that_of_batch_norm_both_ways(name: str) -> None:
    layer, plain = make(name), nn.BatchNorm2d(8)
    plain(rows(8, 3, 3))
    assert layer.load_state_dict(plain.state_dict(), strict=True)
    step(layer, rows(8, 3, 3))
    assert plain.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(plain.running_var, layer.running_var)


@pytest.mark.parametrize("name", NAMES)
def test_says_its_settings(name: str) -> None:
    build = factory(name)
    text = repr(build(8, eps=0.0123, affine=False))
    options = {key for key, value in inspect.signature(build).parameters.items() if value.kind is value.KEYWORD_ONLY}
    assert "0.0123" in text
    assert "affine=False" in text
    for option in options - {"channels_per_group", "groups"}:
        assert f"{option}=" in text
    if "groups" in options:
        assert repr(build(16, groups=2)) != repr(build(16, groups=4))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_ignores_the_composition_and_the_company(name: str) -> None:
    layer = make(name)
    step(layer, rows(8, 3, 3))
    layer.eval()
    x, state = rows(8, 3, 3), copy.deepcopy(layer.state_dict())
    y = layer(x)
    set_composition(layer, Composition(5, 1, 9), expect_listeners=False)
    assert torch.equal(layer(x), y)
    torch.testing.assert_close(layer(x.flip(0)[:3]), y.flip(0)[:3])
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_function(name: str) -> None:
    layer = make(name, 2).double()
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        fresh = copy.deepcopy(layer)
        return torch.func.functional_call(fresh, dict(zip(names, parameters, strict=True)), x)

    inputs = [rows(2, 2, 1, dtype=torch.float64), *(value.detach() for value in values)]
    assert torch.autograd.gradcheck(function, [value.requires_grad_() for value in inputs], atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_is_exact(name: str, reentrant: bool) -> None:
    plain, repeated = make(name), make(name)
    if name == "brn":
        plain.num_batches_tracked.fill_(30000)  # where limits are wide, so that averages matter
        repeated.num_batches_tracked.fill_(30000)
    for seed in range(3):
        x = rows(8, 3, 3, seed=seed).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        y, z = plain(x), checkpoint(repeated, twin, use_reentrant=reentrant)
        y.sin().sum().backward()
        z.sin().sum().backward()
        assert torch.equal(y, z)
        assert torch.equal(x.grad, twin.grad)
    for one, other in zip(plain.parameters(), repeated.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert all(torch.equal(one, other) for one, other in zip(plain.buffers(), repeated.buffers(), strict=True))


HOMOGENEOUS = Composition(16, 0, 3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("order", list(itertools.product((HOMOGENEOUS, TOLD), repeat=2)), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_two_forwards_may_come_before_one_backward(
    name: str, order: tuple[Composition, Composition], layout: torch.memory_format
) -> None:
    """As where a replayed batch gets a forward pass of its own: the gradients of two separate backward passes."""
    together, apart = make(name), make(name)
    if name == "brn":
        for layer in (together, apart):
            layer.num_batches_tracked.fill_(30000)  # where limits are wide, so that averages matter
    batches = [rows(8, 3, 5, seed=seed).contiguous(memory_format=layout) for seed in range(2)]
    inputs, twins = ([batch.clone().requires_grad_() for batch in batches] for _ in range(2))
    total = torch.zeros(())
    for composition, x, twin in zip(order, inputs, twins, strict=True):
        for layer in (together, apart):
            set_composition(layer, composition, expect_listeners=False)
        total = total + together(x).sin().sum()
        apart(twin).sin().sum().backward()
    total.backward()
    assert all(torch.equal(x.grad, twin.grad) for x, twin in zip(inputs, twins, strict=True))
    assert all(x.grad.abs().max() > 0 for x in inputs)
    assert_same([p.grad for p in together.parameters()], [p.grad for p in apart.parameters()], 1e-6)
    assert all(torch.equal(one, other) for one, other in zip(together.buffers(), apart.buffers(), strict=True))


@pytest.mark.parametrize("name", AWARE)
def test_a_layer_told_nothing_or_told_wrong_raises(name: str) -> None:
    assert AWARE
    with pytest.raises(RuntimeError, match="set_composition"):
        norm_factory(name)(8)(rows(8, 2, 2))
    with pytest.raises(ValueError, match="the composition says 16 rows, the batch has 9"):
        make(name)(rows(8, 2, 2, count=9))


@pytest.mark.parametrize("name", AWARE)
def test_a_layer_that_claims_to_be_aware_cares(name: str) -> None:
    layer = make(name)
    y = layer(rows(8, 3, 3))
    layer.compose(Composition(16, 0, 3))
    assert not torch.allclose(layer(rows(8, 3, 3)), y)
