"""Decode and prefill of every side as horizontal bars, an SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from peers_report import OURS, Summary

ACCENT, PLAIN = "#1f5a92", "#b9bec4"
GAP = 0.7  # between bars of different bits
BITS = {4: "4 bits", 8: "8 bits", 32: "float32"}


def places(sides: Mapping[str, Any], table: Mapping[str, Summary], depth: int) -> dict[str, float]:
    """side -> where its bar is: the fewest bits on top, the fastest of them first."""
    found: dict[str, float] = {}
    at = 0.0
    for bits in sorted({sides[name]["bits"] for name in table}):
        group = [name for name in table if sides[name]["bits"] == bits]
        for name in sorted(group, key=lambda name: -table[name].tokens(depth)):
            found[name] = at
            at += 1
        at += GAP
    return found


def bars(axes: Axes, at: Mapping[str, float], values: Mapping[str, float], title: str) -> None:
    names = list(at)
    colors = [ACCENT if name.startswith(OURS) else PLAIN for name in names]
    drawn = axes.barh([at[n] for n in names], [values[n] for n in names], color=colors, height=0.8)
    axes.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8, color="#444444")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("tokens/s", fontsize=9)
    axes.set_yticks([at[n] for n in names], names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.margins(x=0.12)


def picture(
    sides: Mapping[str, Any],
    table: Mapping[str, Summary],
    path: Path,
    *,
    threads: int,
    prompt: int,
    depth: int,
) -> None:
    """table: side -> summary at one thread count."""
    at = places(sides, table, depth)
    figure = Figure(figsize=(8, 1.2 + 0.3 * max(at.values(), default=0)), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    decode = {name: side.tokens(depth) for name, side in table.items()}
    prefill = {name: side.prefill[prompt] for name, side in table.items()}
    bars(left, at, decode, f"decode behind {depth} tokens, {threads} threads")
    bars(right, at, prefill, f"prefill of {prompt} tokens")
    for bits, text in BITS.items():
        rows = [place for name, place in at.items() if sides[name]["bits"] == bits]
        if rows:
            where = (1.0, (min(rows) + max(rows)) / 2)
            right.annotate(
                text,
                where,
                xycoords=("axes fraction", "data"),
                fontsize=9,
                rotation=270,
                va="center",
            )
    left.invert_yaxis()  # of both: the axis is shared
    with rc_context({"svg.hashsalt": "peers"}):  # the same figures give the same file
        figure.savefig(path, format="svg", metadata={"Date": None})
