"""The command line: what it prints, and that nobody sees a traceback who did not ask for one."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cilnorm import registry as registries
from cilnorm.cli.app import app
from cilnorm.experiment.runner import Result
from cilnorm.registry import Registry, load
from cilnorm.spec import Spec, read_settings, to_yaml
from tests import fake
from tests.conftest import ROOT, TINY
from tests.strangers import distribute, norm

pytestmark = pytest.mark.slow

COMMANDS = ("run", "resume", "list", "show", "plugins", "bench", "table", "report", "compare", "probe", "tune")


@pytest.fixture(autouse=True)
def _with_the_fake_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registries, "load", lambda strict=False: load(extra=[fake], strict=strict))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def spec_file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


def cilnorm(*arguments: str | Path) -> Any:
    """What the command answers: exit_code, stdout, stderr."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))


def in_a_process(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same as a command of its own, with ``path`` in front of Python's."""
    before = [str(path)] if path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*before, str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", "from cilnorm.cli.app import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def complaint(result: Any, exit_code: int = 2) -> str:
    """The one line on stderr."""
    assert result.exit_code == exit_code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("cilnorm: ")
    assert "Traceback" not in result.output
    return lines[0].removeprefix("cilnorm: ")


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_imports_no_torch(command: str) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    heavy = "('torch', 'timm', 'numpy', 'matplotlib', 'pluggy', 'cilnorm_norms')"
    code = f"""
import sys
from cilnorm.cli.app import main
sys.argv = ["cilnorm", *{arguments}]
try:
    main()
finally:
    sys.stderr.write(str([name for name in {heavy} if name in sys.modules]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # whatever else the machine does
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr == "[]"
    assert seconds < 1  # 0.2 s of a processor that nothing else slows down


def test_no_arguments_show_the_commands() -> None:
    result = cilnorm()
    assert all(command in result.output for command in COMMANDS)


# What there is


def test_bench_runs_a_benchmark_with_its_own_options() -> None:
    done = in_a_process("bench", "norms", "--only", "gn", "--pairs", "1")
    [row] = [line for line in done.stdout.splitlines() if line.startswith("| gn")]
    assert all(float(cell) > 0 for cell in row.strip("| ").split(" | ")[1:])


def test_bench_says_which_there_are() -> None:
    assert "norms" in complaint(cilnorm("bench"), 0)
    assert "'nrms'" in complaint(cilnorm("bench", "nrms"))


def test_list_shows_every_name() -> None:
    result = cilnorm("list")
    assert result.exit_code == 0
    registry = load()
    names = [name for shelf in registry.shelves for name in shelf] + list(read_settings().presets)
    words = result.stdout.replace(",", " ").split()
    assert not set(names) - set(words)
    for shelf in registry.shelves:
        for record in shelf.values():
            assert set(record.aliases) <= set(words)
            assert record.paper in result.stdout
    assert "cilnorm 0." in result.stdout


def test_plugins_shows_what_failed_and_why(tmp_path: Path) -> None:
    distribute(tmp_path / "site", "stranger", {"stranger_norm": norm("theirs"), "stranger_sick": "1 / 0"})
    done = in_a_process("plugins", path=tmp_path / "site")
    assert done.returncode == 0
    assert "norm theirs" in done.stdout
    [sick] = [line for line in done.stdout.splitlines() if "stranger_sick" in line]
    assert "ZeroDivisionError: division by zero" in sick
    assert done.stderr == ""


def test_a_sick_plugin_is_mentioned_and_strict_makes_it_an_error(tmp_path: Path) -> None:
    distribute(tmp_path / "site", "stranger", {"stranger_norm": norm("theirs"), "stranger_sick": "1 / 0"})
    done = in_a_process("list", path=tmp_path / "site")
    assert done.returncode == 0
    assert "theirs" in done.stdout
    left_out = "plugin 'stranger_sick' of stranger 1.0 left out: ZeroDivisionError: division by zero"
    assert done.stderr == f"cilnorm: {left_out}\n"
    done = in_a_process("list", "--strict", path=tmp_path / "site")
    assert done.returncode == 2
    assert done.stderr == "cilnorm: plugin 'stranger_sick' of stranger 1.0: ZeroDivisionError: division by zero\n"


def test_names_are_taken_in_capitals_too() -> None:
    asked = ("--norm", "TBBN", "--method", "LUCIR", "--backbone", "ResNet32", "--dataset", "Numerals")
    done = cilnorm("run", "--dry-run", *asked, "--preset", "QUICK", "--protocol", "Released")
    values = yaml.safe_load(done.stdout)
    assert [values[part] for part in ("norm", "method", "backbone", "dataset")] == [
        "tbbn", "lucir", "resnet32", "numerals",
    ]  # fmt: skip
    assert (values["preset"], values["protocol"]["epoch"]) == ("quick", "cycle")


def test_the_version() -> None:
    from importlib.metadata import version

    assert cilnorm("--version").stdout == f"cilnorm {version('cilnorm')}\n"


def test_a_shell_completes_commands() -> None:
    code = "import sys; sys.argv[:] = ['cilnorm']; from cilnorm.cli.app import main; main()"
    asked = {"_CILNORM_COMPLETE": "complete_bash", "COMP_WORDS": "cilnorm sh", "COMP_CWORD": "1"}
    environment = {**os.environ, **asked}
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["show"]


# One thing and its options


def test_show_has_all_that_can_be_set_about_lucir() -> None:
    lines = cilnorm("show", "UCIR").stdout.splitlines()
    assert lines[0].startswith("method lucir: Cosine classifier")
    assert "  paper: https://doi.org/10.1109/CVPR.2019.00092" in lines
    assert "  aliases: ucir" in lines
    assert any(line.startswith("  distribution: cilnorm 0.") for line in lines)
    assert "  with --protocol released: imprint false, protocol.current_rows union" in lines
    [less_forget] = [line.split() for line in lines if line.lstrip().startswith("less_forget")]
    assert less_forget[:7] == ["less_forget", "5.0", "number", "λ_base", "section", "4.1", "weight"]
    assert "    L = CE(σ cos(f, w))" in "\n".join(lines)


def test_show_says_whether_a_norm_must_know_the_composition() -> None:
    assert "must know the composition of a batch: yes" in cilnorm("show", "tbbn").stdout
    assert "must know the composition of a batch: no" in cilnorm("show", "bn").stdout
    assert "chosen on held-out images unless set: groups among 4, 8, 16, 32" in cilnorm("show", "cn*").stdout


def test_show_tells_sizes_of_images() -> None:
    for name, line in (
        ("resnet18", "made for images of: 224 x 224 pixels; sides of the stages' maps: 56, 28, 14, 7"),
        ("resnet18-podnet", "made for images of: 224 x 224 pixels; sides of the stages' maps: 112, 56, 28, 14"),
        ("timm-resnet50", "made for images of: 224 x 224 pixels; sides of the stages' maps: 56, 28, 14, 7"),
        ("resnet32", "made for images of: 32 x 32 pixels; sides of the stages' maps: 32, 16, 8"),
        ("numerals", "its images: 32 x 32 pixels, or as `size` says"),
        ("cifar10", "its images: 32 x 32 pixels"),
        ("imagenet100-1993", "its images: 256 x 256 pixels, or as `size` says"),
        ("imagenet100-1993", "images: 256 x 256 pixels; the network is given 224 x 224 pixels"),
        ("cifar100-16", "images: 16 x 16 pixels; the network is given 16 x 16 pixels"),
    ):
        assert f"  {line}" in cilnorm("show", name).stdout.splitlines(), name


def test_show_has_a_data_set_and_a_preset_of_one_name_and_the_sections() -> None:
    page = cilnorm("show", "cifar100").stdout
    assert "dataset cifar100: CIFAR-100" in page
    assert "preset cifar100: the protocol of Cha et al." in page
    [epochs] = [line.split() for line in page.splitlines() if "schedule.epochs" in line]
    assert epochs[:3] == ["schedule.epochs", "160", "1"]
    assert "weight_decay" in cilnorm("show", "schedule").stdout
    assert complaint(cilnorm("show", "lucri")).startswith(
        "no method, norm, backbone, data set, preset or grid called 'lucri'"
    )


def test_show_has_the_named_protocols_and_what_they_do_to_a_method() -> None:
    lines = cilnorm("show", "protocol").stdout.splitlines()
    [pycil] = [line for line in lines if line.split()[:1] == ["pycil"]]
    assert "batches shuffled" in pycil
    assert "class_order 1993" in pycil
    assert "with --protocol pycil: bias true, non_negative false" in cilnorm("show", "wa").stdout
    assert "without exemplars (memory 0): possible" in cilnorm("show", "ft").stdout


def test_show_knows_every_name_and_every_option_has_a_meaning() -> None:
    registry = load()
    for name in [*(name for shelf in registry.shelves for name in shelf), *read_settings().presets, "spec", "protocol"]:
        result = cilnorm("show", name)
        assert result.exit_code == 0, (name, result.output)
        assert "(not described)" not in result.stdout, name


def test_show_reads_what_a_strangers_plugin_says(tmp_path: Path) -> None:
    source = '''
from torch import nn
from cilnorm.hookspecs import Norm, hookimpl

class Theirs(nn.BatchNorm2d):
    """A norm of theirs.

    Args:
        strength (κ, equation 3): how strongly
            it acts.
    """
    def __init__(self, num_features, eps=1e-5, *, strength: int = 7, secret=1):
        super().__init__(num_features, eps)

@hookimpl
def cilnorm_norms():
    return [Norm("theirs", Theirs)]
'''
    distribute(tmp_path / "site", "stranger", {"stranger_norm": source})
    done = in_a_process("show", "theirs", path=tmp_path / "site")
    assert done.returncode == 0, done.stderr
    [row] = [line.split() for line in done.stdout.splitlines() if line.lstrip().startswith("strength")]
    assert row[:7] == ["strength", "7", "whole", "number", "κ", "equation", "3"]
    assert "how strongly it acts." in done.stdout
    assert done.stdout.count("(not described)") == 1  # the secret one
    assert "distribution: stranger 1.0" in done.stdout


# Specs


def test_dry_run_prints_a_spec_that_can_be_repeated(tmp_path: Path) -> None:
    asked = ("--norm", "tbbn", "--seed", "7", "--class-order-seed", "3", "--epochs", "2", "--memory", "300", "--rows",
             "24:8", "--tasks", "5", "--train-per-class", "9", "--set", "lr=0.5", "--set", "norm.momentum=0.2",
             "--protocol", "released")  # fmt: skip
    first = cilnorm("run", "--dry-run", *asked)
    assert first.exit_code == 0, first.output
    values = yaml.safe_load(first.stdout)
    assert (values["norm"], values["seed"], values["class_order"], values["rows"]) == ("tbbn", 7, 3, [24, 8])
    assert (values["tasks"], values["memory"], values["train_per_class"]) == (5, 300, 9)
    assert (values["schedule"]["epochs"], values["schedule"]["lr"]) == (2, 0.5)
    assert values["norm_options"] == {"momentum": 0.2}
    assert values["protocol"]["epoch"] == "cycle"
    (tmp_path / "again.yaml").write_text(first.stdout)
    again = cilnorm("run", "--dry-run", "--spec", tmp_path / "again.yaml")
    assert again.stdout == first.stdout
    other = cilnorm("run", "--dry-run", "--spec", tmp_path / "again.yaml", "--seed", "8", "--set", "norm=bn")
    assert yaml.safe_load(other.stdout) == {**values, "seed": 8, "norm": "bn", "norm_options": {}}
    assert os.listdir(tmp_path) == ["again.yaml"]


def test_set_takes_lists_pairs_and_null(spec_file: str) -> None:
    settings = ("--set", "milestones=[1]", "--set", "rows=6:2", "--set", "classes=null", "--set", "clip=1e-2")
    values = yaml.safe_load(cilnorm("run", "--dry-run", "--spec", spec_file, *settings).stdout)
    assert values["schedule"]["milestones"] == [1]
    assert values["rows"] == [6, 2]
    assert values["classes"] is None
    assert values["schedule"]["clip"] == 0.01


def test_null_takes_a_presets_value_back(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**TINY, "train_per_class": 9}))
    values = yaml.safe_load(cilnorm("run", "--dry-run", "--spec", "spec.yaml", "--set", "train_per_class=null").stdout)
    assert values["train_per_class"] is None


# Bad input

BAD: dict[str, tuple[list[str], str]] = {
    "norm": (["--norm", "tbn"], "no norm called 'tbn'; did you mean 'tbbn'? there are "),
    "method": (["--method", "fft"], "no method called 'fft'; did you mean 'ft'? there are "),
    "backbone": (["--backbone", "resnte32"], "no backbone called 'resnte32'; did you mean 'resnet32'? there are "),
    "dataset": (["--dataset", "numeral"], "no dataset called 'numeral'; did you mean 'numerals'? there are "),
    "preset": (["--preset", "cifar"], "no preset called 'cifar'; did you mean 'cifar100'? there are "),
    "protocol": (["--protocol", "x"], "no protocol called 'x'; there are corrected, pycil, released"),
    "key": (["--set", "moment=1"], "no key called 'moment'; did you mean "),
    "symbol": (
        ["--method", "lucir", "--set", "lambda=3"],
        "lucir calls λ_base `less_forget`; `cilnorm show lucir` lists its options",
    ),
    "greek": (["--method", "eeil", "--set", "τ=3"], "eeil calls τ `temperature`; `cilnorm show eeil` lists"),
    "symbol of none": (["--set", "tau=3"], "ft has no tau, though eeil calls τ `temperature`, foster calls τ `temp"),
    "two symbols": (["--method", "podnet", "--set", "lambda=3"], "podnet calls λ_c `spatial` and λ_f `flat`;"),
    "another method's": (
        ["--set", "method.less_forget=3"],
        "ft has no option 'less_forget', though lucir has one; `cilnorm show ft` lists its options",
    ),
    "another norm's": (
        ["--set", "groups=3"],
        "bn has no option 'groups', though cn, cn*, tbbn+cn, evonorm-s0 have one;",
    ),
    "another program's": (["--set", "learning_rate=1"], "no key called 'learning_rate'; did you mean 'lr'? there are "),
    "value": (["--set", "lr=fast"], "schedule.lr: expected float, found 'fast'"),
    "no value": (["--set", "lr"], "--set takes KEY=VALUE, not 'lr'"),
    "no key": (["--set", "=1"], "--set takes KEY=VALUE, not '=1'"),
    "no yaml": (["--set", "lr=[1"], "--set 'lr=[1': no YAML that can be read: "),
    "no date": (["--set", "lr=2024-99-99"], "--set 'lr=2024-99-99': no YAML that can be read: "),
    "rows": (["--rows", "many"], "rows: expected 2 values, found 'many'"),
    "ratio": (
        ["--rows", "50:16", "--protocol", "released"],
        "rows 50:16: the released protocol knows whole ratios only",
    ),
    "epochs": (["--epochs", "0"], "epochs must be at least 1, not 0"),
    "spec": (["--spec", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    "device": (["--device", "abacus"], "no device 'abacus' here: "),
    "tasks": (["--spec", "tiny.yaml", "--tasks", "7"], "6 classes can't be split into 7 tasks"),
    "memory": (["--spec", "tiny.yaml", "--memory", "5"], "a memory of 5 can't hold one exemplar of each of 6 classes"),
    "no run": (["--spec", "tiny.yaml", "--out", "tiny.yaml"], "can't write the run folder tiny.yaml: Not a directory"),
    "files": (
        ["--spec", "tiny.yaml", "--out", "."],
        ". holds other files, which stay as they are: damaged/, tiny.yaml; give --out a new folder",
    ),
    "seed": (["--class-order-seed", "-1"], "class_order: a seed must be in [0, 2**32)"),
    "data": (["--preset", "cifar100", "--data-root", "damaged"], "damaged/cifar-100-python/"),
}


UNTRAINABLE: dict[str, tuple[list[str], str]] = {
    **{name: BAD[name] for name in ("device", "tasks", "memory", "no run", "files", "data", "epochs", "ratio", "spec")},
    "below a file": (["--spec", "tiny.yaml", "--out", "tiny.yaml/run"], "can't write the run folder tiny.yaml/run: "),
    "classes": (["--spec", "tiny.yaml", "--set", "classes=7"], "blobs has 6 classes, not 7"),
    "memory of a set": (["--memory", "5"], "a memory of 5 can't hold one exemplar of each of 100 classes"),
    "too many rows": (
        ["--spec", "tiny.yaml", "--rows", "1:1000000"],
        "rows 1:1000000: a batch of 1000001 rows, but 144 training images",
    ),
    "no batch": (
        ["--spec", "tiny.yaml", "--rows", "48:16", "--protocol", "released"],
        "task 1, phase main: no batch of 64 rows can be filled from [44] images",
    ),
    "splits": (
        ["--spec", "tiny.yaml", "--norm", "tbbn", "--set", "splits=5"],
        "task 2, phase main: 12 current rows can't be cut into 5 splits",
    ),
    "groups": (["--spec", "tiny.yaml", "--norm", "gn", "--set", "groups=7"], "8 channels can't be cut into 7 groups"),
    "engine": (["--spec", "tiny.yaml", "--device", "cpu", "--set", "engine=graph"], "engine graph needs a CUDA device"),
    "logger": (["--spec", "tiny.yaml", "--logger", "cvs"], "no logger called 'cvs'; did you mean 'csv'?"),
    "often": (["--spec", "tiny.yaml", "--checkpoint-every", "often"], "--checkpoint-every: expected a duration"),
    "seeds": (["--spec", "tiny.yaml", "--seeds", "1,1"], "--seeds takes different whole numbers"),
}


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("case", UNTRAINABLE)
def test_a_dry_run_refuses_what_a_run_refuses(case: str, more: list[str], spec_file: str, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged" / "cifar-100-python"
    damaged.mkdir(parents=True)
    for name in ("meta", "train", "test"):
        (damaged / name).write_bytes(b"\x80\x02}")
    arguments, message = UNTRAINABLE[case]
    assert complaint(cilnorm("run", *arguments, *more)).startswith(message)
    assert sorted(os.listdir(tmp_path)) == ["damaged", "tiny.yaml"]  # nothing was begun


def test_a_dry_run_tries_what_is_to_be_chosen_for_whether_it_fits(spec_file: str) -> None:
    done = cilnorm("run", "--dry-run", "--spec", spec_file, "--norm", "cn*")
    assert yaml.safe_load(done.stdout)["norm_options"] == {}
    none = cilnorm("run", "--dry-run", "--spec", spec_file, "--norm", "cn*", "--set", "groups=5")
    assert complaint(none).startswith("8 channels can't be cut into 5 groups")


def test_a_bare_number_of_checkpoint_every_is_seconds(spec_file: str, tmp_path: Path) -> None:
    from cilnorm.values import seconds

    assert seconds("60", "x") == seconds("60s", "x") == 60
    done = cilnorm(
        "run", "--spec", spec_file, "--epochs", "1", "--tasks", "1", "--checkpoint-every", "60", "--out", "r"
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r" / "checkpoints" / "last.pt").is_file()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case: str, spec_file: str, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged" / "cifar-100-python"
    damaged.mkdir(parents=True)
    for name in ("meta", "train", "test"):
        (damaged / name).write_bytes(b"\x80\x02}")
    arguments, message = BAD[case]
    assert complaint(cilnorm("run", *arguments)).startswith(message)


@pytest.mark.parametrize("arguments", [["--sede", "3"], ["--seed", "three"], ["extra"]])
def test_what_the_parser_refuses(arguments: list[str]) -> None:
    result = cilnorm("run", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_folder_that_holds_no_run_or_a_damaged_one(finished: Result, tmp_path: Path) -> None:
    assert complaint(cilnorm("resume", tmp_path / "none")).endswith("none holds no run: there is no such folder")
    checkpoint = finished.folder / "checkpoints" / "last.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert cilnorm("resume", finished.folder).stdout.startswith("warning: ")
    for name in ("last.pt", "previous.pt"):
        (finished.folder / "checkpoints" / name).write_bytes(b"damaged")
    assert "last.pt can't be read: " in complaint(cilnorm("resume", finished.folder))


def test_an_existing_run_is_refused_without_overwrite(finished: Result, spec_file: str) -> None:
    out = ("--spec", spec_file, "--out", finished.folder)
    assert complaint(cilnorm("run", *out)).startswith(f"{finished.folder} holds a run already")
    assert cilnorm("run", *out, "--overwrite", "--epochs", "1").exit_code == 0


def test_a_loss_that_is_no_number_has_status_1(spec_file: str) -> None:
    line = complaint(cilnorm("run", "--spec", spec_file, "--method", "sour", "--out", "run"), 1)
    assert line == "task 2, epoch 1: the term 'sour' of the loss became nan; what was done is in run"


def test_an_error_of_our_own_is_one_line_too(spec_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("cilnorm.experiment.runner.run", fail)
    assert complaint(cilnorm("run", "--spec", spec_file), 1) == "RuntimeError: first line second line"


def test_ctrl_c_has_status_130(spec_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cilnorm.experiment.runner.run", interrupt)
    assert "cilnorm resume" in complaint(cilnorm("run", "--spec", spec_file), 130)


def test_debug_shows_the_traceback() -> None:
    result = cilnorm("run", "--norm", "tbn", "--debug")
    assert type(result.exception).__name__ == "SpecError"
    done = in_a_process("run", "--norm", "tbn", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    done = in_a_process("run", "--norm", "tbn")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


# Runs


def test_a_run_and_its_resumption(figures: None, spec_file: str, tmp_path: Path) -> None:
    result = cilnorm("run", "--spec", spec_file, "--norm", "tbbn", "--out", "run")
    assert result.exit_code == 0, result.output
    for words in ("ft x tbbn x tiny x blobs, 3 tasks, seed 0", "task  3:", "A_f", "forgetting", "A_l"):
        assert words in result.stdout
    assert result.stdout.splitlines()[-1].startswith("run ")
    assert sorted(os.listdir(tmp_path / "run" / "figures")) == [
        "accuracy.pdf", "accuracy.png", "classes.pdf", "classes.png", "matrix.pdf", "matrix.png",
    ]  # fmt: skip
    again = cilnorm("resume", "run")
    assert again.exit_code == 0
    assert result.stdout.splitlines()[-2].split("  (")[0] == again.stdout.splitlines()[-2].split("  (")[0]
    rows = [line for line in result.stdout.splitlines() if line.startswith("task ")]
    assert [line for line in again.stdout.splitlines() if line.startswith("task ")] == rows[-3:]
    assert [row.split(":")[0] for row in rows[-3:]] == ["task  1", "task  2", "task  3"]


def test_a_run_without_out_has_a_folder_of_its_own(spec_file: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert cilnorm("run", "--spec", spec_file, "--tasks", "1", "--epochs", "1").exit_code == 0
    assert len(os.listdir(tmp_path / "runs")) == 2


def test_a_folder_with_brackets_in_its_name(spec_file: str, tmp_path: Path) -> None:
    result = cilnorm("run", "--spec", spec_file, "--tasks", "1", "--epochs", "1", "--out", "[red]run[/]")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "[red]run[" / "]" / "summary.json").exists()


def test_a_process_repeats_what_the_function_computes(
    tiny: Callable[..., Spec], registry: Registry, finished: Result, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    distribute(site, "fake", {}, {"fake": "tests.fake"})
    (tmp_path / "spec.yaml").write_text(to_yaml(tiny()))
    out = tmp_path / "elsewhere"
    done = in_a_process("run", "--spec", str(tmp_path / "spec.yaml"), "--out", str(out), "--device", "cpu", path=site)
    assert done.returncode == 0, done.stderr
    assert (out / "accuracy.csv").read_text() == (finished.folder / "accuracy.csv").read_text()


@pytest.mark.parametrize("words", [("table", "norms"), ("run", "--seeds", "0,1"), ("tune", "--search", "lr=0.1,0.2")])
def test_several_processes_are_for_one_run(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    result = cilnorm(*words)
    assert result.exit_code == 2
    assert "cilnorm: process 1 of 2: torchrun is for one run of several processes" in result.stderr
