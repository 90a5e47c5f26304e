"""The command about data sets: ``prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cilnorm.cli.terminal import guarded, loaded, print_table, settings_of

__all__ = ["commands"]

commands = typer.Typer()


@commands.command()
def prepare(
    dataset: Annotated[str | None, typer.Argument(help="Which one; see `cilnorm list`.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder in which data sets lie; also CILNORM_DATA.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="size=256, say.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show what is decoded, and how large it is.")] = False,
    remove: Annotated[str | None, typer.Option(metavar="NAME", help="Remove a data set's decoded images.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fetch or decode a data set before its first run, and verify it; list and remove what was decoded."""

    def work() -> None:
        from cilnorm.data.pixel_cache import entries, image_set
        from cilnorm.data.pixel_cache import remove as remove_entries
        from cilnorm.values import SpecError

        if remove is not None:
            gone = remove_entries(remove)
            if not gone:
                raise SpecError(f"nothing decoded is called {remove!r}; `cilnorm prepare --list` shows what there is")
            for entry in gone:
                print(f"removed {entry.path} ({_size(entry.bytes)})")
        elif list_:
            rows = [
                (
                    each.name,
                    f"{each.size}",
                    f"{each.images:,}",
                    _size(each.bytes),
                    _state(each.complete),
                    str(each.path),
                )
                for each in entries()
            ]
            print_table("decoded images", ("data set", "size", "images", "bytes", "state", "folder"), rows)
        elif dataset is None:
            raise SpecError("name a data set, or give --list or --remove NAME")
        else:
            from cilnorm.spec import resolve

            registry = loaded(False)
            spec = resolve(registry=registry, dataset=dataset, **settings_of(set_ or []))
            images = image_set(registry.datasets[dataset].build(data_root, **spec.dataset_options), verify=True)
            counts = f"{len(images.train_images):,} + {len(images.test_images):,} images of {images.classes} classes"
            side = images.train_images.shape[-1]
            print(f"{dataset}: {counts}, {side} x {side}, SHA-256 {images.digest[:12]}")
            if images.notice:
                print(images.notice)

    guarded(work, debug)


def _state(complete: bool) -> str:
    return "complete" if complete else "unfinished"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
