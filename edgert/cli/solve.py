"""solve: puzzles as people write them, answered, checked and drawn; left off and taken up again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import FILE, as_json, common, key, key_options, option, placement
from edgert.cli.show import note, print_json, size
from edgert.errors import BadFile

if TYPE_CHECKING:
    from edgert.model import Model
    from edgert.solving import Solving
    from edgert.tasks.puzzlefile import Question

MAX_FILE_BYTES = 16 << 20
BATCH = 32


@click.command(epilog='example: edgert solve bundles/sudoku4 "1...|..3.|.4..|...2"')
@click.argument("bundle", type=FILE, required=False)
@click.argument("puzzles", nargs=-1, metavar="[PUZZLE]...")
@option(
    "-f",
    "--file",
    "puzzle_file",
    type=click.File("rb"),
    metavar="FILE",
    help="Puzzles from a file; - is stdin.",
)
@option(
    "--halt",
    metavar="POLICY",
    help="When a puzzle is done: trained (the model's own rule, the default), "
    "trained:X[:MIN[:MAX]] with another threshold, fixed:N, full.",
)
@option(
    "--batch",
    type=click.IntRange(1, 65536),
    metavar="N",
    help=f"Puzzles in the loop at once (default: {BATCH}); answers do not depend on it.",
)
@option(
    "--puzzle-id",
    type=click.IntRange(0),
    metavar="N",
    help="Row of the model's table of puzzles (default: 0, a puzzle it was not trained on).",
)
@option("--deadline-ms", type=click.FloatRange(0), metavar="MS", help="Best answer so far then.")
@option("--max-steps", type=click.IntRange(1), metavar="N", help="The same after N iterations.")
@option("--steps", is_flag=True, help="Show the answer behind every iteration.")
@option(
    "--full-depth",
    is_flag=True,
    help="Measure all iterations, too, and say how long they take.",
)
@option(
    "--session",
    "session_file",
    type=FILE,
    metavar="FILE",
    help="Go on with puzzles that were left off; the bundle is found where it was, or given.",
)
@option("--save", type=FILE, metavar="FILE", help="Save what is left off there, to go on with it.")
@key
@placement
@as_json
@common
def solve(bundle: Path | None, puzzles: tuple[str, ...], **given: Any) -> None:
    """Solve puzzles: each until the model itself says that it is done.

    A puzzle is written as people write it: a sudoku as its cells row by row, with dots for blanks
    and any separators between rows. A file holds one puzzle a line, with its answer behind a comma
    if it is known, or blocks of lines with empty lines between them; of ARC also a JSON file, whose
    test inputs are the puzzles. Of a bundle that does not say what its puzzles are, a puzzle is a
    list of token ids such as 1,2,3.

    An answer is `solved` only if a checker says so that knows the rules and not the model; else it
    is `unverified`. Ctrl-C leaves off behind the iteration that is running.
    """
    from edgert.cli.answers import Answers
    from edgert.cli.talk import stopped_by_ctrl_c

    _check(bundle, puzzles, given)
    keys = key_options(given)
    with _solving(bundle, puzzles, given, keys) as (questions, solving, full):
        answers = Answers(questions, solving, full)
        if given["steps"] and not given["as_json"]:
            solving.on_step = answers.show_look
        before = solving.iterations
        with stopped_by_ctrl_c(solving) as interrupted:
            while not solving.done and solving.stopped is None:
                solving.step()
                if given["max_steps"] == solving.iterations - before and not solving.done:
                    solving.stop("paused")
        saved = None
        if given["save"] is not None:
            saved = (given["save"], solving.save(given["save"], **keys))
        if given["as_json"]:
            print_json(answers.as_json() | {"saved": None if saved is None else str(saved[0])})
        else:
            answers.show()
            note(answers.closing(), quiet=given["quiet"])
            if saved is not None:
                note(f"── saved {saved[0]} ({size(saved[1])})", quiet=given["quiet"])
    if interrupted():
        raise KeyboardInterrupt


def _check(bundle: Path | None, puzzles: tuple[str, ...], given: dict[str, Any]) -> None:
    """Raise click.UsageError for what does not go together."""
    count = len(puzzles) + (given["puzzle_file"] is not None)
    if given["session_file"] is None:
        if bundle is None:
            raise click.UsageError("Missing argument 'BUNDLE': give one, or --session FILE")
        if not count:
            raise click.UsageError("give a puzzle, or a file of them (-f FILE)")
        return
    if count:
        raise click.UsageError("--session has its own puzzles")
    for name in ("halt", "batch", "puzzle_id"):
        if given[name] is not None:
            text = name.replace("_", "-")
            raise click.UsageError(f"--{text} was chosen when the session began, and stays")
    if given["full_depth"]:
        raise click.UsageError("--full-depth measures whole puzzles, not the rest of a session")


@contextmanager
def _solving(
    bundle: Path | None, puzzles: tuple[str, ...], given: dict[str, Any], keys: dict[str, Any]
) -> Iterator[tuple[list[Question], Solving, float | None]]:
    """New puzzles, or those of a session, on their model, which is closed at the end; and what
    `_full_depth` measured, if it was asked for."""
    from edgert.cli.resumed import resumed_solving
    from edgert.cli.talk import load_bundle

    if given["session_file"] is not None:
        with resumed_solving(given["session_file"], bundle, given, keys) as solving:
            yield _saved_questions(solving), solving, None
        return
    assert bundle is not None
    with load_bundle(bundle, given) as model:
        model.check_solves()
        questions = _questions(model, puzzles, given["puzzle_file"])
        tokens = [question.tokens for question in questions]
        chosen: dict[str, Any] = {"number": given["puzzle_id"] or 0}
        chosen["batch"] = given["batch"] or BATCH
        full = _full_depth(model, tokens, chosen) if given["full_depth"] else None
        halt, deadline_ms = given["halt"], given["deadline_ms"]
        solving = model.solving(tokens, halt=halt, deadline_ms=deadline_ms, **chosen)
        yield questions, solving, full


def _questions(model: Model, texts: tuple[str, ...], file: Any) -> list[Question]:
    import numpy as np

    from edgert.tasks.puzzlefile import Question, read_ids, read_questions

    task = model.task if model.manifest.task else None
    data, where = b"", "stdin"
    if file is not None:
        from edgert.files import read_at_most

        data, where = read_at_most(file, MAX_FILE_BYTES + 1), str(getattr(file, "name", where))
        if len(data) > MAX_FILE_BYTES:
            raise click.UsageError(f"the file of puzzles is larger than {size(MAX_FILE_BYTES)}")
    if task is not None:
        typed = [Question(text, task.parse(text)) for text in texts]
        read = [] if file is None else list(read_questions(data, task, where))
        if file is not None and not read:
            raise BadFile("the file has no puzzles", where=where)
        return typed + read
    lines = [line for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    asked = [*texts, *lines]
    if not asked:
        raise click.UsageError("the file has no puzzles")
    return [Question(text, np.array(read_ids(text), np.int32)) for text in asked]


def _saved_questions(solving: Solving) -> list[Question]:
    from edgert.tasks.puzzlefile import Question

    task = solving.model.task if solving.model.manifest.task else None
    return [
        Question(task.text(ids) if task else ",".join(map(str, ids.tolist())), ids)
        for ids in solving.ids
    ]


def _full_depth(model: Model, tokens: list[Any], chosen: dict[str, Any]) -> float:
    """Seconds that all puzzles take at full depth, in the same way, behind a warm-up."""
    model.solving(tokens[:1], **chosen | {"halt": "fixed:1"}).run()
    whole = model.solving(tokens, **chosen | {"halt": "full"})
    whole.run()
    return whole.spent_ns / 1e9
