"""What is made for the Hub is a card that it reads, and weights that load as the card says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from cilnorm.experiment import runner
from cilnorm.experiment.assembly import assemble
from cilnorm.experiment.runner import Result, run
from cilnorm.registry import Registry
from cilnorm.results.hub import MARK, export_for_hub, load_network
from cilnorm.spec import Spec
from cilnorm.storage.checkpoint import Checkpoints
from cilnorm.storage.run_folder import FolderError

pytestmark = pytest.mark.slow


@pytest.fixture
def ended(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    def make(**asked: Any) -> Result:
        monkeypatch.setattr(runner, "draw_figures", lambda *_: None)
        spec = tiny(**{"tasks": 2, "epochs": 1, **asked})
        return run(spec, tmp_path / "run", device="cpu", registry=registry)

    return make


def as_the_card_says(folder: Path) -> dict[str, Any]:
    """The names that the card's code makes, run in the folder as a reader would."""
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(before)
    return names


def given(result: Result, registry: Registry, images: torch.Tensor) -> list[str]:
    """The classes that the run's own network sees."""
    spec = result_spec(result, registry)
    parts = assemble(spec, registry, torch.device("cpu"))
    Checkpoints(result.folder / "checkpoints", {}).read(parts.net, parts.stream.tasks)
    config = json.loads((result.folder / "environment.json").read_text())["images"]
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        found = parts.net.eval()((images / 255 - mean) / std).logits.argmax(1)
    return [config["classes"][at] for at in found]


def result_spec(result: Result, registry: Registry) -> Spec:
    from cilnorm.spec import read_spec

    return read_spec(result.folder / "spec.yaml", registry)


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"backbone": "timm-resnet18", "norm": "tbbn", "stop_after": 1}, "pytorch-image-models) alone"),
        ({"backbone": "timm-resnet18", "norm": "cn", "stop_after": 1}, "pip install cilnorm"),  # not BN in evaluation
        ({"norm": "gn"}, "pip install cilnorm"),
        ({"method": "lucir"}, "pip install cilnorm"),
        ({"method": "der"}, "pip install cilnorm"),
    ],
)
def test_the_card_s_code_gives_the_run_s_classes(
    asked: dict[str, Any], word: str, ended: Callable[..., Result], registry: Registry, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    done = ended(**asked)
    written = export_for_hub(done.folder, tmp_path / "hub", registry)
    assert sorted(path.name for path in written) == ["README.md", "config.json", "model.safetensors"]
    assert word in (tmp_path / "hub" / "README.md").read_text()
    monkeypatch.setattr("cilnorm.results.hub.load", lambda: registry)
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    names = as_the_card_says(tmp_path / "hub")
    assert names["classify"](images) == given(done, registry, images)
    assert ("timm" in names) == (word == "pytorch-image-models) alone")


def test_the_card_is_one_that_the_hub_reads(ended: Callable[..., Result], registry: Registry, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    done = ended()
    export_for_hub(done.folder, tmp_path / "hub", registry)
    card = hub.ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.to_dict()["library_name"] == "cilnorm"
    assert card.data.datasets == ["blobs"]
    assert card.data.license is None
    assert {"continual-learning", "ft", "bn"} <= set(card.data.tags)
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {name: done.summary[name] for name in ("A_f", "A_a", "F", "A_l")}
    again = hub.ModelCard(str(card))  # what it writes is what it reads
    assert again.data.to_dict() == card.data.to_dict()
    assert f"| task 2 | {done.matrix[1][0]:.1f} | {done.matrix[1][1]:.1f} |" in card.text


def test_front_matter_is_plain(ended: Callable[..., Result], registry: Registry, tmp_path: Path) -> None:
    export_for_hub(ended(stop_after=1).folder, tmp_path / "hub", registry)
    _, front, text = (tmp_path / "hub" / "README.md").read_text().split("---\n", 2)
    read = yaml.safe_load(front)
    assert read["metrics"] == ["accuracy"]
    assert read["pipeline_tag"] == "image-classification"
    assert "license" not in read
    assert "`license: ...`" in front
    assert text.startswith(MARK)


def test_a_card_that_its_author_took_over_stays(
    ended: Callable[..., Result], registry: Registry, tmp_path: Path
) -> None:
    done, place = ended(stop_after=1), tmp_path / "hub"
    export_for_hub(done.folder, place, registry)
    mine = (place / "README.md").read_text().replace(MARK, "Mine.")
    (place / "README.md").write_text(mine)
    assert sorted(path.name for path in export_for_hub(done.folder, place, registry)) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    assert (place / "README.md").read_text() == mine
    (place / "config.json").write_text("{}")
    with pytest.raises(FolderError, match="is no export of a run"):
        export_for_hub(done.folder, place, registry)
    with pytest.raises(FolderError, match="no network can be made of it"):
        load_network(place, registry)


def test_the_command(finished: Result, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from cilnorm.cli import app as cli

    monkeypatch.setattr("cilnorm.registry.load", lambda **_: registry)
    done = CliRunner().invoke(cli.app, ["export", str(finished.folder), "--hub", str(tmp_path / "hub")])
    assert done.exit_code == 0, done.output
    assert f"next: hf upload USER/NAME {tmp_path / 'hub'}" in done.output
    neither = CliRunner().invoke(cli.app, ["export", str(finished.folder)])
    assert neither.exit_code == 2
    assert "--out FOLDER, or --hub FOLDER" in neither.output
