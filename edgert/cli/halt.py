"""halt: how early a model's loop may end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import BUNDLE, FILE, F, as_json, common, option, placement
from edgert.cli.show import note, print_json, progress_bar
from edgert.errors import UsageError
from edgert.halting import REPORT

if TYPE_CHECKING:
    from edgert.halting_puzzles import PuzzleReport
    from edgert.halting_report import Report
    from edgert.halting_text import TextReport
    from edgert.model import Model

Column = tuple[str, int, Callable[[Any], str]]  # title, width, a point's cell

OF_TEXT = ("tokens", "window", "agreement")
OF_PUZZLES = ("puzzles", "batch", "loss", "output")


def _number(name: str, least: int, help: str) -> Callable[[F], F]:
    return option(name, type=click.IntRange(least), metavar="N", help=help)


@click.command(epilog="example: edgert halt bundles/deep-tiny --data text.txt")
@BUNDLE
@option(
    "--data",
    type=FILE,
    required=True,
    metavar="FILE",
    help="A text in UTF-8, of the kind that the model is for. Of a model that solves: puzzles, one "
    "a line, each with its solution behind a comma if it is known, or whatever `edgert solve` "
    "reads; or a data set's folder.",
)
@_number("--tokens", 2, "Tokens of a text that are read (default: 2000).")
@_number("--window", 2, "Tokens behind each other (default: 256); the context at most.")
@option(
    "--agreement",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Best tokens that must stay those of full depth (default: 0.999).",
)
@_number("--puzzles", 1, "Puzzles that are read (default: 1000).")
@_number("--batch", 1, "Puzzles in the loop at once (default: 1).")
@option(
    "--loss",
    type=click.FloatRange(0, 100),
    metavar="POINTS",
    help="Points of exact accuracy that may be lost (default: 0.2).",
)
@option(
    "--threshold",
    "thresholds",
    type=float,
    multiple=True,
    metavar="X",
    help="A threshold of `settle` or `trained`; may be repeated (default: a range that the data "
    "suggests).",
)
@option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    metavar="N",
    help="Rounds in which all policies are measured, in turns.",
)
@option(
    "-o",
    "--output",
    type=FILE,
    metavar="FILE.svg",
    help="The picture of accuracy against time (default: <BUNDLE>.halting.svg).",
)
@option("--dry-run", is_flag=True, help="Do not store the report; draw a picture only with -o.")
@placement
@as_json
@common
def halt(bundle: Path, **given: Any) -> None:
    """Measure how early a model's loop may end, and recommend when.

    Decodes the text, or solves the puzzles, with every policy and compares with full depth:
    iterations, agreement or exact accuracy, latency, and how much of what the iterations saved
    allow is gained. The report goes into the bundle as halting.json, and `--halt auto` takes what
    it recommends.
    """
    from edgert.cli.talk import load_bundle
    from edgert.halting_report import store, to_json

    out = given["output"]
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError("there is no folder for the picture", where=str(out.parent))
    with load_bundle(bundle, given) as model:
        solves = model.manifest.solves
        wrong = [name for name in (OF_TEXT if solves else OF_PUZZLES) if given[name] is not None]
        if wrong:
            raise UsageError(
                f"--{wrong[0]} is for a model that {'decodes' if solves else 'solves puzzles'}",
                where=str(bundle),
                do="leave it out",
            )
        report, card = (_on_puzzles if solves else _on_text)(model, given)
        content = to_json(report, model)
        if not given["dry_run"]:
            store(model.bundle, content)
    if given["as_json"]:
        print_json(content)
    else:
        click.echo("\n".join(card))
    drawn = _draw(report, bundle, given) if solves else None
    kept = [f"picture: {drawn}"] if drawn is not None else []
    kept += [] if given["dry_run"] else [f"stored in the bundle: {REPORT}"]
    if kept:
        note("   ".join(kept), quiet=given["quiet"])


def _chosen(given: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What was given of them, and what both sweeps take."""
    shared = {"thresholds": given["thresholds"] or None, "rounds": given["rounds"]}
    return shared | {name: given[name] for name in names if given[name] is not None}


