"""Mazes made: corridors one cell wide with one shortest way from S to G."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgert.errors import EdgertError, UsageError
from edgert.tasks.maze import FREE, GOAL, PATH, START, WALL, Maze, ways
from edgert.tasks.puzzle import Tokens

TRIES = 100

Grid = NDArray[np.int64]


def make(
    maze: Maze, rng: np.random.Generator, *, loops: int | None = None, least_steps: int = 1
) -> tuple[Tokens, Tokens]:
    """A question and its answer, the one shortest path marked.

    loops        walls that are opened beyond what joins all corridors, as far as the shortest path
                 stays the only one and long enough; by default one for 16 crossings
    least_steps  of the path from S to G
    Corridors meet at odd rows and columns; where a side is even, the last of them lies at the edge.
    Raises UsageError if the maze is too small for a path, EdgertError if none is as long as asked.
    """
    crossings = (maze.rows // 2) * (maze.columns // 2)
    if crossings < 2:
        raise UsageError(
            f"a maze of {maze.rows} x {maze.columns} cells has no room for a path",
            do="choose a size of at least 3 x 4",
        )
    if loops is None:
        loops = crossings // 16
    longest = 0
    for _ in range(TRIES):
        grid = _corridors(maze, rng)
        steps = _place_ends(grid, rng, least_steps)
        longest = max(longest, steps)
        if steps >= least_steps:
            _open_walls(grid, rng, loops, least_steps)
            return grid.reshape(-1).astype(np.int32), _marked(grid).reshape(-1).astype(np.int32)
    raise EdgertError(
        f"no path of {least_steps} steps in {TRIES} mazes of {maze.rows} x {maze.columns} cells; "
        f"the longest has {longest}",
        do="ask for a shorter path or a larger maze",
    )


def _corridors(maze: Maze, rng: np.random.Generator) -> Grid:
    """All crossings joined without a loop: a walk that goes on at random and back when stuck."""
    grid = np.full(maze.shape, WALL)
    at = (1 + 2 * int(rng.integers(maze.rows // 2)), 1 + 2 * int(rng.integers(maze.columns // 2)))
    grid[at] = FREE
    trail = [at]
    while trail:
        row, column = trail[-1]
        following = [
            (i, j)
            for i, j in ((row - 2, column), (row, column - 2), (row, column + 2), (row + 2, column))
            if 0 < i < maze.rows and 0 < j < maze.columns and grid[i, j] == WALL
        ]
        if not following:
            trail.pop()
            continue
        i, j = following[int(rng.integers(len(following)))]
        grid[(row + i) // 2, (column + j) // 2] = grid[i, j] = FREE
        trail.append((i, j))
    return grid


def _place_ends(grid: Grid, rng: np.random.Generator, least: int) -> int:
    """Put S and G on crossings, G at least so many steps away where it can be; the steps."""
    crossings = [(i, j) for i, j in np.argwhere(grid == FREE).tolist() if i % 2 and j % 2]
    start = crossings[int(rng.integers(len(crossings)))]
    grid[start] = START
    steps = np.array(ways(grid, grid != WALL)[2]).reshape(grid.shape)
    most = max(int(steps[cell]) for cell in crossings)
    far = [cell for cell in crossings if steps[cell] >= max(1, min(least, most))]
    goal = far[int(rng.integers(len(far)))]
    grid[goal] = GOAL
    return int(steps[goal])


def _open_walls(grid: Grid, rng: np.random.Generator, loops: int, least: int) -> None:
    rows, columns = grid.shape
    between = [
        (i, j)
        for i, j in np.argwhere(grid == WALL).tolist()
        if i % 2 != j % 2 and 0 < i < rows - (i % 2 == 0) and 0 < j < columns - (j % 2 == 0)
    ]
    for k in rng.permutation(len(between)).tolist():
        if loops == 0:
            return
        grid[between[k]] = FREE
        steps, count, _ = ways(grid, grid != WALL)
        if count == 1 and steps is not None and steps >= least:
            loops -= 1
        else:
            grid[between[k]] = WALL


def _marked(grid: Grid) -> Grid:
    """The maze with its shortest path: from G back over cells that are one step nearer to S."""
    steps = np.array(ways(grid, grid != WALL)[2]).reshape(grid.shape)
    answer = grid.copy()
    row, column = (int(k) for k in np.argwhere(grid == GOAL)[0])
    for nearer in range(int(steps[row, column]) - 1, 0, -1):
        row, column = next(
            (i, j)
            for i, j in ((row - 1, column), (row, column - 1), (row, column + 1), (row + 1, column))
            if 0 <= i < grid.shape[0] and 0 <= j < grid.shape[1] and steps[i, j] == nearer
        )
        answer[row, column] = PATH
    return answer
