"""Train recipes one after the other, side by side in a table and a picture.

    python benchmarks/recipes.py export/hagi-{a,b,c,d}-tiny.toml --runs runs [--plot curves.svg]
    python benchmarks/recipes.py export/hrm-sudoku{4,6}.toml [--plot curves.svg]

All of them learn text, or all of them puzzles.

Each is trained by `edgert train` in a process of its own, into a folder of `--runs`; a run that is
there and complete is taken as it is, one that is not goes on. Times are those of the whole command,
of runs that were not interrupted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from edgert.files import write_atomic
from edgert.train.metrics import read_metrics, smooth
from edgert.train.recipe import read_recipe

COLORS = ("#1f5a92", "#c2571a", "#3a8a4d", "#8a4b9a", "#8a7a2a", "#4a4a4a")
TIMES = "seconds.json"  # of the command, beside the run
CHECKS = ("heldout", "heldout_exact")  # of a text, of puzzles


def trained(recipe: Path, folder: Path) -> dict[str, Any]:
    """The run's result.json, with `name`, `minutes` of the command (None: not known) and curve."""
    result, timed = folder / "result.json", folder / TIMES
    fresh = not folder.exists()
    if fresh or json.loads(result.read_text())["step"] < read_recipe(recipe).train.steps:
        command = [sys.executable, "-m", "edgert", "train", str(recipe), "-o", str(folder)]
        begun = time.perf_counter()
        subprocess.run([*command, *([] if fresh else ["--resume"])], check=True)
        if fresh:
            timed.write_text(json.dumps(time.perf_counter() - begun))
    found: dict[str, Any] = json.loads(result.read_text())
    lines = read_metrics(folder / "metrics.jsonl")
    return found | {
        "name": recipe.stem,
        "minutes": json.loads(timed.read_text()) / 60 if timed.exists() else None,
        "curve": [(m["step"], m["loss"]) for m in lines if m.get("loss") is not None],
        "checks": [
            *((m["step"], m[key]) for key in CHECKS for m in lines if m.get(key) is not None),
            (found["step"], found["heldout"].get("loss", found["heldout"].get("exact"))),
        ],
    }


def puzzle_table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row a recipe."""
    rows = [
        "| | parameters | loss, first update | mean of the last 10 | solved at full depth |"
        " solved, stopping by itself | turns then | best constant answer, cells | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        held = run["heldout"]
        rows.append(
            f"| {run['name']} | {run['parameters']:,} | {run['first']:.3f} | {run['last']:.3f} | "
            f"{held['exact']:.1%} | {held['exact_early']:.1%} | {held['steps']:.2f} of "
            f"{held['most']} | {held['constant_cells']:.1%} | {_minutes(run)} |"
        )
    return "\n".join(rows)


def _minutes(run: dict[str, Any]) -> str:
    return "–" if run["minutes"] is None else f"{run['minutes']:.1f}"


def text_table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row a recipe, and the bigram baseline."""
    rows = [
        "| | parameters | loss, first update | mean of the last 10 | held out, nats |"
        " bits per byte | responds | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        held = run["heldout"]
        rows.append(
            f"| {run['name']} | {run['parameters']:,} | {run['first']:.3f} | {run['last']:.3f} | "
            f"{held['loss']:.4f} | {held['bits_per_byte']:.3f} | {held['sensitivity']:.2f} | "
            f"{_minutes(run)} |"
        )
    bigrams = {run["heldout"]["bigram"] for run in runs}
    rows += [f"| bigram | | | | | {bits:.3f} | | |" for bits in sorted(bigrams)]
    return "\n".join(rows)


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """Training loss (means) of every run, and what was held out, as an SVG: its loss beside that of
    training, or below it the share of puzzles that were solved."""
    puzzles = "exact" in runs[0]["heldout"]
    figure = Figure(figsize=(8, 6.4 if puzzles else 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(2, sharex=True) if puzzles else [figure.add_subplot()] * 2
    axes, below = panels
    for run, color in zip(runs, COLORS, strict=False):
        steps, losses = zip(*run["curve"], strict=True)
        means = smooth(losses, max(5, len(losses) // 25))
        axes.plot(steps, means, color=color, linewidth=1.4, label=run["name"])
        style = "o-" if puzzles else "o"
        below.plot(*zip(*run["checks"], strict=True), style, color=color, markersize=4.5)
    if puzzles:
        axes.set_ylabel("loss (cells and halting, a puzzle)")
        axes.set_ylim(bottom=0.0)
        below.set_ylabel("held-out puzzles solved")
        below.set_ylim(-0.02, 1.02)
    else:
        held = runs[0]["heldout"]
        bigram = held["bigram"] * held["loss"] / held["bits_per_byte"]  # in nats a token
        axes.axhline(bigram, color="#666666", linestyle="--", linewidth=1, label="bigram, held out")
        axes.plot([], [], "o", color="#666666", markersize=4.5, label="held out")
        axes.set_ylim(top=4.0)
        axes.set_ylabel("loss (nats a byte)")
    below.set_xlabel("update")
    for panel in {axes, below}:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})


@click.command()
@click.argument("recipes", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--runs", type=click.Path(path_type=Path), default="runs", show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of the curves (SVG).")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="All figures.")
def main(
    recipes: tuple[Path, ...],
    runs: Path,
    plot: Path | None,
    json_file: Path | None,
) -> None:
    """Train RECIPES and set them side by side."""
    runs.mkdir(parents=True, exist_ok=True)
    found = [trained(recipe, runs / recipe.stem) for recipe in recipes]
    puzzles = {"exact" in run["heldout"] for run in found}
    if len(puzzles) == 2:
        raise click.UsageError("some of these learn text, others puzzles: compare them apart")
    if plot is not None:
        picture(found, plot)
    if json_file is not None:
        write_atomic(json_file, json.dumps(found).encode())
    click.echo(puzzle_table(found) if True in puzzles else text_table(found))


if __name__ == "__main__":
    main()
