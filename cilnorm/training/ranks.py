"""The processes that share one run: each takes its rows of every batch, and all of them hold the same network.

What is drawn is drawn for the whole batch, by every process alike, so nothing depends on how many there are. A process
puts its own rows through the network, and layers that look at the whole batch share their statistics. Then what the
network says of its rows is gathered, and each process computes the loss of the whole batch: L_r = L in process r of N.
So any loss is right, be it no mean over rows: a ranking of some rows, a sum over those of old tasks.

Going backward a row's output gets N times its gradient, as if every process had computed a loss of its own, and the
gradients of weights are averaged over the processes. What a weight gets through rows, a part in each process, is summed
so; what it gets in the loss itself, where a method uses a layer on gathered embeddings, is the same N times over and
counts once.

Gradients are averaged in one piece after the backward pass, by the engine, and not by ``DistributedDataParallel``. That
wants all weights to be used inside one forward pass, which a loss with a layer of its own does not do, and learns the
order of gradients anew for every phase and task; what it has to offer, sending while the backward pass goes on, is
worth some per cent of a step (docs/scaling.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from cilnorm.batch import Batch, Composition
from cilnorm.network import Network, Output
from cilnorm.training.apart import in_short, told_elsewhere
from cilnorm.training.place import Place
from cilnorm.training.shares import SharedBatch, Shares

__all__ = ["ALONE", "PlannedRanks", "Ranks", "joined"]

TIMEOUT = timedelta(minutes=10)  # in which every process must come to what they do together
PATIENCE = timedelta(days=2)  # for what one does and the others wait for: images that are decoded for the first time
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ranks(Shares):
    """The processes that share a run, as one of them sees them. Alone, nothing here does or copies anything.

    Attributes:
        place: of this process.
        group: torch's group of processes for tensors.
        words: the same on the CPU, for numbers and small objects.
        patient: the same with more time, for what is done ``in_turn``.
    """

    group: Any = None
    words: Any = None
    patient: Any = None

    # What they agree on.

    def first(self, call: Callable[[], T]) -> T:
        """What ``call`` returns in the process that leads, in every process; it must be something small.

        Raises:
            ToldElsewhere: it failed there, where its own error is raised.
        """
        if self.alone:
            return call()
        found: list[Any] = [None, None]
        failed: Exception | None = None
        if self.leads:
            try:
                found[0] = call()
            except Exception as error:
                failed, found[1] = error, in_short(error)
        distributed.broadcast_object_list(found, 0, group=self.words)
        if failed is not None:
            raise failed
        if found[1] is not None:
            raise told_elsewhere(found[1])
        return found[0]

    def in_turn(self, call: Callable[[], T]) -> T:
        """What ``call`` returns, in each process its own: first where they are led from, then once a machine, then in
        all others, so that files are made once.

        Raises:
            ToldElsewhere: it failed in another process.
        """
        if self.alone:
            return call()
        mine, made = 0 if self.leads else 1 if not self.place.local else 2, None
        for turn in range(3):
            failed: Exception | None = None
            if turn == mine:
                try:
                    made = call()
                except Exception as error:
                    failed = error
            told: list[Any] = [None] * self.size
            distributed.all_gather_object(told, failed and in_short(failed), group=self.patient)
            bad = next((each for each in told if each is not None), None)
            if failed is not None:
                raise failed
            if bad is not None:
                raise told_elsewhere(bad)
        return made  # type: ignore[return-value]

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.alone:
            return number
        value = torch.tensor(number)
        distributed.all_reduce(value, distributed.ReduceOp.MAX, group=self.words)
        return int(value)

    def agree(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives the tensors of every process the values that they have in the one that leads."""
        if not self.alone:
            self._in_pieces(list(tensors.values()), lambda flat: distributed.broadcast(flat, 0, group=self.group))

    # Images that are looked at one by one.

    def gather(self, values: Tensor, count: int) -> Tensor:
        """What all processes made of their ``share`` of ``count`` images, (count, ...) in order; without a gradient."""
        if self.alone or not count:
            return values
        return torch.cat(self.of_all(values))[:count]

    def of_all(self, values: Tensor) -> list[Tensor]:
        """The values of each process, of one shape and type in all; without a gradient."""
        values = values.detach().contiguous()
        parts = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(parts, values, group=self.group)
        return parts

    # Rows of a batch.

    def whole(self, values: Tensor, composition: Composition) -> Tensor:
        """Values of this process's rows as those of all rows of the batch, in its order.

        Args:
            composition: of the whole batch.
        """
        gathered: Tensor = _Whole.apply(values, self, composition)
        return gathered

    def outputs(self, out: Output, composition: Composition) -> Output:
        """A network's output for this process's rows as that for all rows; maps are gathered when looked at."""
        same = out.scores is out.logits
        parts = [out.logits, out.embedding, *([] if same else [out.scores])]
        wide = self.whole(torch.cat(parts, dim=1), composition).split([part.shape[1] for part in parts], dim=1)
        maps: Any = _Maps(out.maps, self, composition)
        return Output(wide[0], wide[0] if same else wide[2], wide[1], maps)

    def averaging(self, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
        """A function that gives every process the mean of the processes' gradients of these parameters."""
        return _Averaging(self, parameters) if not self.alone else _nothing

    @staticmethod
    @torch.no_grad()
    def _in_pieces(tensors: Sequence[Tensor], change: Callable[[Tensor], Any]) -> None:
        """Changes tensors in place, all of a type in one piece, for every message has its price."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            of_type = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in of_type])
            change(flat)
            for tensor, changed in zip(of_type, flat.split([each.numel() for each in of_type]), strict=True):
                tensor.copy_(changed.view_as(tensor))

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the processes' values; without a gradient."""
        return value if self.alone else torch.stack(self.of_all(value)).mean(0)

    @contextmanager
    def training(self, net: Network) -> Iterator[None]:
        """Inside, layers that look at the whole batch share their statistics; elsewhere each process is by itself."""
        if self.alone:
            yield
            return
        layers: list[Any] = [module for module in net.modules() if callable(getattr(module, "synchronise", None))]
        self.agree(net.state_dict())
        for layer in layers:
            layer.synchronise()  # among all there are; a group could not be copied along with the layer
        net.forget()  # what layers were told before was of a whole batch
        try:
            yield
        finally:
            self.part(net)

    @staticmethod
    def part(net: Network) -> None:
        """From now on each process's layers look at its own rows alone."""
        for module in net.modules():
            if getattr(module, "synchronised", False):
                module.synchronised = False  # type: ignore[assignment]
        net.forget()

    @contextmanager
    def taking(self, net: Network, batch: Batch) -> Iterator[None]:
        """Inside, a step on a batch is taken: where it is not shared, layers look at this process's rows alone."""
        if self.alone or isinstance(batch, SharedBatch):
            yield
            return
        layers: list[Any] = [module for module in net.modules() if getattr(module, "synchronised", False)]
        for layer in layers:
            layer.synchronised = False
        net.forget()
        try:
            yield
        finally:
            for layer in layers:
                layer.synchronised = True
            net.forget()


class PlannedRanks(Ranks):
    """Processes that do not exist yet, seen from outside, so that what they could not share is refused before."""

    def first(self, call: Callable[[], T]) -> T:
        """What ``call`` returns here."""
        return call()

    def in_turn(self, call: Callable[[], T]) -> T:
        """What ``call`` returns here."""
        return call()


ALONE = Ranks()


def _nothing() -> None:
    """A process alone has the mean already."""


class _Averaging:
    """Gradients of a type in one piece, for every message has its price, that is kept: new memory costs as much.

    From then on a gradient is a view of the piece, laid out as its parameter is.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
        self._ranks, self._pieces = ranks, []
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            of_type = [parameter for parameter in parameters if parameter.dtype == dtype]
            counts = [parameter.numel() for parameter in of_type]
            flat = torch.zeros(sum(counts), dtype=dtype, device=of_type[0].device)
            views = [_laid_out(part, like) for part, like in zip(flat.split(counts), of_type, strict=True)]
            self._pieces.append((flat, list(zip(of_type, views, strict=True))))

    @torch.no_grad()
    def __call__(self) -> None:
        for flat, views in self._pieces:
            for parameter, view in views:
                if parameter.grad is None:  # not used by this loss, in any process
                    view.zero_()
                else:
                    torch.div(parameter.grad, self._ranks.size, out=view)
                    parameter.grad = view
            distributed.all_reduce(flat, group=self._ranks.group)


def _laid_out(flat: Tensor, like: Tensor) -> Tensor:
    """A view of as many values in the shape and, if it leaves no gaps, the layout of another tensor."""
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset()) if channels_last else flat.view_as(like)


class _Whole(torch.autograd.Function):
    """Gathers rows, current ones first. Every process computes the same loss of them, so nothing is sent back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks, composition: Composition) -> Tensor:
        ctx.ranks, ctx.composition = ranks, composition
        parts, own = torch.stack(ranks.of_all(values)), ranks.composition(composition).current
        if not ranks.evenly(composition):
            return parts.flatten(0, 1)
        return torch.cat([parts[:, :own].flatten(0, 1), parts[:, own:].flatten(0, 1)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows = ctx.ranks.rows(ctx.composition).to(gradient.device)
        return gradient[rows] * ctx.ranks.size, None, None


class _Maps(Sequence[Tensor]):
    """Stage maps of all rows. They are large and most losses look at none, so each is gathered when asked for."""

    def __init__(self, own: Sequence[Tensor], ranks: Ranks, composition: Composition) -> None:
        self._own, self._ranks, self._composition = own, ranks, composition
        self._whole: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[each] for each in range(len(self))[at]]
        at = range(len(self))[at]
        if at not in self._whole:
            self._whole[at] = self._ranks.whole(self._own[at], self._composition)
        return self._whole[at]


@contextmanager
def joined(place: Place, device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, joined for tensors on their devices: by NCCL on GPUs, else by gloo.

    Args:
        timeout: how long one waits for the others in what they do together.
    """
    if place.size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    words = distributed.new_group(backend="gloo", timeout=timeout)
    patient = distributed.new_group(backend="gloo", timeout=PATIENCE)
    yield Ranks(place, distributed.group.WORLD, words, patient)
    # The groups end with the process. Ended here, torch 2.6 hangs now and then, and after an error NCCL would wait for
    # processes that wait for this one.
    if ours and device.type == "cuda":
        distributed.destroy_process_group()
