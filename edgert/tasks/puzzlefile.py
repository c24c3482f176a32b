"""Files with puzzles as people write them: text, one or several in a file, or ARC's JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgert.errors import BadFile, UsageError
from edgert.tasks.arc import Arc
from edgert.tasks.arc_files import open_pairs
from edgert.tasks.puzzle import Task, Tokens

MAX_PUZZLES = 1 << 20
_BETWEEN = re.compile(r"[,\t]")


@dataclass(frozen=True)
class Question:
    """tokens int32 [S]; text as it was given; known: the answer, where a file has it; where: the
    file and the place in it."""

    text: str
    tokens: Tokens
    known: Tokens | None = None
    where: str | None = None


def read_questions(data: bytes, task: Task, where: str) -> Iterator[Question]:
    """The puzzles in a file, as they are asked for: blocks of lines with empty lines between them,
    or a line each, there with the answer behind a comma or a tab if it is known; of ARC also a JSON
    file, whose test inputs are the questions.

    What can be read as a puzzle as a whole is one: commas may stand between colours, too.
    Raises UsageError saying which line is no puzzle, or has an answer that breaks the rules;
    BadFile for what is no text, unsound JSON, or too much.
    """
    if isinstance(task, Arc) and data.lstrip()[:1] == b"{":
        yield from _pairs(data, task, where)
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadFile("the file of puzzles is not UTF-8", where=where) from None
    count = 0
    for first, lines in _blocks(text):
        for question in _block(task, lines, f"{where}, line {{}}", first):
            count += 1
            if count > MAX_PUZZLES:
                raise BadFile(
                    f"more than {MAX_PUZZLES:,} puzzles", where=where, do="split the file"
                )
            yield question


def _pairs(data: bytes, task: Arc, where: str) -> Iterator[Question]:
    for i, pair in enumerate(open_pairs(data, where)):
        place = f"{where}, test[{i}]"
        try:
            canvas, known = (
                None if grid is None else task.lay(grid).astype(np.int32)
                for grid in (pair.input, pair.output)
            )
        except UsageError as error:
            raise UsageError(error.what, where=place, do=error.do) from None
        assert canvas is not None, "a pair has an input"
        yield Question(task.text(canvas), canvas, known, place)


def _blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    """Lines between empty ones, and the number of the first. A row of a maze may be spaces."""
    block: list[str] = []
    first = 1
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line:
            if not block:
                first = number
            block.append(line)
        elif block:
            yield first, block
            block = []
    if block:
        yield first, block


def _block(task: Task, lines: list[str], where: str, first: int) -> Iterator[Question]:
    """One puzzle of several lines, or a puzzle a line. `where` takes the number of a line."""
    whole = "\n".join(lines)
    try:
        question = Question(whole, task.parse(whole), where=where.format(first))
    except UsageError as error:
        problem = error
    else:
        yield question
        return
    begun = False
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        at = number
        try:
            question = _line(task, line, where.format(number))
        except UsageError as error:
            wrong = error
            if not begun and len(lines) > 1 and not any(_asks(task, one) for one in lines[:2]):
                wrong, at = problem, first  # they are rows of one
            place = where.format(at) + (f": {wrong.where}" if wrong.where else "")
            raise UsageError(wrong.what, where=place, do=wrong.do) from None
        begun = True
        yield question


def _line(task: Task, text: str, where: str) -> Question:
    """A puzzle, or a puzzle and its answer."""
    try:
        return Question(text, task.parse(text), where=where)
    except UsageError:
        question, *answers = _BETWEEN.split(text)
        if not answers or (isinstance(task, Arc) and len(answers) > 1):
            raise
    tokens = task.parse(question)
    if len(answers) > 1:
        raise UsageError(
            f"the line has {len(answers) + 1} fields instead of 1 or 2",
            do="give a puzzle, and behind a comma or a tab its answer if it is known",
        )
    known = task.encode(answers[0])
    verdict = task.check(tokens, known)
    if verdict.decided and not verdict.ok:
        raise UsageError(f"the solution is wrong: {verdict.reason}")
    return Question(question, tokens, known, where)


def _asks(task: Task, line: str) -> bool:
    """Whether a line has a puzzle, whatever may be behind it."""
    try:
        task.parse(_BETWEEN.split(line)[0])
    except UsageError:
        return False
    return True


def read_ids(text: str) -> list[int]:
    """The cells of a puzzle as token ids: '1, 2 3' -> [1, 2, 3]. Raises UsageError."""
    parts = text.replace(",", " ").split()
    wrong = next((part for part in parts if not re.fullmatch(r"\d{1,9}", part, re.ASCII)), None)
    if wrong is not None or not parts:
        raise UsageError(
            f"{ascii(wrong or text)[:60]} is no token id, and the bundle does not say what its "
            "puzzles are",
            do="give token ids such as 1,2,3, or export the bundle again with --task",
        )
    return [int(part) for part in parts]
