"""What somebody else wrote: specs, registry.yaml, archives and plugins are refused in one line, and never take over."""

from __future__ import annotations

import contextlib
import io
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm.registry import Registry, load
from cilnorm.spec import SpecError, read_settings, read_spec, resolve, to_yaml
from cilnorm.values import parsed, seconds
from tests import fake
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(24)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [*{chr(97 + n)}, *{chr(97 + n)}]}}\n" for n in range(24)
)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch HERE']",
        "seed: !!python/object/apply:os.system ['touch HERE']",
        "!!python/object/new:os.system ['touch HERE']",
        "!!python/name:os.system",
        "!!python/module:os",
        LAUGHS,
        MERGES,
        "&a [*a]",
        "a: &a {b: *a}",
        "x" * (1 << 20),
        "[" * 100_000,
        "9" * 100_000,
        "? [a]\n: b",
    ],
    ids=range(13),
)
def test_yaml_that_would_run_or_grow(text: str, registry: Registry, tmp_path: Path) -> None:
    text = text.replace("HERE", str(tmp_path / "malice"))
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    for read in (lambda: read_spec(path, registry), lambda: read_settings(path)):
        with pytest.raises(SpecError) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 2000
    assert not (tmp_path / "malice").exists()


def test_our_own_registry_is_nowhere_near_the_limits() -> None:
    from cilnorm import values

    assert (ROOT / "registry.yaml").stat().st_size * 10 < values.TEXT_LIMIT
    assert parsed("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: *a}", "here") == {
        "a": [1, 2], "b": [1, 2], "c": {"d": 1, "e": [1, 2]},
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["../norm", "a/b", "/etc/passwd", "..", ".hidden", "a\\b", "a\0b", "a b", "", "-rf", 7, None]
)
def test_plugin_names_with_path_characters(name: Any) -> None:
    class Hostile:
        __name__ = "hostile"

        @hookimpl
        def cilnorm_norms(self) -> list[Norm]:
            return [Norm(name, lambda: None)]

    [failed] = load(extra=[Hostile()]).failed
    assert failed.name == "hostile"
    assert failed.error
    assert "\n" not in failed.error


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["../../outside", "/etc/passwd"])
def test_an_archive_with_links_that_lead_out(kind: bytes, target: str, tmp_path: Path) -> None:
    from cilnorm_datasets import _cifar, cifar100

    (tmp_path / "outside").write_text("untouched")
    with tarfile.open(tmp_path / "archive", "w:gz") as tar:
        link = tarfile.TarInfo(f"{cifar100.FOLDER}/train")
        link.type, link.linkname = kind, target
        tar.addfile(link)
        entry = tarfile.TarInfo(f"{cifar100.FOLDER}/train")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"out"))
    place = tmp_path / "data" / "part"
    place.mkdir(parents=True)
    with pytest.raises(tarfile.FilterError):
        _cifar._extract(cifar100._release(), tmp_path / "archive", place)
    assert (tmp_path / "outside").read_text() == "untouched"
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(("text", "value"), [("60s", 60), ("5m", 300), ("1.5h", 5400), ("90", 90), (" 2 ", 2)])
def test_durations(text: str, value: float) -> None:
    assert seconds(text, "here") == value


@pytest.mark.parametrize("text", ["", "0", "0s", "-1s", "1d", "inf", "nan", "1e3s", "s", "9" * 400])
def test_no_durations(text: str) -> None:
    with pytest.raises(SpecError, match="here: expected a duration such as 60s"):
        seconds(text, "here")


# At random

WORDS = st.sampled_from([
    "preset", "presets", "methods", "extends", "tasks", "rows", "norm", "tbbn", "schedule", "lr", "milestones", "seed",
    "memory", "[", "]", "{", "}", ":", ": ", "- ", "\n", "\n  ", "&a ", "*a", "<<: ", "!!int ", "!!float ",
    "!!timestamp ", "1", "-7", "1e400", "null", "~", "'", '"', "#", "|", ">", "%", "\t", "\x00", "true", "2024-01-01",
])  # fmt: skip
EDITS = st.lists(st.tuples(st.integers(0, 5000), WORDS), max_size=6)


def edited(text: str, edits: list[tuple[int, str]]) -> str:
    for at, word in edits:
        at %= len(text) + 1
        text = text[:at] + word + text[at + len(word) :]
    return text


def only_spec_errors(read: Callable[[], object]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(SpecError):
        read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "file.yaml"


SHELVES = load(extra=[fake], strict=True)
SPEC = to_yaml(resolve("quick", SHELVES, norm="tbbn", method="lucir"))


@given(edits=EDITS)
def test_specs_at_random(edits: list[tuple[int, str]], place: Path) -> None:
    place.write_text(edited(SPEC, edits))
    only_spec_errors(lambda: read_spec(place, SHELVES))


@given(words=st.lists(WORDS, max_size=40))
def test_words_at_random(words: list[str], place: Path) -> None:
    place.write_text("".join(words))
    only_spec_errors(lambda: read_spec(place, SHELVES))
    only_spec_errors(lambda: read_settings(place))


SHORT = yaml.safe_dump({
    "presets": {"a": {"about": "it", "method": "ft", "rows": [3, 1]}, "b": {"extends": "a", "schedule": {"lr": 1.0}}},
    "methods": {"ft": {"a": {"schedule.lr": 2}}},
})  # fmt: skip


@given(edits=EDITS)
def test_registries_at_random(edits: list[tuple[int, str]], place: Path) -> None:
    place.write_text(edited(SHORT, edits))
    only_spec_errors(lambda: read_settings(place))
