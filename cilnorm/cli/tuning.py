"""The command ``tune``: hyperparameters chosen on one stream of tasks, evaluated on another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cilnorm.cli.terminal import guarded, loaded, print_table, refuse_several, settings_of

if TYPE_CHECKING:
    from cilnorm.sweep.tuning import Trial

__all__ = ["commands"]

commands = typer.Typer()


@commands.command("tune")
def tune_command(
    search: Annotated[
        list[str], typer.Option(metavar="KEY=...", help="4,8,16 or log:0.01:0.5 or uniform:0:1; may be repeated.")
    ],
    method: Annotated[str | None, typer.Option(help="See `cilnorm list` and `cilnorm show`.")] = None,
    norm: Annotated[str | None, typer.Option(help="See `cilnorm list` and `cilnorm show`.")] = None,
    preset: Annotated[str, typer.Option(help="Where all other values come from.")] = "quick",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For every run.")] = None,
    on: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="For trials alone: class_order, dataset, epochs, ...")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="All combinations of lists, or 20, by default.")] = None,
    metric: Annotated[str, typer.Option(help="A_f, A_a, F, A_l, ... on held-out images.")] = "A_f",
    seeds: Annotated[str, typer.Option(help="Of the winner's evaluation: 0,1,2 or 0-4.")] = "0",
    same_stream: Annotated[
        bool, typer.Option("--same-stream", help="Let trials be on the stream that is evaluated.")
    ] = False,
    search_seed: Annotated[int, typer.Option(help="Of what is tried.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="How many runs at a time.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder; one under tunings/ by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    data_root: Annotated[Path | None, typer.Option(help="Folder in which data sets lie; also CILNORM_DATA.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Choose hyperparameters by trials on one data set or order of classes, and evaluate them on another."""

    def work() -> None:
        from dataclasses import replace

        from cilnorm.api import Launch, tune
        from cilnorm.cli.sweeps_and_results import seed_list, show_sweep
        from cilnorm.metrics import METRICS
        from cilnorm.registry import nearest
        from cilnorm.sweep.search import read_search
        from cilnorm.sweep.tuning import Tuning
        from cilnorm.values import SpecError

        refuse_several("tune")
        if metric not in METRICS:
            raise SpecError(nearest("metric", metric, METRICS))
        asked = {key: value for key, value in (("method", method), ("norm", norm)) if value is not None}
        tuning = Tuning(
            out or Path(), preset, {**asked, **settings_of(set_ or [])}, settings_of(on or []), read_search(search),
            loaded(False), metric, trials, seed_list(seeds), search_seed, same_stream, tell=_line,
        )  # fmt: skip
        tuning.check()
        if out is None:
            tuning = replace(tuning, folder=Path("tunings") / f"{preset}-{tuning.key}")
        print(f"trials in {tuning.folder / 'trials'}")
        found = tune(tuning, Launch(workers, device, data_root), lambda ended: _trials(ended, metric))
        show_sweep(found.winner)
        print(f"again: {found.command}")
        print(found.path)

    guarded(work, debug)


def _line(text: str) -> None:
    print(text, flush=True)


def _trials(ended: Sequence[Trial], metric: str) -> None:
    rows = [
        (str(trial.number + 1), ", ".join(f"{key} {value}" for key, value in trial.values.items()),
         trial.reason if trial.score is None else f"{trial.score:.2f}")
        for trial in ended
    ]  # fmt: skip
    print_table(f"trials, best first, {metric} on held-out images", ("trial", "values", metric), rows)
