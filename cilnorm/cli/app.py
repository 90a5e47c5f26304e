"""The command line: parse, call, print. Torch and the plugins are imported once a command needs them."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cilnorm.cli.authors import commands as authors
from cilnorm.cli.care import commands as care
from cilnorm.cli.cluster import job_lines, share_of, submit_run
from cilnorm.cli.data import commands as data
from cilnorm.cli.output import lasting_output
from cilnorm.cli.show import commands as showing
from cilnorm.cli.sweeps_and_results import commands, run_seeds
from cilnorm.cli.terminal import (
    complain,
    guarded,
    loaded,
    make_printable,
    print_table,
    settings_of,
    where,
)
from cilnorm.cli.tuning import commands as tuning

if TYPE_CHECKING:
    from cilnorm.experiment.runner import Result
    from cilnorm.registry import Registry
    from cilnorm.spec import Spec
    from cilnorm.sweep.shared_run import Share

__all__ = ["app", "main"]

app = typer.Typer(
    help="Any normalisation layer with any class-incremental method on any backbone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(showing)
app.add_typer(commands)
app.add_typer(tuning)
app.add_typer(care)
app.add_typer(data)
app.add_typer(authors)
Name = Annotated[str | None, typer.Option()]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Strict = Annotated[bool, typer.Option("--strict", help="A plugin that can't be loaded is an error.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
LoggerNames = Annotated[list[str] | None, typer.Option("--logger", help="csv, wandb, ...; may be repeated.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder in which data sets lie; also CILNORM_DATA.")]
Every = Annotated[
    str | None, typer.Option(metavar="60s", help="Save within epochs, too, after so much time: 60s, 5m, 1h; 60 is 60s.")
]
Classifier = Annotated[
    str | None, typer.Option(help="head: the network's outputs; nme: the class with the nearest mean of exemplars.")
]
Rows = Annotated[str | None, typer.Option(help="Images of the current task and of past ones in a batch, 48:16 say.")]
ProtocolName = Annotated[
    str | None, typer.Option(help="corrected: our reading of the paper; released: as its code runs.")
]
Order = Annotated[
    str | None,
    typer.Option("--class-order", "--class-order-seed", help="A seed (1993), a list (3,1,2) or a file of labels."),
]
Launcher = Annotated[
    str, typer.Option(help="here, or slurm: a job, whose processes share the run; a table has a job a run.")
]
Nodes = Annotated[int, typer.Option(min=1, help="Machines of the job.")]
GPUs = Annotated[int, typer.Option(min=0, help="GPUs that the job takes of each, a process each.")]
Cluster = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Setting of submitit.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="The same bits on a GPU, too, if more slowly.")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"cilnorm {version('cilnorm')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Any normalisation layer with any class-incremental method on any backbone."""


OF_THE_SPEC = (
    "method", "norm", "backbone", "dataset", "seed", "class_order", "tasks", "epochs", "memory", "rows", "classifier",
    "train_per_class", "protocol",
)  # fmt: skip


