"""What is exported is of use to those who have timm or torch alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from cilnorm.experiment.assembly import assemble
from cilnorm.experiment.runner import Result, run
from cilnorm.registry import Registry
from cilnorm.results.export import export
from cilnorm.spec import Spec
from cilnorm.storage.checkpoint import CheckpointError, Checkpoints
from cilnorm.storage.run_folder import FolderError

pytestmark = pytest.mark.slow


def test_a_timm_user_gets_the_runs_logits(tiny: Callable[..., Spec], registry: Registry, tmp_path: Path) -> None:
    spec = tiny(backbone="timm-resnet18", norm="tbbn", method="ft", tasks=2, stop_after=1, epochs=1)
    done = run(spec, tmp_path / "run", device="cpu", registry=registry)
    weights_file, card_file = export(done.folder, tmp_path / "out", registry)

    # From here on as somebody would who has the two files, safetensors and timm.
    card = json.loads(card_file.read_text())
    weights = safetensors.torch.load_file(weights_file)
    net = timm.create_model("resnet18", num_classes=0)
    net.load_state_dict({n.removeprefix("backbone.net."): t for n, t in weights.items() if n.startswith("backbone.")})
    blocks = [f"head.blocks.{task}" for task in range(card["tasks_learned"])]
    head_weight = torch.cat([weights[f"{block}.weight"] for block in blocks])
    head_bias = torch.cat([weights[f"{block}.bias"] for block in blocks])
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(card[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        logits = F.linear(net.eval()((pixels / 255 - mean) / std), head_weight, head_bias)

    parts = assemble(spec, registry, torch.device("cpu"))
    Checkpoints(done.folder / "checkpoints", {}).read(parts.net, parts.stream.tasks)
    images = (pixels / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(logits, parts.net.eval()(images).logits, rtol=1e-4, atol=1e-4)
    assert card["head"]["kind"] == "Linear"
    assert card["classes"] == [f"colour {label}" for label in parts.order]
    assert card["accuracy"] == done.matrix
    assert card["weights"]["sha256"] == hashlib.sha256(weights_file.read_bytes()).hexdigest()


def test_the_command(finished: Result, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from cilnorm.cli import app as cli

    monkeypatch.setattr("cilnorm.registry.load", lambda **_: registry)
    done = CliRunner().invoke(cli.app, ["export", str(finished.folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["card.json", "model.safetensors"]


def test_what_can_not_be_exported(finished: Result, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="can't write"):
        export(finished.folder, tmp_path / "file" / "out", registry)
    shutil.rmtree(finished.folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"last\.pt can't be read: No such file"):
        export(finished.folder, tmp_path / "out", registry)
