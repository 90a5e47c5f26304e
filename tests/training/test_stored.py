"""What is stored beside exemplars: as it was when they were stored, cut and reordered with them, found by rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cilnorm.batch import Batch
from cilnorm.experiment import runner
from cilnorm.registry import Registry
from cilnorm.spec import Settings, resolve
from cilnorm.training.engine import Engine
from cilnorm.training.stored import Stored
from tests.conftest import TINY


def test_what_was_stored_stays_and_goes_with_its_image() -> None:
    asked: list[list[int]] = []

    def describe(width: int) -> object:
        def described(images: Tensor) -> dict[str, Tensor]:
            asked.append(images.tolist())
            return {"logits": images.unsqueeze(1) + torch.arange(width) / 10}

        return described

    first = Stored().after(torch.tensor([7, 3, 5]), describe(2))  # type: ignore[arg-type]
    second = first.after(torch.tensor([5, 9, 7]), describe(3))  # type: ignore[arg-type]
    assert asked == [[7, 3, 5], [9]]
    wanted = torch.tensor([[5, 5.1, torch.nan], [9, 9.1, 9.2], [7, 7.1, torch.nan]])
    torch.testing.assert_close(second.tensors["logits"], wanted, equal_nan=True)

    found = second.rows(torch.tensor([[9, 0, 7, 10]]), torch.device("cpu")).of(lambda rows: rows[0])["logits"]
    nothing = torch.full((3,), torch.nan)
    torch.testing.assert_close(found, torch.stack([wanted[1], nothing, wanted[2], nothing]), equal_nan=True)
    third = second.after(torch.tensor([9]), describe(3))  # type: ignore[arg-type]
    assert asked[2] == []
    torch.testing.assert_close(third.tensors["logits"], wanted[1:2])


@pytest.mark.parametrize("protocol", ["corrected", "released"])
def test_batches_bring_back_the_logits_of_the_end_of_each_images_task(
    registry: Registry, tmp_path: Path, protocol: str
) -> None:
    """Rows of the current task have none; an image of the first task knows fewer outputs than one of the second."""
    batches: list[list[Batch]] = []

    class Recorder(Engine):
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)  # type: ignore[arg-type]
            batches.append([])

        def step(self, batch: Batch) -> None:
            batches[-1].append(batch)
            super().step(batch)

    spec = resolve(
        "tiny", registry, Settings({"tiny": TINY}, {}), method="der++", norm="tbbn", tasks=3, protocol=protocol
    )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "engine_class", lambda *_: Recorder)
        runner.run(spec, tmp_path / "run", device="cpu", registry=registry)
    assert [set(each.stored) for each in (batches[0][0], batches[1][0])] == [set(), {"logits"}]
    for task, phase in enumerate(batches[1:], 1):
        for batch in phase:
            known = ~batch.stored["logits"].isnan()
            of_row = torch.where(batch.targets < 2 * task, 2 * (batch.targets // 2 + 1), 0)
            assert known.sum(1).tolist() == of_row.tolist()
    first, later = (
        {tuple(row) for batch in phase for row in batch.stored["logits"][batch.targets < 2][:, :2].tolist()}
        for phase in batches[1:]
    )
    assert later
    assert later <= first, "stored once, and cut with the lists of exemplars"
