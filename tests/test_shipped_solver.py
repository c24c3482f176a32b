"""The bundle that comes with the project: sound, small, and as good as its recipe says."""

from __future__ import annotations

import numpy as np
import pytest
from wheels import ROOT

import edgert
from edgert.bundle import Bundle
from edgert.tasks.sudoku import FOUR
from edgert.tasks.sudoku_make import make_set

BUNDLE = ROOT / "examples" / "hrm-sudoku4"
PUZZLES = 400


def test_it_is_whole_and_small() -> None:
    """Each file has its hash, and nothing else is in it; under 3 MB."""
    bundle = Bundle.open(BUNDLE)
    files = {str(p.relative_to(BUNDLE)) for p in BUNDLE.rglob("*") if p.is_file()}
    assert files == {*bundle.manifest.files, "manifest.json"}
    assert sum((BUNDLE / name).stat().st_size for name in files) < 3e6


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_it_solves_and_stops_early(lowering) -> None:
    """Puzzles of other seeds than it was trained on, most of the same classes: at least 97 % at
    full depth and where it stops by itself, which is before half of the segments."""
    made = make_set(FOUR, PUZZLES, 7)
    with edgert.load(BUNDLE, lowering=lowering) as model:
        solved = {}
        for halt in ("full", None):
            answers = model.solve(made.questions, halt=halt)
            right = [
                np.array_equal(a.values, w) for a, w in zip(answers, made.answers, strict=True)
            ]
            solved[halt] = np.mean(right), np.mean([a.steps for a in answers])
        loop = model.manifest.program.loop
    assert loop is not None
    most = loop.iterations
    assert solved["full"] == (pytest.approx(1.0, abs=0.03), most)
    assert solved[None][0] >= 0.97
    assert solved[None][1] <= most / 2


def test_the_command_draws_the_answer(run) -> None:
    result = run("solve", str(BUNDLE), "1...|..3.|.4..|...2")
    assert result.code == 0
    for line in ("│ 1 3 │ 2 4 │", "│ 3 1 │ 4 2 │", "solved: valid and complete"):
        assert line in result.out
