"""What can be set: read from signatures and docstrings, ours and anybody's."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest

from cilnorm.registry import Registry, load
from cilnorm.settings.options import REQUIRED, Option, options_of, spelled


@dataclass(frozen=True)
class Base:
    """Base.

    Attributes:
        scale (η, section 3.2): of the base.
        shared: said by the base.
    """

    scale: float = 1.0
    shared: int = 0


@dataclass(frozen=True)
class Derived(Base):
    """Derived.

    Attributes:
        scale (σ): said anew,
            in two lines.
        first, second: of both.
        needed (equation 7): has a place and no symbol.

    Raises:
        ValueError: is no option.
    """

    needed: str = field(kw_only=True)
    first: bool = False
    second: tuple[int, ...] = ()
    silent: int = 1


def test_a_class_says_what_its_options_mean_and_inherits_the_rest() -> None:
    found = options_of("method", Derived)
    assert found["scale"] == Option("scale", float, 1.0, "said anew, in two lines.", "σ", "")
    assert found["shared"].meaning == "said by the base."
    assert (found["first"].meaning, found["second"].meaning) == ("of both.", "of both.")
    assert found["needed"] == Option("needed", str, REQUIRED, "has a place and no symbol.", "", "equation 7")
    assert found["silent"].meaning == ""
    assert set(found) == {"scale", "shared", "needed", "first", "second", "silent"}


def test_a_partial_has_its_own_defaults_and_what_is_handed_in_is_no_option() -> None:
    def build(norm: object, signed_embedding: bool = False, *, depth: int = 3, **_: object) -> None:
        """A network.

        Args:
            norm: handed in.
            depth (L): of the network.
        """

    assert options_of("backbone", partial(build, depth=9)) == {"depth": Option("depth", int, 9, "of the network.", "L")}


def test_symbols_as_people_type_them() -> None:
    assert [spelled(symbol) for symbol in ("λ_c", "τ", "Λ", "lambda_C", "η")] == [
        "lambda_c", "tau", "lambda", "lambda_c", "eta",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ours() -> Registry:
    return load()


def test_the_symbols_of_the_papers(ours: Registry) -> None:
    symbols = {
        (name, option.name): option.symbol
        for name, record in ours.methods.items()
        for option in options_of("method", record.build).values()
        if option.symbol
    }
    assert symbols == {
        ("eeil", "distillation"): "λ", ("eeil", "temperature"): "τ", ("eeil", "gradient_noise"): "η",
        ("lucir", "less_forget"): "λ_base", ("lucir", "rank_margin"): "m", ("lucir", "rank_k"): "K",
        ("lucir", "scale"): "σ", ("ssil", "temperature"): "τ",
        ("podnet", "spatial"): "λ_c", ("podnet", "flat"): "λ_f", ("podnet", "proxies"): "K",
        ("podnet", "scale"): "η", ("podnet", "margin"): "δ",
        ("afc", "consolidation"): "λ", ("afc", "proxies"): "K", ("afc", "scale"): "η", ("afc", "margin"): "δ",
        ("der", "auxiliary"): "λ_a", ("der", "temperature"): "δ",
        ("foster", "boosting_beta"): "β₁", ("foster", "compression_beta"): "β₂",
        ("foster", "distillation"): "λ", ("foster", "temperature"): "τ",
        ("wa", "temperature"): "τ", ("er-ace", "competing"): "C_curr", ("icarl", "temperature"): "τ",
        ("der++", "logits"): "α", ("der++", "labels"): "β", ("bic", "temperature"): "T",
    }  # fmt: skip


def test_every_norm_says_what_its_options_mean(ours: Registry) -> None:
    for record in ours.norms.values():
        assert all(option.meaning for option in options_of("norm", record.build).values()), record.name
