"""Targets of puzzles: as people write them, and as data sets keep them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mutations import bytes_like, change_bytes, change_value, json_like
from target import Target

Files = dict[str, bytes]

QUESTIONS = {
    "sudoku-4x4": ["1...|..3.|.4..|...2", "┌─┐\n│ 1 · │ · · │\n" + "....\n" * 3],
    "sudoku-6x6-boxes-3x2": ["1....." + "." * 30],
    "sudoku-6x6": ["." * 35 + "6"],
    "sudoku-8x8-boxes-4x2": ["8" + "0" * 63],
    "sudoku-8x8": ["." * 64],
    "sudoku-9x9": ["53..7....\n" + ".........\n" * 8],
    "maze-3x4": ["S..G....####", "S  G\n    \n####", "S..G/..../####"],
    "maze-5x3": ["S..##.##....##G"],
    "arc-30x30": ["12/34", "[[1, 2], [3, 4]]", "0" * 30, "1 2\n3 4"],
    "arc-3x3": ["123|456|789"],
}
"""Every kind of task that `edgert.tasks.find` knows, and questions of it."""

CELLS = "...##0123456789 So/|\n"

ARC: dict[str, Any] = {
    "train": [{"input": [[1]], "output": [[2]]}],
    "test": [{"input": [[1, 2], [3, 4]], "output": [[5]]}, {"input": [[0]]}],
}


def task(folder: Path) -> Target:
    """A puzzle in text, for every task: read, written and read again, drawn, checked."""
    from edgert.tasks import find, plain

    def read(example: tuple[str, str, list[int]]) -> None:
        name, text, answer = example
        board = find(name)
        cells = board.parse(text)
        assert (cells.dtype, cells.shape) == (np.int32, (board.seq_len,))
        assert cells.min() >= 0
        assert cells.max() < board.vocab_size
        assert np.array_equal(board.parse(board.text(cells)), cells)
        assert np.array_equal(board.encode(text), cells)
        assert len(board.text(cells)) <= board.seq_len * 2
        other = np.resize(np.array(answer or [0], np.int32), cells.shape)
        for given in (cells, other):
            board.text(given)
            plain(board.draw(cells, given))
            verdict = board.check(cells, given)
            assert verdict.reason
            assert not verdict.ok or verdict.decided

    @st.composite
    def examples(draw: Any) -> tuple[str, str, list[int]]:
        name = draw(st.sampled_from(sorted(QUESTIONS)))
        seed = draw(st.sampled_from(QUESTIONS[name]))
        way = draw(st.sampled_from(["cells", "cells", "cells", "bytes", "bytes", "text"]))
        if way == "cells":  # as long as before: most of them are puzzles
            cells = list(seed)
            for _ in range(draw(st.integers(0, 5))):
                cells[draw(st.integers(0, len(cells) - 1))] = draw(st.sampled_from(CELLS))
            text = "".join(cells)
        elif way == "bytes":
            text = draw(bytes_like([seed.encode()])).decode("utf-8", "surrogateescape")
        else:
            text = draw(st.text(max_size=40)) * draw(st.sampled_from([1, 3, 5000]))
        if draw(st.integers(0, 19)) == 0:
            name = draw(bytes_like([name.encode()])).decode("utf-8", "surrogateescape")
        answer = draw(st.lists(st.sampled_from([*range(-3, 14), 1 << 30, -(1 << 31)]), max_size=40))
        return name, text, answer

    seeds = [(name, text, [1]) for name, texts in QUESTIONS.items() for text in texts]
    return Target([s for s in seeds if "┌" not in s[1]], examples(), read)


def arc(folder: Path) -> Target:
    """ARC's JSON, as `edgert solve` reads it and as data sets are built from it."""
    from edgert.tasks import find
    from edgert.tasks.arc_files import read_task
    from edgert.tasks.puzzlefile import read_questions

    board = find("arc-30x30")
    path = folder / "0a1b2c3d.json"

    def read(data: bytes) -> None:
        for question in read_questions(data, board, "file.json"):
            assert question.tokens.shape == (900,)
            assert question.known is None or question.known.shape == (900,)
        path.write_bytes(data)
        read_task(path, held_out=True)

    whole = {"train": ARC["train"], "test": ARC["test"][:1]}
    seed = json.dumps(whole).encode()
    return Target([seed], json_like([whole, ARC]), read)


