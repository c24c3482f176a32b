"""Mazes: written, drawn, checked, turned, made."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from cases import HERE
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import EdgertError, UsageError
from edgert.tasks import find, plain
from edgert.tasks.dihedral import COUNT, INVERSE, dihedral
from edgert.tasks.maze import FREE, GOAL, PATH, START, WALL, Maze, ways
from edgert.tasks.maze_make import make

RAW = HERE / "hrm" / "dataset_formats" / "raw" / "maze"
PUBLISHED = [
    (row["question"], row["answer"])
    for name in ("train.csv", "test.csv")
    for row in csv.DictReader((RAW / name).read_text().splitlines())
]
SMALL = Maze(5, 6)
QUESTION = "######/#S   #/### # /#G#   /#    #"
ANSWER = "######/#Soo #/###o# /#G#o  /#ooo #"

sizes = st.tuples(st.integers(3, 16), st.integers(4, 16))
seeds = st.integers(0, 2**32 - 1)


def made(size: tuple[int, int], seed: int, **options: int) -> tuple[Maze, np.ndarray, np.ndarray]:
    maze = Maze(*size)
    question, answer = make(maze, np.random.default_rng(seed), **options)
    return maze, question, answer


def test_a_task_says_its_sizes_and_is_found_by_its_name() -> None:
    maze = Maze(4, 7)
    assert (maze.seq_len, maze.vocab_size, maze.shape) == (28, 6, (4, 7))
    assert find("maze-4x7") == maze


@pytest.mark.parametrize("size", [(2, 9), (9, 2), (0, 0), (201, 30), (30, 1000), (-3, 5)])
def test_other_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="are not supported"):
        Maze(*size)


# ------------------------------------------------------------------ text


@pytest.mark.parametrize("pair", range(len(PUBLISHED)))
def test_the_published_format_is_read_and_written(pair: int) -> None:
    question, answer = PUBLISHED[pair]
    maze = Maze(30, 30)
    assert maze.text(maze.parse(question)) == question
    assert maze.text(maze.encode(answer)) == answer
    assert maze.check(maze.parse(question), maze.encode(answer)).ok


@given(sizes, seeds)
@settings(max_examples=80, deadline=None)
def test_text_is_read_back(size: tuple[int, int], seed: int) -> None:
    """In one line, in lines, with / and with full stops."""
    maze, question, answer = made(size, seed)
    text = maze.text(question)
    lines = [text[i : i + size[1]] for i in range(0, len(text), size[1])]
    for written in (text, "\n".join(lines), "/".join(lines), text.replace(" ", ".")):
        back = maze.parse(written)
        assert back.dtype == np.int32
        np.testing.assert_array_equal(back, question)
    np.testing.assert_array_equal(maze.encode(maze.text(answer)), answer)


def test_tokens_are_numbered_as_published() -> None:
    assert Maze(3, 4).encode("# SG/o###/####")[:5].tolist() == [WALL, FREE, START, GOAL, PATH]
    assert (WALL, FREE, START, GOAL, PATH) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 cells, but a maze of this size has 30"),
        ("#" * 29, "29 cells, but a maze of this size has 30"),
        ("#\n" * 6, "6 rows, but a maze of this size has 5"),
        ("######/#S   #/### #/#G#   /#    #", "row 3 has 5 cells instead of 6"),
        ("######/#S   #/###x# /#G#   /#    #", "'x' is not a cell of a maze\n  where  row 3, col"),
        (QUESTION.replace("S", " "), "the maze has no cells S, one is needed"),
        (QUESTION.replace("S", "G"), "the maze has no cells S"),
        (QUESTION.replace("S", "SG"[:2]), "row 2 has 7 cells"),
        (QUESTION.replace("#S ", "#SG"), "2 cells G(.|\n)*row 2, column 3, row 4, column 2"),
        (ANSWER, "a path drawn in already\n  where  row 2, column 3"),
        ("#" * 70_000, "70,000 characters are no puzzle"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SMALL.parse(text)


def test_a_token_that_is_no_cell_is_shown() -> None:
    assert Maze(3, 3).text(np.array([0, 1, 2, 3, 4, 5, 6, -1, 99])) == "?# SGo???"


def test_the_drawing_of_a_maze() -> None:
    """A frame, two characters a cell; wrong cells are told apart."""
    question, answer = SMALL.parse(QUESTION), SMALL.encode(ANSWER)
    assert plain(SMALL.draw(question, answer)) == [
        "┌────────────┐",
        "│████████████│",
        "│██S • •   ██│",
        "│██████• ██  │",
        "│██G ██•     │",
        "│██• • •   ██│",
        "└────────────┘",
    ]
    assert plain(SMALL.draw(question))[2] == "│██S       ██│"
    answer[0] = PATH
    row = SMALL.draw(question, answer)[1]
    assert [(segment.text, segment.kind) for segment in row] == [
        ("│", "frame"),
        ("• ", "wrong"),
        ("██████████│", "frame"),
    ]
    kinds = [segment.kind for segment in SMALL.draw(question, answer)[2]]
    assert kinds == ["frame", "given", "found", "blank", "frame"]


# ------------------------------------------------------------------ the checker


@pytest.mark.parametrize(
    ("answer", "flags", "reason"),
    [
        (ANSWER, "complete valid kept shortest", "a path of 8 steps, none is shorter"),
        (QUESTION, "complete kept", "the cells o do not lead from S to G"),
        (ANSWER.replace("oo #/###", "o  #/###"), "complete kept", "do not lead from S to G"),
        (
            ANSWER.replace("  /", " o/").replace("# /#G", "#o/#G"),
            "complete kept",
            "takes 7 of the cells o, 2 lie beside it",
        ),
        (
            ANSWER.replace("###o", "#o#o"),
            "complete valid",
            "the maze was changed: row 3, column 2 was '#' and is 'o'",
        ),
        (
            "######/#S   #/#o# # /#G#   /#    #",
            "complete",
            "row 3, column 2 was '#' and is 'o'; the cells o do not lead from S to G",
        ),
        (ANSWER.replace("S", "o"), "complete", "row 2, column 2 was 'S' and is 'o'; "),
        (ANSWER.replace("  /#ooo", " #/#ooo"), "complete valid", "was ' ' and is '#'"),
    ],
)
def test_the_checker_says_what_is_wrong(answer: str, flags: str, reason: str) -> None:
    verdict = SMALL.check(SMALL.parse(QUESTION), SMALL.encode(answer))
    found = [name for name in ("complete", "valid", "kept", "shortest") if getattr(verdict, name)]
    assert reason in verdict.reason
    assert " ".join(found) == flags
    assert verdict.ok is flags.startswith("complete valid kept")


def test_a_detour_is_right_and_said_to_be_one() -> None:
    maze = Maze(3, 4)
    question = maze.parse("S..G/.##./....")
    long, short = (maze.encode(text) for text in ("S..G/o##o/oooo", "SooG/.##./...."))
    verdict = maze.check(question, long)
    assert verdict.ok
    assert verdict.shortest is False
    assert verdict.reason == "a path of 7 steps, the shortest takes 3"
    assert maze.check(question, short).shortest is True


@pytest.mark.parametrize("token", [-1, 0, 6, 300])
def test_a_token_that_is_no_cell_is_not_an_answer(token: int) -> None:
    answer = SMALL.encode(ANSWER)
    answer[11] = token
    verdict = SMALL.check(SMALL.parse(QUESTION), answer)
    assert not verdict.complete
    assert not verdict.ok
    assert verdict.shortest is None


def test_a_maze_without_a_way_has_no_answer() -> None:
    """Whatever is marked, also in a question that is none."""
    question = np.full(9, WALL)
    assert not Maze(3, 3).check(question, np.full(9, PATH)).ok
    question[:2] = START, GOAL
    assert Maze(3, 3).check(question, question).shortest
    question[1:3] = WALL, GOAL
    verdict = Maze(3, 3).check(question, question)
    assert (verdict.valid, verdict.shortest) == (False, None)


def simple_ways(maze: np.ndarray) -> list[int]:
    """Lengths of all ways from S to G that visit no cell twice."""
    start = tuple(np.argwhere(maze == START)[0].tolist())
    lengths = []

    def go_on(cell: tuple[int, int], seen: frozenset[tuple[int, int]]) -> None:
        if maze[cell] == GOAL:
            lengths.append(len(seen))
            return
        for step in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            row, column = cell[0] + step[0], cell[1] + step[1]
            inside = 0 <= row < maze.shape[0] and 0 <= column < maze.shape[1]
            if inside and maze[row, column] != WALL and (row, column) not in seen | {cell}:
                go_on((row, column), seen | {cell})

    go_on(start, frozenset())
    return lengths


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_shortest_ways_are_counted_right(seed: int) -> None:
    """Against the list of all ways, in small mazes with open places."""
    rng = np.random.default_rng(seed)
    maze = np.where(rng.random((4, 4)) < 0.3, WALL, FREE)
    ends = rng.permutation(16)[:2]
    maze.flat[ends[0]], maze.flat[ends[1]] = START, GOAL
    lengths = simple_ways(maze)
    steps, count, _ = ways(maze, maze != WALL)
    assert steps == (min(lengths) if lengths else None)
    assert count == (lengths.count(min(lengths)) if lengths else 0)


# ------------------------------------------------------------------ making mazes


@given(sizes, seeds, st.integers(0, 12))
@settings(max_examples=80, deadline=None)
def test_a_made_maze_has_one_shortest_path(size: tuple[int, int], seed: int, loops: int) -> None:
    maze, question, answer = made(size, seed, loops=loops)
    verdict = maze.check(question, answer)
    assert verdict.ok
    assert verdict.shortest
    grid = question.reshape(size).astype(np.int64)
    steps, count, _ = ways(grid, grid != WALL)
    assert count == 1
    assert steps == int((answer == PATH).sum()) + 1


def test_mazes_without_loops_join_all_cells_in_one_way() -> None:
    """A tree: one free cell more than borders between free cells."""
    for seed in range(10):
        _, question, _ = made((13, 16), seed, loops=0)
        free = question.reshape(13, 16) != WALL
        borders = (free[1:] & free[:-1]).sum() + (free[:, 1:] & free[:, :-1]).sum()
        assert free.sum() - borders == 1
        assert free[1::2, 1::2].all()


def test_loops_are_opened() -> None:
    _, tree, _ = made((21, 21), 4, loops=0)
    _, looped, _ = made((21, 21), 4, loops=7)
    assert int((tree == WALL).sum() - (looped == WALL).sum()) == 7


def test_the_same_seed_makes_the_same_maze() -> None:
    one, two, other = (made((30, 30), seed)[1] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_a_path_is_as_long_as_asked() -> None:
    for seed in range(5):
        _, _, answer = made((30, 30), seed, least_steps=110)
        assert int((answer == PATH).sum()) + 1 >= 110
    with pytest.raises(
        EdgertError, match="no path of 100 steps in 100 mazes of 7 x 7 cells; the lo"
    ):
        made((7, 7), 0, least_steps=100)
    with pytest.raises(UsageError, match="a maze of 3 x 3 cells has no room for a path"):
        made((3, 3), 0)


# ------------------------------------------------------------------ dihedral images


@pytest.mark.parametrize(
    ("way", "image"),
    [
        (0, "123/456"),
        (1, "36/25/14"),
        (2, "654/321"),
        (3, "41/52/63"),
        (4, "321/654"),
        (5, "456/123"),
        (6, "14/25/36"),
        (7, "63/52/41"),
    ],
)
def test_the_ways_to_lay_a_grid(way: int, image: str) -> None:
    laid = dihedral(np.array([[1, 2, 3], [4, 5, 6]]), way)
    assert "/".join("".join(map(str, row)) for row in laid.tolist()) == image


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 7))
def test_every_way_is_undone_by_its_inverse(rows: int, columns: int, way: int) -> None:
    grid = np.arange(2 * rows * columns).reshape(2, rows, columns)
    for one, other in ((way, INVERSE[way]), (INVERSE[way], way)):
        np.testing.assert_array_equal(dihedral(dihedral(grid, one), other), grid)


def test_the_ways_are_a_group_of_eight() -> None:
    grid = np.arange(9).reshape(3, 3)
    images = {dihedral(grid, way).tobytes() for way in range(COUNT)}
    twice = {dihedral(dihedral(grid, a), b).tobytes() for a in range(COUNT) for b in range(COUNT)}
    assert len(images) == 8
    assert twice == images


@given(st.integers(3, 12), seeds, st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_an_image_of_an_answer_answers_the_image(side: int, seed: int, way: int) -> None:
    maze, question, answer = made((side, max(side, 4)), seed)
    pair = np.stack([question, answer]).reshape(2, *maze.shape)
    laid = dihedral(pair, way)
    turned = Maze(*laid.shape[1:])
    assert turned.check(laid[0].reshape(-1), laid[1].reshape(-1)).shortest
