"""What the doctor finds, sound and unsound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cilnorm.cli import app as cli
from cilnorm.cli.doctor import Finding, examine
from cilnorm.hookspecs import Dataset, Norm, hookimpl
from cilnorm.registry import Registry, load
from tests import fake

pytestmark = pytest.mark.slow


def findings(registry: Registry, place: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(registry, place / "data", place / "runs")}


def test_a_healthy_installation(registry: Registry, tmp_path: Path) -> None:
    found = findings(registry, tmp_path)
    assert all(finding.healthy for finding in found.values())
    assert torch.__version__.partition("+")[0] in found["versions"].text
    assert found["norm tbbn"].text.startswith("equals its reference")
    assert found["data set cifar100"].text.startswith("not here; it is fetched")
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "runs").exists()
    assert "GiB free" in found["runs"].text
    assert found["several processes"].text.startswith("gloo")


class Sick:
    """A plugin with a norm that is not what it says and a data set that can't be read."""

    __name__ = "sick"

    @hookimpl
    def cilnorm_norms(self) -> list[Norm]:
        def check() -> None:
            raise AssertionError("off by\none")

        return [Norm("off", torch.nn.BatchNorm2d, check=check)]

    @hookimpl
    def cilnorm_datasets(self) -> list[Dataset]:
        def build(root: Path | None) -> None:
            raise OSError("worms")

        return [Dataset("wormy", build, found=lambda root: True), Dataset("there", fake.blobs, found=lambda root: True)]


def test_what_is_amiss(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    registry = load(extra=[fake, Sick(), object()])
    found = {finding.name: finding for finding in examine(registry, tmp_path, tmp_path / "file" / "runs")}
    bad = {name: finding.text for name, finding in found.items() if not finding.healthy}
    assert bad.pop("runs").startswith(f"can't write in {tmp_path / 'file'}: Not a directory")
    assert bad == {
        "norm off": "differs from its reference: AssertionError: off by one",
        "data set wormy": "OSError: worms",
        "plugin object": bad["plugin object"],
    }
    assert found["data set there"].text == "144 + 120 images of 6 classes, SHA-256 of-blobs"


@pytest.mark.parametrize(("attribute", "value"), [("eps", 1e-3), ("momentum", 0.2)])
def test_the_check_of_tbbn_can_fail(attribute: str, value: float) -> None:
    from cilnorm.batch import Composition, set_composition
    from cilnorm_norms._task_balanced.check import check

    layer = load().norms["tbbn"].build(5, dtype=torch.double)
    set_composition(layer, Composition(48, 16, 4))
    setattr(layer, attribute, value)
    with pytest.raises(AssertionError, match=r"output|running mean"):
        check(layer, 8, Composition(48, 16, 4))


def test_the_command_has_status_1_where_something_is_amiss(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["doctor", "--data-root", str(tmp_path), "--out", str(tmp_path)]
    for known, status in ((registry, 0), (load(extra=[Sick()]), 1)):
        monkeypatch.setattr("cilnorm.registry.load", lambda known=known, **_: known)
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == status, done.output
        assert ("BAD norm off: " in done.output) == bool(status)