@app.command("run")
def run_command(
    context: typer.Context,
    method: Annotated[str | None, typer.Option(help="See `cilnorm list` and `cilnorm show`.")] = None,
    norm: Annotated[str | None, typer.Option(help="See `cilnorm list` and `cilnorm show`.")] = None,
    backbone: Annotated[str | None, typer.Option(help="See `cilnorm list` and `cilnorm show`.")] = None,
    dataset: Annotated[str | None, typer.Option(help="See `cilnorm list` and `cilnorm show`.")] = None,
    preset: Annotated[str, typer.Option(help="Where all other values come from.")] = "quick",
    spec: Annotated[Path | None, typer.Option(help="Repeat the run of this spec.yaml instead of a preset.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any hyperparameter.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    class_order: Order = None,
    tasks: Annotated[int | None, typer.Option(help="Into how many tasks the classes are split.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs a task; milestones scale along.")] = None,
    memory: Annotated[int | None, typer.Option(help="Exemplars kept in all.")] = None,
    rows: Rows = None,
    classifier: Classifier = None,
    train_per_class: Annotated[int | None, typer.Option(help="Use so many training images of a class.")] = None,
    protocol: ProtocolName = None,
    logger: LoggerNames = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; a new one under runs/ by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in --out.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Several runs, one a seed: 0,1,2 or 0-4.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many of them at a time.")] = 1,
    launcher: Launcher = "here",
    nodes: Nodes = 1,
    gpus_per_node: GPUs = 0,
    cluster: Cluster = None,
    go_on: Annotated[
        bool, typer.Option("--resume", help="Continue the run that is in --out, if it is the same.")
    ] = False,
    checkpoint_every: Every = None,
    deterministic: Deterministic = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all but train, and print the spec.")] = False,
    strict: Strict = False,
    debug: Debug = False,
) -> None:
    """Learn a sequence of tasks and print the accuracy matrix as it grows."""
    asked = {key: context.params[key] for key in OF_THE_SPEC if context.params[key] is not None}

    def work() -> None:
        registry = loaded(strict)
        chosen = _chosen(registry, preset, spec, {**asked, **settings_of(set_ or [])})
        how = _how(checkpoint_every, deterministic)
        where: dict[str, Any] = {"device": device, "data_root": data_root, "registry": registry}
        where |= {"overwrite": overwrite, "go_on": go_on}
        share = share_of(launcher, nodes, gpus_per_node, settings_of(cluster or []), seeds)
        flags = _flags(logger, checkpoint_every, deterministic)
        if dry_run:
            _rehearse(chosen, out, seeds, logger or [], where, share)
        elif share:
            submit_run(chosen, share, out, flags, where)
        elif seeds:
            run_seeds(chosen, seeds, (workers, device, data_root, flags), out)
        else:
            _run(chosen, out, how | where, logger or [])

    guarded(work, debug)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of the run.")],
    logger: LoggerNames = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    checkpoint_every: Every = None,
    deterministic: Deterministic = False,
    debug: Debug = False,
) -> None:
    """Continue a run that was stopped."""

    def work() -> None:
        from cilnorm.experiment.runner import resume as go_on

        how = _how(checkpoint_every, deterministic)
        how |= {"device": device, "data_root": data_root, "registry": (registry := loaded(False))}
        _watched(lambda watch: go_on(folder, **how, watch=watch), logger, registry)

    guarded(work, debug)


@app.command("list")
def list_command(strict: Strict = False, debug: Debug = False) -> None:
    """Show every norm, method, backbone, data set, preset and grid, and which distribution it is from."""

    def work() -> None:
        from cilnorm.spec import read_settings

        registry = loaded(strict)
        for shelf in registry.shelves:
            rows = [
                (name, ", ".join(record.aliases), record.paper, shelf.sources[name]) for name, record in shelf.items()
            ]
            print_table(f"{shelf.kind}s", ("name", "aliases", "paper", "distribution"), rows)
        settings = read_settings(registry=registry)
        for kind, found in (("preset", settings.presets), ("grid", settings.grids)):
            told = [(name, str(values.get("about", "")), settings.owners[kind, name]) for name, values in found.items()]
            print_table(f"{kind}s", ("name", "about", "distribution"), told)

    guarded(work, debug)


@app.command()
def plugins(strict: Strict = False, debug: Debug = False) -> None:
    """Show what each distribution contributed, and what failed to load and why."""

    def work() -> None:
        rows = [
            (plugin.distribution, plugin.name, ", ".join(f"{kind} {name}" for kind, name in plugin.offers) or "-",
             plugin.error or "ok")
            for plugin in loaded(strict, quiet=True).plugins
        ]  # fmt: skip
        print_table("plugins", ("distribution", "entry point", "offers", "state"), rows)

    guarded(work, debug)


@app.command(context_settings={"allow_interspersed_args": False, "allow_extra_args": True})
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which one; `bench NAME --help` shows its options.")] = None,
) -> None:
    """Run a benchmark on this machine; without a name, show which there are."""
    import runpy

    inside = (
        Path(__file__).resolve().parents[1] / "shipped"
    )  # where the wheel has them; a checkout has them at its root
    home = inside if inside.is_dir() else inside.parent.parent
    found = sorted(path.stem for path in (home / "benchmarks").glob("[a-z]*.py"))
    if name not in found:
        complain(f"{f'no benchmark {name!r}; ' if name else ''}there are {', '.join(found)}")
        raise typer.Exit(2 if name else 0)
    sys.path.insert(0, str(home))
    sys.argv = [f"cilnorm bench {name}", *context.args]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)