def puzzleset(folder: Path) -> Target:
    """A data set's folder: opened, then dealt as training and evaluation deal it."""
    from edgert.tasks.puzzleset import open_puzzleset
    from edgert.tasks.puzzleset_write import PuzzleRows, write_puzzleset

    root = folder / "set"
    cells = np.arange(8).reshape(2, 4) % 5
    groups = [[PuzzleRows(1, cells, cells)], [PuzzleRows(2, cells[:1], cells[:1])]]
    names = ["<blank>", "a", "b"]
    write_puzzleset(root, {"train": groups}, seq_len=4, vocab_size=5, identifiers=names)
    seed = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    values = {name: json.loads(data) for name, data in seed.items() if name.endswith(".json")}
    arrays = {
        name: np.load(io.BytesIO(data)) for name, data in seed.items() if name.endswith(".npy")
    }

    @st.composite
    def examples(draw: Any) -> Files:
        files = dict(seed)
        for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
            part = draw(st.sampled_from(["json", "header", "numbers", "array", "absent"]))
            name = draw(st.sampled_from(sorted(values if part == "json" else arrays)))
            if part == "json":
                files[name] = draw(json_like([values[name]]))
            elif part == "header":
                files[name] = change_bytes(draw, seed[name], hot=128)
            elif part == "numbers":
                changed = change_value(draw, arrays[name].tolist(), st.integers(-3, 9))
                files[name] = _npy(changed, arrays[name])
            elif part == "array":
                files[name] = _saved(_other(draw, arrays[name]))
            else:
                files.pop(name, None)
        return files

    def read(files: Files) -> None:
        for name in seed:
            path = root / name
            path.unlink(missing_ok=True)
            if name in files:
                path.write_bytes(files[name])
        found = open_puzzleset(root, "train")
        whole = found.batch(np.arange(found.examples), found.examples + 1)
        assert whole.inputs.shape == whole.labels.shape == (found.examples + 1, found.meta.seq_len)
        assert whole.identifiers.max() < found.meta.num_puzzle_identifiers
        assert sum(batch.count for batch in found.test_batches(2)) == found.examples
        for rows in found.epoch_rows(1, 0, 1, epochs=2):
            assert 0 <= rows.min() <= rows.max() < found.examples

    return Target([seed], examples(), read)


def _npy(value: Any, like: Any) -> bytes:
    try:
        return _saved(np.array(value, like.dtype))
    except (ValueError, TypeError, OverflowError):  # no array any more
        return repr(value).encode()


def _saved(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def _other(draw: Any, array: Any) -> Any:
    """Another array in its place: of another type, shape or order, or with other numbers."""
    dtype = draw(st.sampled_from(["u1", "i1", "<i4", ">i4", "<i8", "<u8", "<f4", "?", "O", "U1"]))
    changes = [
        lambda: array.astype(dtype),
        lambda: array[:-1],
        lambda: array[..., :-1],
        lambda: array[None],
        lambda: array[:0],
        lambda: np.array(7),
        lambda: np.asfortranarray(array),
        lambda: np.repeat(array, draw(st.sampled_from([2, 1000])), 0),
        lambda: array[::-1],
        lambda: array.astype(np.int64) + draw(st.sampled_from([1, -1, 1 << 40, -(1 << 62)])),
        lambda: np.zeros((1,) * draw(st.integers(1, 12)), dtype),
    ]
    return draw(st.sampled_from(changes))()
