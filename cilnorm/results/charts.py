"""Charts as SVG text that takes its colours from the page, light or dark.

Every chart is 420 units wide, so that its letters can be read on a phone, and says on hover what a mark stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from cilnorm.text import half_up

__all__ = ["bars", "heat_map", "legend_mark", "lines"]

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 40
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # at 0, 1/4, ... 1
COLOURS = 8  # of the page
MARKS = (  # circle, square, triangle, diamond, triangle on its tip, plus, cross, hourglass; about 8 units wide
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "M-3.5 -3.5H3.5V3.5H-3.5Z",
    "M0 -4.6L4.4 3.4H-4.4Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M0 4.6L4.4 -3.4H-4.4Z",
    "M-1.5 -4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    "M-4.2 -2.1L-2.1 -4.2L0 -2.1L2.1 -4.2L4.2 -2.1L2.1 0L4.2 2.1L2.1 4.2L0 2.1L-2.1 4.2L-4.2 2.1L-2.1 0Z",
    "M-4 -4H4L-4 4H4Z",
)
Points = Sequence[tuple[float, float]]


def lines(
    series: Mapping[str, Sequence[Points]],
    x_label: str,
    y_label: str,
    top: float | None = None,
    bottom: float = 0.0,
    rules: Sequence[float] = (),
    marks: bool = True,
) -> str:
    """Curves over a common axis.

    Args:
        series: by name, one curve a run; several are drawn faintly below their mean. A name keeps its place among the
            colours where it has none.
        top, bottom: of the y axis; by default the data's maximum, and zero.
        rules: places on the x axis with a vertical rule.
        marks: a dot at every point, with its values on hover.
    """
    every = [point for curves in series.values() for curve in curves for point in curve]
    if not every:
        return _empty("nothing to draw yet")
    xs, ys = [x for x, _ in every], [y for _, y in every if math.isfinite(y)] or [0.0]
    frame = _Frame(min(xs), max(xs), min(bottom, min(ys)), max(ys) if top is None else top)
    parts = [frame.axes(x_label, y_label)]
    parts += [
        f'<line class="rule" x1="{frame.x(at):.1f}" x2="{frame.x(at):.1f}" y1="{TOP}" y2="{frame.low}"/>'
        for at in rules
    ]
    for number, (name, curves) in enumerate(series.items()):
        colour = f"c{number % COLOURS}"
        if not curves:
            continue
        if len(curves) > 1:
            parts += [f'<path class="faint {colour}" d="{frame.path(curve)}"/>' for curve in curves]
        mean = _mean(curves)
        parts.append(f'<path class="line {colour}" d="{frame.path(mean)}"><title>{escape(name)}</title></path>')
        for x, y in [(x, y) for x, y in mean if math.isfinite(y)] if marks else ():
            hover = f"{escape(name)}: {_number(x)}, {y:.2f}"
            parts.append(_mark(number, frame.x(x), frame.y(y), f"<title>{hover}</title>"))
    return _svg(HEIGHT, parts, f"{y_label} over {x_label}")


def legend_mark(number: int) -> str:
    """The mark of curve ``number`` (from 0) as a small picture of its own."""
    return f'<svg class="mark" viewBox="-6 -6 12 12" aria-hidden="true">{_mark(number, 0, 0)}</svg>'


def _mark(number: int, x: float, y: float, inner: str = "") -> str:
    """A sign at (x, y); curves that share a colour differ in it."""
    shape = MARKS[(number + number // COLOURS) % len(MARKS)]
    return f'<path class="dot c{number % COLOURS}" transform="translate({x:.1f} {y:.1f})" d="{shape}">{inner}</path>'


def bars(groups: Mapping[str, Sequence[float]], names: Sequence[str], x_label: str, y_label: str) -> str:
    """Bars side by side: for each of ``names`` on the x axis, one of every group."""
    values = [value for group in groups.values() for value in group]
    if not values:
        return _empty("nothing to draw yet")
    frame = _Frame(0, len(names), min(0.0, *values), max(0.0, *values), ticks_x=False)
    parts = [frame.axes(x_label, y_label)]
    room = 0.8 / len(groups)
    zero = frame.y(0)
    for number, (group, heights) in enumerate(groups.items()):
        for at, value in enumerate(heights):
            x, y = frame.x(at + 0.1 + room * number), frame.y(value)
            wide = frame.x(room) - frame.x(0)
            hover = f"{escape(group)}, {escape(names[at])}: {value:.2f}"
            size = f'width="{max(wide - 1, 1):.1f}" height="{max(abs(y - zero), 0.5):.1f}"'
            place = f'x="{x:.1f}" y="{min(y, zero):.1f}" {size}'
            parts.append(f'<rect class="bar c{number % COLOURS}" {place}><title>{hover}</title></rect>')
    every = max(1, math.ceil(len(names) / 14))
    for at in range(0, len(names), every):
        parts.append(f'<text class="tick" x="{frame.x(at + 0.5):.1f}" y="{frame.low + 15}">{escape(names[at])}</text>')
    return _svg(HEIGHT, parts, f"{y_label} by {x_label}")


def heat_map(rows: Sequence[Sequence[float]], x_label: str, y_label: str, top: float = 100.0, unit: str = "%") -> str:
    """Numbers as colours, row by row; rows may be shorter than the longest."""
    if not rows:
        return _empty("nothing to draw yet")
    across, down = max(map(len, rows)), len(rows)
    side = (WIDTH - LEFT - RIGHT) / across
    tall = min(side, 36.0)
    height = TOP + tall * down + BOTTOM
    parts = []
    for t, row in enumerate(rows):
        y = TOP + tall * t
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + tall / 2 + 4:.1f}">{t + 1}</text>')
        for u, value in enumerate(row):
            x = LEFT + side * u
            fill, ink = _viridis(value / top if top else 0.0)
            hover = f"{escape(y_label)} {t + 1}, {escape(x_label)} {u + 1}: {half_up(value)} {escape(unit)}"
            place = f'x="{x:.1f}" y="{y:.1f}" width="{side - 1:.1f}" height="{tall - 1:.1f}"'
            parts.append(f'<rect {place} fill="{fill}"><title>{hover}</title></rect>')
            if across <= 12:
                place = f'x="{x + side / 2:.1f}" y="{y + tall / 2 + 4:.1f}"'
                parts.append(f'<text class="cell {ink}" {place}>{half_up(value)}</text>')
    for u in range(across):
        if u % max(1, math.ceil(across / 20)) == 0:
            parts.append(
                f'<text class="tick" x="{LEFT + side * (u + 0.5):.1f}" y="{TOP + tall * down + 15:.1f}">{u + 1}</text>'
            )
    parts.append(_labels(x_label, y_label, height, TOP + tall * down / 2))
    return _svg(height, parts, f"{y_label} by {x_label}")


class _Frame:
    """Where numbers lie on the sheet."""

    def __init__(self, left: float, right: float, bottom: float, top: float, ticks_x: bool = True) -> None:
        self._left, self._right = left, right if right > left else left + 1
        self._ticks = _ticks(bottom, top if top > bottom else bottom + 1)
        self._bottom, self._top = min(bottom, self._ticks[0]), max(top, self._ticks[-1], bottom + 1e-9)
        self._ticks_x = ticks_x
        self.low = HEIGHT - BOTTOM

    def x(self, value: float) -> float:
        return LEFT + (value - self._left) / (self._right - self._left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.low - (value - self._bottom) / (self._top - self._bottom) * (self.low - TOP)

    def path(self, curve: Points) -> str:
        seen = [(self.x(x), self.y(y)) for x, y in curve if math.isfinite(y)]
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in seen) if seen else ""

    def axes(self, x_label: str, y_label: str) -> str:
        parts = []
        for tick in self._ticks:
            at = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{at + 4:.1f}">{_number(tick)}</text>')
        for tick in _ticks(self._left, self._right, whole=True) if self._ticks_x else ():
            parts.append(f'<text class="tick" x="{self.x(tick):.1f}" y="{self.low + 15}">{_number(tick)}</text>')
        return "".join([*parts, _labels(x_label, y_label, HEIGHT, (TOP + self.low) / 2)])


def _labels(x_label: str, y_label: str, height: float, middle: float) -> str:
    across = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<text class="label" x="{across}" y="{height - 6:.1f}">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(12 {middle:.1f}) rotate(-90)">{escape(y_label)}</text>'
    )


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers from ``low`` to ``high``, both within; about five of them, up to ten whole ones."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= (10 if whole else 6))
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [first * step + at * step for at in range(math.floor(high / step + 1e-9) - first + 1)] or [low]


def _mean(curves: Sequence[Points]) -> Points:
    """Of as many points as every curve has."""
    return [(points[0][0], sum(y for _, y in points) / len(points)) for points in zip(*curves, strict=False)]


def _viridis(part: float) -> tuple[str, str]:
    """A colour for a number in [0, 1], and the class of ink that can be read on it."""
    at = min(max(part if math.isfinite(part) else 0.0, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(at), len(VIRIDIS) - 2)
    rgb = [a + (b - a) * (at - low) for a, b in zip(VIRIDIS[low], VIRIDIS[low + 1], strict=True)]
    light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    return f"rgb({rgb[0]:.0f},{rgb[1]:.0f},{rgb[2]:.0f})", "ink-dark" if light > 125 else "ink-light"


def _number(value: float) -> str:
    return f"{value:.6g}"


def _empty(text: str) -> str:
    return _svg(60, [f'<text class="label" x="{WIDTH / 2}" y="34">{escape(text)}</text>'], text)


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    inner = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{inner}</svg>'
