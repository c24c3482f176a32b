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


@dataclass(frozen=True)
class Question:
    """tokens int32 [S]; text as it was given; known: the answer, where a file has it."""

    text: str
    tokens: Tokens
    known: Tokens | None = None


def read_questions(data: bytes, task: Task, where: str) -> list[Question]:
    """The puzzles in a file: blocks of lines with empty lines between them, or a line each; of ARC
    also a JSON file, whose test inputs are the questions.

    Raises UsageError saying which line is no puzzle, BadFile for what is no text, or unsound JSON.
    """
    if isinstance(task, Arc) and data.lstrip()[:1] == b"{":
        pairs = open_pairs(data, where)
        return [
            Question(
                task.text(canvas := task.lay(pair.input).astype(np.int32)),
                canvas,
                None if pair.output is None else task.lay(pair.output).astype(np.int32),
            )
            for pair in pairs
        ]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"the file of puzzles is not UTF-8: {error}", where=where) from None
    found: list[Question] = []
    for first, lines in _blocks(text):
        found += _block(task, lines, f"{where}, line {{}}", first)
        if len(found) > MAX_PUZZLES:
            raise BadFile(f"more than {MAX_PUZZLES:,} puzzles", where=where, do="split the file")
    if not found:
        raise BadFile("the file has no puzzles", where=where)
    return found


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


def _block(task: Task, lines: list[str], where: str, first: int) -> list[Question]:
    """One puzzle of several lines, or a puzzle a line."""
    whole = "\n".join(lines)
    try:
        return [Question(whole, task.parse(whole))]
    except UsageError as error:
        problem = error
    found: list[Question] = []
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            found.append(Question(line, task.parse(line)))
        except UsageError as error:
            # A first line that is no puzzle: they are rows of one.
            wrong, at = (error, number) if found else (problem, first)
            place = where.format(at) + (f": {wrong.where}" if wrong.where else "")
            raise UsageError(wrong.what, where=place, do=wrong.do) from None
    return found


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
