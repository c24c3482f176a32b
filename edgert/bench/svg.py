"""Four small plots as SVG text: a line with its band, a histogram, a bar of parts, a choice.

They take their looks from `STYLE`, which the page around them has (or `alone` adds); it follows
light and dark. All text is escaped here; numbers are our own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 880, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 26, 36
_INNER_W, _INNER_H = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
_MOST_POINTS = 600  # of a line: more are thinned out by taking medians
_BINS = 40

STYLE = """
:root{color-scheme:light dark;--bg:#fafaf8;--panel:#fff;--ink:#1c1e21;--soft:#62676e;
--rule:#e3e3df;--accent:#1f6fb5;--band:#1f6fb530;--mark:#b4471f;
--p1:#8a63c2;--p2:#1f6fb5;--p3:#a3680e;--p4:#1f7f64;--p5:#6d737a;--in:#fff}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--panel:#1d2024;--ink:#e8e9ea;--soft:#9ba1a8;
--rule:#33373c;--accent:#6db1ee;--band:#6db1ee38;--mark:#f08a5d;
--p1:#b091e0;--p2:#6db1ee;--p3:#e6ae55;--p4:#5cc4a3;--p5:#969ca3;--in:#15171a}}
svg text{font-size:12px;fill:var(--soft)}
.tick,.name,.in{text-anchor:middle}.left{text-anchor:end}
svg .name{fill:var(--mark)}svg .in{fill:var(--in);font-size:13px}
.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}
.band{fill:var(--band)}.bar{fill:var(--accent)}
.mark{stroke:var(--mark);stroke-width:1.5;stroke-dasharray:4 3}
.part1{fill:var(--p1)}.part2{fill:var(--p2)}.part3{fill:var(--p3)}.part4{fill:var(--p4)}
.part5{fill:var(--p5)}
svg .dot{fill:var(--soft);fill-opacity:.75}svg .own{fill:var(--accent)}svg .chosen{fill:var(--mark)}
"""


def band(rows: Sequence[Sequence[float]], *, x: str, y: str, label: str) -> str:
    """The median over rows at each place, in a band from the smallest to the largest."""
    values = np.asarray(rows, np.float64)
    low, middle, high = values.min(0), np.median(values, 0), values.max(0)
    places = np.arange(len(middle)) + 2.0  # the first time between tokens leads to token 2
    groups = np.array_split(np.arange(len(middle)), min(len(middle), _MOST_POINTS))
    xs = [float(np.median(places[g])) for g in groups]
    lows, highs = [float(low[g].min()) for g in groups], [float(high[g].max()) for g in groups]
    middles = [float(np.median(middle[g])) for g in groups]
    top = _ceiling(max(highs))
    first, last = xs[0], max(xs[-1], xs[0] + 1)

    def at(place: float, value: float) -> str:
        return f"{_x((place - first) / (last - first)):.1f},{_y(value / top):.1f}"

    edge = [at(p, v) for p, v in zip(xs, highs, strict=True)]
    edge += [at(p, v) for p, v in zip(reversed(xs), reversed(lows), strict=True)]
    line = " ".join(at(p, v) for p, v in zip(xs, middles, strict=True))
    marks = [(first + (last - first) * i / 4, i / 4) for i in range(5)]
    body = [
        _grid(top, y),
        f'<polygon class="band" points="{" ".join(edge)}"/>',
        f'<polyline class="line" points="{line}"/>',
        *(_below(_x(share), f"{place:.0f}") for place, share in marks),
        _axis(x),
    ]
    return _svg(label, body)


def histogram(values: Sequence[float], marks: Mapping[str, float], *, x: str, label: str) -> str:
    """How often which value; `marks` are drawn as lines with their names."""
    array = np.asarray(values, np.float64)
    lowest, highest = float(array.min()), float(array.max())
    if highest <= lowest:
        lowest, highest = lowest * 0.9, highest * 1.1 + 1e-9
    counts, edges = np.histogram(
        array, bins=min(_BINS, max(4, array.size)), range=(lowest, highest)
    )
    top = _ceiling(float(counts.max()))

    def place(value: float) -> float:
        return _x((value - lowest) / (highest - lowest))

    body = [_grid(top, "tokens")]
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        if count:
            height = _y(0) - _y(float(count) / top)
            body.append(
                f'<rect class="bar" x="{place(left) + 0.5:.1f}" y="{_y(0) - height:.1f}" '
                f'width="{max(1.0, place(right) - place(left) - 1):.1f}" height="{height:.1f}"/>'
            )
    taken = -math.inf
    for name, value in sorted(marks.items(), key=lambda item: item[1]):
        at = place(value)
        body.append(
            f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 6}" y2="{_y(0):.1f}"/>'
        )
        if at - taken > 34:  # else its name would lie on the one before
            body.append(f'<text class="name" x="{at:.1f}" y="{_TOP - 11}">{escape(name)}</text>')
            taken = at
    for i in range(5):
        body.append(_below(_x(i / 4), _tick(lowest + (highest - lowest) * i / 4)))
    body.append(_axis(x))
    return _svg(label, body)


@dataclass(frozen=True)
class Dot:
    """One of the things to choose from: where it lies, its name, and `dot`, `own` or `chosen`."""

    x: float
    y: float
    name: str
    kind: str


def choice(
    dots: Sequence[Dot],
    line: Sequence[tuple[float, float]],
    legend: Sequence[tuple[str, str]],
    *,
    x: str,
    y: str,
    label: str,
) -> str:
    """Dots with the line through the best of them. Their names are shown when they are pointed at.

    legend  (kind, what it means), from the top: in the lower right corner, where what costs much
            and gives little would be
    """
    right = _ceiling(max(dot.x for dot in dots))
    top = _ceiling(max(dot.y for dot in dots))
    places = " ".join(f"{_x(a / right):.1f},{_y(b / top):.1f}" for a, b in line)
    body = [_grid(top, y), f'<polyline class="line" points="{places}"/>']
    for dot in dots:
        at, height = _x(dot.x / right), _y(dot.y / top)
        body.append(
            f'<circle class="{dot.kind}" cx="{at:.1f}" cy="{height:.1f}" r="4.5">'
            f"<title>{escape(dot.name)}</title></circle>"
        )
    for below, (kind, name) in enumerate(reversed(legend)):
        place = f'x="{WIDTH - _RIGHT - 4}" y="{HEIGHT - _BOTTOM - 12 - 18 * below}"'
        body.append(f'<text class="left {kind}" {place}>{escape(name)} \u25cf</text>')
    body += [_below(_x(i / 4), _tick(right * i / 4)) for i in range(5)]
    body.append(_axis(x))
    return _svg(label, body)


def alone(plot: str) -> str:
    """A plot as a file of its own."""
    head, _, rest = plot.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n'


def parts(values: Mapping[str, float], *, label: str) -> str:
    """One bar whose pieces are the parts, in order; `legend` names them. Values of 0 or less are
    not drawn."""
    total = sum(value for value in values.values() if value > 0) or 1.0
    body, at = [], 0.0
    for number, (name, value) in enumerate(values.items(), 1):
        width = max(0.0, value) / total * WIDTH
        if width > 0:
            body.append(
                f'<rect class="part{number}" x="{at:.2f}" y="0" width="{width:.2f}" height="34">'
                f"<title>{escape(name)}</title></rect>"
            )
        if width > 9 * len(name) + 16:
            body.append(f'<text class="in" x="{at + width / 2:.1f}" y="22">{escape(name)}</text>')
        at += width
    return (
        f'<svg viewBox="0 0 {WIDTH} 34" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )


def _svg(label: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )


def _x(share: float) -> float:
    return _LEFT + share * _INNER_W


def _y(share: float) -> float:
    return _TOP + (1 - share) * _INNER_H


def _ceiling(value: float) -> float:
    """A round number at or above, whose quarters are round, too."""
    if value <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(value))
    return next(
        step * scale for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * scale >= value
    )


def _tick(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _grid(top: float, unit: str) -> str:
    lines = [f'<text class="unit" x="{_LEFT - 48}" y="{_TOP - 11}">{escape(unit)}</text>']
    for i in range(5):
        y = _y(i / 4)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(
            f'<text class="tick left" x="{_LEFT - 8}" y="{y + 4}">{_tick(top * i / 4)}</text>'
        )
    return "".join(lines)


def _below(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 18}">{escape(text)}</text>'


def _axis(text: str) -> str:
    return f'<text class="tick" x="{_x(0.5):.1f}" y="{HEIGHT - 3}">{escape(text)}</text>'
