"""solve: puzzles as people write them, answered, checked and drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import BUNDLE, as_json, common, option, placement
from edgert.cli.show import note, print_json

if TYPE_CHECKING:
    from edgert.model import Model
    from edgert.solving import Look, Solution
    from edgert.tasks import Row, Task, Verdict

MAX_FILE_BYTES = 16 << 20
STYLES = {
    "frame": "dim",
    "given": "bold",
    "found": "cyan",
    "wrong": "bold red",
    "blank": "dim",
}


@click.command(epilog='example: edgert solve bundles/hrm-sudoku4 "1...|..3.|.4..|...2"')
@BUNDLE
@click.argument("puzzles", nargs=-1, metavar="[PUZZLE]...")
@option(
    "-f",
    "--file",
    "puzzle_file",
    type=click.File("rb"),
    metavar="FILE",
    help="Puzzles from a file, one a line; - is stdin.",
)
@option(
    "--halt",
    metavar="POLICY",
    help="When a puzzle is done: trained (the model's own rule, the default), "
    "trained:X[:MIN[:MAX]] with another threshold, fixed:N, full.",
)
@option(
    "--batch",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    metavar="N",
    help="Puzzles in the loop at once; answers do not depend on it.",
)
@option("--deadline-ms", type=click.FloatRange(0), metavar="MS", help="Best answer so far then.")
@option("--steps", is_flag=True, help="Show the answer behind every iteration.")
@placement
@as_json
@common
def solve(bundle: Path, puzzles: tuple[str, ...], **given: Any) -> None:
    """Solve puzzles: each until the model itself says that it is done.

    A puzzle is written as people write it: a sudoku as its cells row by row, with dots for blanks
    and any separators between rows. An answer is `solved` only if a checker says so that knows the
    rules and not the model.
    """
    from edgert.cli.talk import load_bundle

    texts = [*puzzles, *_lines(given["puzzle_file"])]
    if not texts:
        raise click.UsageError("give a puzzle, or a file of them (-f FILE)")
    with load_bundle(bundle, given) as model:
        task = model.task
        tokens = [task.parse(text) for text in texts]
        show = None
        if given["steps"] and not given["as_json"]:
            show = lambda look: _look(task, tokens[look.index], look)  # noqa: E731
        solving = model.solving(
            tokens,
            halt=given["halt"],
            batch=given["batch"],
            deadline_ms=given["deadline_ms"],
            on_step=show,
        )
        found = solving.run()
        verdicts = [_verdict(task, q, s) for q, s in zip(tokens, found, strict=True)]
        if given["as_json"]:
            print_json(_json(model, texts, task, found, verdicts, str(solving.exit)))
            return
        _print(model, task, tokens, found, verdicts, solving.exit.most)


def _lines(file: Any) -> list[str]:
    if file is None:
        return []
    from edgert.files import read_at_most

    data = read_at_most(file, MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise click.UsageError(f"the file of puzzles is larger than {MAX_FILE_BYTES:,} bytes")
    try:
        return [line for line in data.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the file of puzzles is not UTF-8: {error}") from None


def _verdict(task: Task, question: Any, solution: Solution) -> Verdict | None:
    return None if solution.values is None else task.check(question, solution.values)


def _json(
    model: Model,
    texts: list[str],
    task: Task,
    found: list[Solution],
    verdicts: list[Verdict | None],
    policy: str,
) -> dict[str, Any]:
    return {
        "bundle": model.manifest.name,
        "task": task.name,
        "placement": model.placement,
        "halt": policy,
        "solutions": [
            {
                "puzzle": text,
                "answer": None if s.values is None else task.text(s.values),
                "solved": v is not None and v.ok,
                "verified": v.reason if v is not None else "no answer",
                "steps": s.steps,
                "finish_reason": s.reason,
                "seconds": s.seconds,
            }
            for text, s, v in zip(texts, found, verdicts, strict=True)
        ],
    }


def _print(
    model: Model,
    task: Task,
    tokens: list[Any],
    found: list[Solution],
    verdicts: list[Verdict | None],
    most: int,
) -> None:
    for question, solution, verdict in zip(tokens, found, verdicts, strict=True):
        beside = [
            f"steps    {_gauge(solution.steps, most)} {solution.steps} of {most}"
            f" ({solution.reason})",
            f"checked  {'no answer' if verdict is None else verdict.reason}",
            f"time     {solution.seconds * 1e3:.1f} ms",
        ]
        _beside(task.draw(question, solution.values), beside)
    if len(found) > 1:
        solved = sum(v is not None and v.ok for v in verdicts)
        steps = sum(s.steps for s in found) / len(found)
        click.echo(
            f"{solved} of {len(found)} solved · {steps:.2f} steps a puzzle · {model.placement}"
        )
    else:
        note(model.placement)


def _look(task: Task, question: Any, look: Look) -> None:
    _beside(task.draw(question, look.values), [f"puzzle {look.index + 1}, step {look.steps}"])


def _gauge(steps: int, most: int) -> str:
    return "" if most > 32 else "█" * steps + "░" * (most - steps)


def _beside(rows: list[Row], notes: list[str]) -> None:
    """A drawing, and lines to its right in the middle of it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    top = max(0, (len(rows) - len(notes)) // 2)
    width = max(sum(len(segment.text) for segment in row) for row in rows)
    for i, row in enumerate(rows):
        line = Text()
        for segment in row:
            line.append(segment.text, STYLES[segment.kind])
        if top <= i < top + len(notes):
            line.pad_right(width - len(line) + 4)
            line.append(notes[i - top])
        console.print(line)