def _run(spec: Spec, out: Path | None, how: dict[str, Any], loggers: list[str]) -> None:
    from cilnorm.experiment.runner import run

    _watched(lambda watch: run(spec, out, **how, watch=watch), loggers, how["registry"])


def _rehearse(
    spec: Spec, out: Path | None, seeds: str | None, loggers: list[str], how: dict[str, Any], share: Share | None
) -> None:
    """Refuses what a run would refuse, and prints the spec, and the job if there is to be one."""
    from dataclasses import replace

    from cilnorm.cli.sweeps_and_results import seed_list
    from cilnorm.experiment.loggers import Loggers
    from cilnorm.experiment.trials import rehearse
    from cilnorm.spec import to_yaml

    Loggers(loggers, how["registry"])
    first = replace(spec, seed=seed_list(seeds)[0]) if seeds else spec
    job = job_lines(share, out) if share else []
    rehearse(first, None if seeds else out, **how, planned=share.ranks if share else None)
    if where().leads:
        print(*job, to_yaml(spec), sep="\n", end="")


def _flags(loggers: list[str] | None, checkpoint_every: str | None, deterministic: bool) -> list[str]:
    """The same options once more, for a process of its own."""

    flags = [f"--logger={name}" for name in loggers or ()]
    flags += ["--checkpoint-every", checkpoint_every] if checkpoint_every else []
    return [*flags, "--deterministic"] if deterministic else flags


def _how(checkpoint_every: str | None, deterministic: bool) -> dict[str, Any]:
    from cilnorm.values import seconds

    every = None if checkpoint_every is None else seconds(checkpoint_every, "--checkpoint-every")
    if deterministic:
        from cilnorm.storage.environment import be_deterministic

        be_deterministic()
    return {"checkpoint_every": every}


def _chosen(registry: Registry, preset: str, path: Path | None, asked: dict[str, Any]) -> Spec:
    from cilnorm.spec import read_spec, resolve

    return read_spec(path, registry, **asked) if path else resolve(preset, registry, **asked)


def _watched(go: Callable[[Any], Result], loggers: list[str] | None, registry: Registry) -> None:
    from cilnorm.cli.progress import Display
    from cilnorm.experiment.loggers import Loggers

    if not where().leads:  # another process of the run is watched and speaks
        warnings.simplefilter("ignore")
        go([])
        return
    with Loggers(loggers or [], registry) as logging, Display(registry=registry) as display:
        result = go([display, logging])
    print(f"{result.folder}  (figures/: accuracy and matrix, as .png and .pdf)")


def main() -> None:
    """Entry point of the command ``cilnorm``; a reader that goes away ends nothing."""
    make_printable()
    with lasting_output() as below:
        try:
            app()
        except SystemExit as end:
            sys.stdout.flush()
            if below.error is None or below.error.errno in (errno.EPIPE, errno.EIO):  # who went away wants no more
                raise
            complain(f"can't write standard output: {below.error.strerror}")
            on_the_disk = sys.argv[1:2] in (["run"], ["resume"], ["table"])  # their results lie there, whole
            raise SystemExit(end.code if on_the_disk else end.code or 1) from None
