"""metrics.jsonl: one JSON object a line for each logged step, and the picture of it.

Steps are counted from 1: the line of step n is written when n updates have been made.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgert.errors import EdgertError, MissingDependency
from edgert.files import write_atomic

MAX_LINE = 1 << 16


class Metrics:
    """Appends lines; each one is in the file when `write` returns, if only the process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Raises EdgertError if the disk is full. Numbers JSON has no word for become null."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise EdgertError(
                f"cannot write: {error.strerror or error}",
                where=str(self.path),
                do="free some space, then train on with --resume",
            ) from error

    def close(self) -> None:
        with suppress(OSError):  # what could not be written has been reported
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. A last line that was cut off is left out."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    with path.open(encoding="utf-8", errors="replace") as file:
        while line := file.readline(MAX_LINE):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) and type(value.get("step")) is int:
                found.append(value)
    return found


def cut(path: Path, done: int) -> None:
    """Remove the lines behind step `done`: those steps are about to be run again."""
    if path.is_file():
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= done]
        write_atomic(path, "".join(kept).encode())


def plot(
    lines: list[dict[str, Any]],
    path: Path,
    title: str,
    bigram: float | None = None,
    per: str = "nats a token",
) -> None:
    """Loss against steps as a PNG: training, held-out, and the bigram baseline where it is known;
    of puzzles, the share of held-out ones that were solved, on an axis of its own.

    per  what the losses are of, as the bigram's
    Raises MissingDependency, EdgertError if the disk refuses.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("matplotlib", "train", why="it draws the loss") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        points = [(m["step"], m["loss"]) for m in lines if m.get("loss") is not None]
        evaluated = [(m["step"], m["heldout"]) for m in lines if m.get("heldout") is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, color="#9db8d2", linewidth=0.8, label="training, each step")
            if len(points) >= 20:
                means = smooth(losses, max(5, len(points) // 40))
                axes.plot(steps, means, color="#1f5a92", linewidth=1.8, label="training, mean")
        if evaluated:
            axes.plot(
                *zip(*evaluated, strict=True), "o-", color="#c2571a", markersize=4, label="held out"
            )
        if bigram is not None:
            axes.axhline(bigram, color="#666666", linestyle="--", linewidth=1, label="bigram")
        axes.set_xlabel("step")
        axes.set_ylabel(f"loss ({per})")
        axes.set_title(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        solved = [m for m in lines if m.get("heldout_exact") is not None]
        if solved:
            _shares(axes, solved)
        elif axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())


def _shares(axes: Any, solved: list[dict[str, Any]]) -> None:
    """What held-out puzzles say, from 0 to 1, on the right."""
    right = axes.twinx()
    steps = [m["step"] for m in solved]
    for key, style, label in (
        ("heldout_exact", "o-", "solved, full depth"),
        ("heldout_exact_early", "s--", "solved, stopping by itself"),
    ):
        values = [m.get(key) for m in solved]
        right.plot(steps, values, style, color="#c2571a", markersize=4, linewidth=1, label=label)
    right.set_ylim(-0.02, 1.02)
    right.set_ylabel("share of held-out puzzles")
    right.spines["top"].set_visible(False)
    lines = [*axes.lines, *right.lines]  # one legend, between losses that fell and shares that rose
    right.legend(lines, [line.get_label() for line in lines], frameon=False, loc="center right")


def smooth(values: tuple[float, ...], width: int) -> list[float]:
    """The mean of the values around each place, up to `width` of them."""
    sums = [0.0, *itertools.accumulate(values)]
    half = width // 2
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]
