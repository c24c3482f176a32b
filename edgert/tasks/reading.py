"""Files with puzzles, read with bounds: bytes, JSON, and rows of CSV."""

from __future__ import annotations

import csv
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgert.errors import BadFile
from edgert.files import kind_of, read_at_most, without_waiting
from edgert.tasks.puzzle import several

MAX_DIGITS = 20  # of a number in JSON: long ones take quadratic time to convert
MAX_LINE = 1 << 17  # characters of a line of CSV
NAMED = 20  # violations that a message lists


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; links are followed.

    Raises BadFile if it is missing, unreadable, something else than a file, or larger.
    """
    try:
        with open(path, "rb", opener=without_waiting) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise BadFile(
                    f"{kind_of(info.st_mode)} stands where a file is read", where=str(path)
                )
            data = read_at_most(file, limit + 1)
    except OSError as error:
        raise BadFile(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    if len(data) > limit:
        raise BadFile(
            f"the file has more than {limit:,} bytes",
            where=str(path),
            do="check that it is the file you mean",
        )
    return data


def read_json(path: Path, limit: int) -> Any:
    """The content of a JSON file of at most `limit` bytes. Raises BadFile."""
    return json_value(read_bytes(path, limit), str(path))


def json_value(data: bytes, where: str) -> Any:
    """What JSON text holds; `where` names its file. Raises BadFile."""

    def refuse(what: str) -> NoReturn:
        raise ValueError(what)

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            refuse(f"a number has {len(digits)} digits")
        return int(digits)

    try:
        return json.loads(
            data,
            parse_int=integer,
            parse_constant=lambda name: refuse(f"{name} is not JSON"),
        )
    except RecursionError:
        what = "it is nested too deep"
    except ValueError as error:
        what = str(error)
    raise BadFile(f"the file is not sound JSON: {what}", where=where)


def read_csv(path: Path, header: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file behind its `header`, each with its line number.

    Raises BadFile for another header, a row of another length, and what is no CSV in UTF-8.
    """

    def lines() -> Iterator[str]:
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise csv.Error(f"a line has {MAX_LINE:,} characters or more")
            yield line

    line = 0
    try:
        with open(path, encoding="utf-8", newline="", opener=without_waiting) as file:
            rows = csv.reader(lines(), strict=True)
            for row in rows:
                line = rows.line_num
                if line == 1 and row != list(header):
                    raise csv.Error(f"the header is not {','.join(header)}")
                if len(row) != len(header):
                    raise csv.Error(f"a row has {len(row)} fields instead of {len(header)}")
                if line > 1:
                    yield line, row
    except OSError as error:
        raise BadFile(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadFile(
            f"the file is not sound CSV: {error}",
            where=f"{path}, at line {line or 1}",
            do=f"give rows of {','.join(header)}",
        ) from error
    if not line:
        raise BadFile("the file is empty", where=str(path))


def refuse_all(what: str, violations: Sequence[str], where: Path) -> None:
    """Raise BadFile that lists the violations, if there are any."""
    if violations:
        raise BadFile(f"{what}: " + several(violations, NAMED), where=str(where))