def _on_text(model: Model, given: dict[str, Any]) -> tuple[Report, list[str]]:
    from edgert.evaluate import read_text
    from edgert.halting_text import WINDOW, sweep

    text = read_text(given["data"])
    options = _chosen(given, OF_TEXT)
    options["window"] = min(options.get("window", WINDOW), model.manifest.context)
    with _bar(quiet=given["quiet"]) as moved:
        report = sweep(model, text, progress=moved, **options)
    return report, _text_card(report)


def _on_puzzles(model: Model, given: dict[str, Any]) -> tuple[Report, list[str]]:
    from edgert.halting_data import read_puzzles
    from edgert.halting_puzzles import PUZZLES, sweep

    puzzles = read_puzzles(model, given["data"], given["puzzles"] or PUZZLES)
    with _bar(quiet=given["quiet"]) as moved:
        report = sweep(model, puzzles, progress=moved, **_chosen(given, ("batch", "loss")))
    return report, _puzzle_card(report)


def _draw(report: Any, bundle: Path, given: dict[str, Any]) -> Path | None:
    from edgert.files import write_atomic
    from edgert.halting_picture import picture

    out: Path | None = given["output"]
    if out is None:
        if given["dry_run"]:
            return None
        root = bundle.resolve()
        out = root.parent / f"{root.name}.halting.svg"
    write_atomic(out, picture(report).encode())
    return out


_SPEED: tuple[Column, ...] = (
    ("speed", 8, lambda p: f"{p.speedup:.2f}x"),
    ("of possible", 13, lambda p: f"{p.ceiling_share * 100:.0f} %"),
)
_TEXT: tuple[Column, ...] = (
    ("iterations", 12, lambda p: f"{p.iterations_mean:.2f}"),
    ("p95", 5, lambda p: f"{p.iterations_p95:.0f}"),
    ("agreement", 11, lambda p: f"{p.agreement * 100:.2f} %"),
    ("perplexity", 12, lambda p: f"{p.perplexity:.4f}"),
    ("ms a token", 12, lambda p: f"{p.latency_ms_mean:.3f}"),
    *_SPEED,
)
_PUZZLES: tuple[Column, ...] = (
    ("exact %", 10, lambda p: f"{p.exact * 100:.2f}"),
    ("segments mean / p95", 21, lambda p: f"{p.iterations_mean:.2f} / {p.iterations_p95:.0f}"),
    ("ms / puzzle", 13, lambda p: f"{p.latency_ms_mean:.3f}"),
    ("vs full", 9, lambda p: f"{p.speedup:.2f}x"),
    _SPEED[1],
)


def _table(report: Report, columns: Sequence[Column]) -> list[str]:
    """A row for each policy; the recommended one is marked."""
    width = max(len(p.policy) for p in report.points) + 1
    lines = [f"{'policy':<{width}}" + "".join(f"{title:>{w}}" for title, w, _ in columns)]
    for point in report.points:
        chosen = "  <- recommended" if point.policy == report.recommended else ""
        cells = "".join(f"{cell(point):>{w}}" for _, w, cell in columns)
        lines.append(f"{point.policy:<{width}}{cells}{chosen}")
    return lines


def _line(report: Report, what: str) -> str:
    line = report.line
    return (
        f"{what} takes {line.intercept_ms:.3f} + {line.slope_ms:.3f} x iterations ms "
        f"(R² {line.r2:.4f} over 1 to {report.iterations}); {report.rounds} rounds in turns"
    )


def _text_card(report: TextReport) -> list[str]:
    return [
        *_table(report, _TEXT),
        "",
        _line(report, "a decode step"),
        f"{report.tokens} tokens, windows of {report.window} · skipped iterations filled by "
        f"{report.fill} · {report.placement}",
    ]


def _puzzle_card(report: PuzzleReport) -> list[str]:
    return [
        *_table(report, _PUZZLES),
        "",
        _line(report, "a puzzle"),
        f"{report.puzzles} puzzles, {report.batch} at once, judged by {report.judged_by} · outside "
        f"the graphs {report.host_share * 100:.1f} % · {report.placement}",
    ]


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over the policies; None where nobody wants one."""
    if quiet:
        yield None
        return
    with progress_bar(0) as bar:
        task = bar.add_task("measuring policies")
        yield lambda done, total: bar.update(task, completed=done, total=total)
