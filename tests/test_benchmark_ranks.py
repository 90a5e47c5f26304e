"""The benchmark of several processes against one takes the same steps in all, and says what it found."""

from __future__ import annotations

import sys

import pytest

from benchmarks import ranks


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each process imports everything anew")
def test_it_says_how_much_faster_two_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ranks", "--rounds", "2", "--side", "8", "--norm", "bn"])
    ranks.main()
    where, clock, worked = capsys.readouterr().out.splitlines()
    assert where.startswith("ResNet-18 with bn at 8 px")
    assert clock.startswith("2 processes against one, by the clock: ")
    assert worked.startswith("2 processes against one, in processors' time: ")
