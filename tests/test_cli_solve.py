"""`edgert solve` as a user meets it: puzzles in, drawings and honest verdicts out."""

from __future__ import annotations

import io
import json
import re
import signal
from pathlib import Path

import pytest

from edgert.cli.answers import checked
from edgert.solving import Solving
from edgert.tasks import find
from edgert.tasks.arc import Arc
from edgert.tasks.puzzlefile import Question, read_questions

SOLVED = "1324|4231|2413|3142"
WRONG = "1...|..3.|.4..|...2"  # the model gives it back: its blanks stay
NEVER = ".324|4231|2413|3142"  # and with a blank in front it goes on to its limit


@pytest.fixture
def solve(run, copier_bundle):
    return lambda *arguments: run("solve", copier_bundle, *arguments)


def test_an_answer_is_drawn_with_what_it_took(solve):
    found = solve(SOLVED)
    assert (found.code, found.out.splitlines()[0]) == (0, "┌─────┬─────┐")
    assert "│ 4 2 │ 3 1 │    segments  █░░░ 1 of 4 (halted)" in found.out
    assert "checked   solved: valid and complete" in found.out
    assert re.search(r"time      [\d.]+ ms\n", found.out)
    assert "onnxruntime" in found.err
    assert "full depth" not in found.out + found.err
    slow = solve(NEVER, "--full-depth")
    assert "segments  ████ 4 of 4 (limit)" in slow.out
    assert "checked   unverified: 1 cell without a digit" in slow.out
    assert re.search(r"time      [\d.]+ ms \([\d.]+ ms at full depth\)\n", slow.out)
    assert solve(SOLVED, "--quiet").err == ""


def test_only_the_checker_says_that_a_puzzle_is_solved(solve):
    """The model halts by itself on both; one of them it has not solved."""
    found = json.loads(solve(SOLVED, WRONG, "--json").out)
    good, bad = found["solutions"]
    assert (good["solved"], good["answer"]) == (True, SOLVED.replace("|", ""))
    assert (bad["solved"], bad["checked"]) == (False, "12 cells without a digit")
    assert [s["finish_reason"] for s in found["solutions"]] == ["halted"] * 2
    assert (found["task"], found["halt"], found["full_depth_seconds"]) == (
        "sudoku-4x4",
        "trained:0.0:1:4",
        None,
    )
    assert 0 < found["graph_seconds"] <= found["seconds"]


def test_policies(solve):
    for policy, steps in (("full", 4), ("fixed:2", 2), ("trained:0:3", 3), ("trained", 1)):
        found = json.loads(solve(SOLVED, "--halt", policy, "--json").out)
        assert found["solutions"][0]["steps"] == steps
    assert solve(SOLVED, "--halt", "settle:1").code == 2


def test_steps_shows_what_stands_behind_each_iteration(solve):
    shown = re.findall(r"segment (\d)\n", solve(NEVER, "--steps").out)
    assert shown == ["1", "2", "3"]  # the fourth is the answer


def test_a_deadline_gives_what_there_is(solve):
    found = solve(SOLVED, "--deadline-ms", "0")
    assert found.code == 0
    assert "0 of 4 (deadline)" in found.out
    assert "checked   unverified: no answer yet" in found.out
    assert "left off: deadline" in found.err


def test_puzzles_left_off_go_on_in_another_process(run, solve, tmp_path):
    """Two puzzles in one row: the second has not begun when the file is written."""
    file = tmp_path / "s.session"
    first = solve(NEVER, SOLVED, "--batch", "1", "--max-steps", "3", "--save", file)
    assert "3 of 4 (paused)" in first.out
    assert f"saved {file}" in first.err
    told = run("session", "info", file).out
    assert "puzzles   0 done, 1 in the loop, 1 waiting" in told
    assert "policy    trained:0.0:1:4, at most 1 in the loop; 3 iterations" in told
    assert json.loads(run("session", "info", file, "--json").out)["kind"] == "solving"
    assert "2 puzzles" in run("session", "verify", file).out
    rest = json.loads(run("solve", "--session", file, "--save", file, "--json").out)
    assert [s["steps"] for s in rest["solutions"]] == [4, 1]
    assert [s["solved"] for s in rest["solutions"]] == [False, True]
    assert (rest["iterations"], rest["notes"], rest["stopped"]) == (5, [], None)
    done = run("session", "info", file).out
    assert "puzzles   2 done, 0 in the loop, 0 waiting" in done
    again = json.loads(run("solve", "--session", file, "--json").out)
    assert [s["answer"] for s in again["solutions"]] == [s["answer"] for s in rest["solutions"]]


def test_ctrl_c_leaves_off_behind_the_iteration_and_saves(run, solve, tmp_path, monkeypatch):
    step, file = Solving.step, tmp_path / "s.session"

    def pressed(self):
        signal.raise_signal(signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Solving, "step", pressed)
        found = solve(NEVER, "--save", file)
    assert found.code == 130
    assert "1 of 4 (cancelled)" in found.out
    rest = json.loads(run("solve", "--session", file, "--json").out)
    assert (rest["iterations"], rest["solutions"][0]["steps"]) == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a puzzle, or a file of them"),
        (("1...",), "4 cells, but a 4x4 board has 16"),
        (("." * 70_000,), "70,000 characters are no puzzle"),
        (("",), "0 cells, but a 4x4 board has 16"),
        (("11..|....|....|....",), "the givens contradict each other: row 1 has 1 twice"),
        (("5...|....|....|....",), "'5' is not a cell of a 4x4 board"),
        ((SOLVED, "--puzzle-id", "1"), "puzzle numbers must be from 0 to 0"),
        ((SOLVED, "--session", "x"), "--session has its own puzzles"),
        (("--session", "x", "--batch", "2"), "--batch was chosen when the session began"),
        (("--session", "x", "--full-depth"), "--full-depth measures whole puzzles"),
    ],
)
def test_what_is_no_puzzle_is_refused(solve, arguments, message):
    found = solve(*arguments)
    assert found.code == 2
    assert message in found.err
    assert found.out == ""


def test_models_are_told_apart(run, copier_bundle, tiny_bundle, tmp_path):
    """Each verb says what to do with the other kind of bundle."""
    (tmp_path / "text.txt").write_text("some text")
    for arguments in (
        ("run", copier_bundle, "-p", "x"),
        ("run", copier_bundle, "--ids", "1,2"),
        ("chat", copier_bundle),
        ("bench", copier_bundle),
        ("eval", copier_bundle, "--data", tmp_path / "text.txt"),
    ):
        found = run(*arguments)
        assert found.code == 2
        assert "this model solves puzzles, it does not decode text" in found.err
        assert f"edgert solve {copier_bundle} PUZZLE" in found.err
    found = run("solve", tiny_bundle, SOLVED)
    assert found.code == 2
    assert "this model decodes text, it does not solve puzzles" in found.err
    assert f"edgert run {tiny_bundle} -p TEXT" in found.err


def test_a_bundle_says_what_it_solves(run, copier_bundle):
    told = run("inspect", copier_bundle).out
    assert "program   embed → (segment)×4 → head" in told
    assert "halts     when halt > 0, not before 1, at most 4 segments" in told
    assert "puzzles   sudoku-4x4, 16 cells of 6 tokens" in told
    assert "append slots" not in told
    assert "tokenizer" not in told


def test_many_puzzles_are_a_line_each(solve, tmp_path, monkeypatch):
    file = tmp_path / "puzzles.txt"
    file.write_text("\n".join([SOLVED] * 9) + "\n\n1 3 2 4\n4 2 3 1\n2 4 1 3\n3 1 4 .\n")
    lines = solve("-f", file, "--batch", "4").out.splitlines()
    plain = SOLVED.replace("|", "")
    assert lines[:9] == [f"{plain}  1 of 4 segments (halted)  solved: valid and complete"] * 9
    assert lines[9].endswith("1 of 4 segments (halted)  unverified: 1 cell without a digit")
    assert lines[10:] == ["9 of 10 solved · 1.00 segments a puzzle"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{SOLVED}\n".encode())))
    assert "solved: valid" in solve("-f", "-").out


def test_the_page_runs_as_written(copier_bundle, tmp_path, monkeypatch):
    """Block by block; they share their names."""
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parents[1] / "docs" / "solving.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names = {"BUNDLE": copier_bundle}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/solving.md, block {number}", "exec"), names)


FOUR, MAZE, ARC = find("sudoku-4x4"), find("maze-3x4"), find("arc-30x30")
BOARD = "1324\n4231\n2413\n314."


@pytest.mark.parametrize(
    ("task", "text", "count"),
    [
        (FOUR, BOARD, 1),
        (FOUR, f"{BOARD}\n\n{BOARD}\n", 2),
        (FOUR, f"{SOLVED}\r\n{WRONG}\r\n\r\n\r\n{NEVER}", 3),
        (FOUR, "┌─────┬─────┐\n│ 1 · │ · · │\n│ · · │ 3 · │\n│ · 4 │ · · │\n│ · · │ · 2 │", 1),
        (MAZE, "S  G\n    \n####", 1),
        (MAZE, "S..G....####\nS..G........", 2),
        (ARC, "123\n456", 1),
        (ARC, "12/34\n\n5", 2),
        (ARC, '{"train": [], "test": [{"input": [[1, 2]]}, {"input": [[3]], "output": [[4]]}]}', 2),
        (FOUR, "\n  \n", 0),
    ],
)
def test_a_file_is_read_as_it_is_written(task, text, count):
    found = list(read_questions(text.encode(), task, "file"))
    assert len(found) == count
    for question in found:
        assert question.tokens.shape == (task.seq_len,)


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        (FOUR, b"\xff\xfe", "not UTF-8"),
        (FOUR, b"1...\n..3.\n.4.", "11 cells, but a 4x4 board has 16"),
        (FOUR, f"{SOLVED}\n1..\n".encode(), "3 cells, but a 4x4 board has 16"),
        (FOUR, f"{WRONG},x".encode(), "'x' is not a cell"),
        (FOUR, f"{WRONG},{SOLVED},{SOLVED}".encode(), "3 fields instead of 1 or 2"),
        (FOUR, f"{SOLVED},{WRONG}".encode(), "the solution is wrong: "),
        (Arc(3), b'{"test": [{"input": [[1, 2, 3, 4]]}]}', "does not fit on a canvas of 3 x 3"),
        (ARC, b'{"test": []}', "test is not a list of 1 to 100 pairs"),
        (ARC, b'{"test": [3, {"input": [[10]]}]}', "not a whole number from 0 to 9"),
        (ARC, b'{"test": ', "not sound JSON"),
        (ARC, b"[" * 9 + b"x", "not a colour"),
    ],
)
def test_a_file_that_is_none_says_where(task, data, message):
    from edgert.errors import EdgertError

    with pytest.raises(EdgertError, match=message) as failure:
        list(read_questions(data, task, "file"))
    assert failure.value.exit_code in (2, 3)
    assert str(failure.value.where).startswith("file")


def test_the_wrong_line_is_named():
    from edgert.errors import UsageError

    for text, where in (
        (f"{SOLVED}\n\n{SOLVED}\n1...|x", "file, line 4: row 2, column 1"),
        (f"{WRONG},1324x\n{SOLVED}", "file, line 1: row 2, column 1"),
        (f"1...|x\n{SOLVED}", "file, line 1: row 2, column 1"),
        (f"{SOLVED}\n{SOLVED},{SOLVED[:-1]}", "file, line 2: row 4 has 3 cells instead of 4"),
    ):
        with pytest.raises(UsageError) as failure:
            list(read_questions(text.encode(), FOUR, "file"))
        assert failure.value.where == where


def test_where_rules_cannot_tell_the_known_answer_does():
    data = b'{"test": [{"input": [[1, 2]], "output": [[2, 1]]}, {"input": [[1, 2]]}]}'
    known, unknown = read_questions(data, ARC, "file")
    right, wrong = (ARC.parse(text) for text in ("21", "12"))
    assert str(checked(ARC, known, right)) == "solved: the known answer"
    assert str(checked(ARC, known, wrong)) == "unverified: not the known answer"
    assert not checked(ARC, unknown, right).solved
    assert not checked(None, Question("1", right), right).solved


def test_a_line_may_have_the_answer_behind_a_comma_or_a_tab():
    """A tab between cells is no such thing, nor is a comma between colours."""
    for task, asked, answer in (
        (FOUR, WRONG, "1324423124133142"),
        (MAZE, "S..G....####", "SooG    ####"),
        (ARC, "12/34", "56/78/90"),
    ):
        for between in ",\t":
            lines = f"{asked}\n{asked}{between}{answer}\n".encode()
            plain, answered = read_questions(lines, task, "file")
            assert plain.known is None
            assert (plain.text, answered.text) == (asked, asked)
            assert (plain.where, answered.where) == ("file, line 1", "file, line 2")
            assert task.text(answered.known) == answer
    for task, text in ((FOUR, "1...\t..3.\t.4..\t...2"), (ARC, "12,34"), (ARC, "[[1,2],[3,4]]")):
        (whole,) = read_questions(text.encode(), task, "file")
        assert (whole.text, whole.known) == (text, None)


def test_answers_are_compared_with_those_of_the_file(solve, tmp_path):
    """The copier answers with the question: two of the known answers it gives, one it does not."""
    other = "1324|4231|2413|314."
    file = tmp_path / "boards.txt"
    solved = SOLVED.replace("|", "")
    file.write_text(f"{SOLVED},{solved}\n{SOLVED}\t{solved}\n{other},{solved}\n{SOLVED}\n")
    found = solve("-f", file)
    assert found.code == 0
    assert "3 of 4 solved" in found.out
    assert found.out.rstrip().endswith("· 2 of 3 the known answer")
    answers = json.loads(solve("-f", file, "--json").out)["solutions"]
    assert [answer["known_answer"] for answer in answers] == [True, True, False, None]
    assert [answer["puzzle"] for answer in answers] == [SOLVED, SOLVED, other, SOLVED]
    file.write_text("\n \n")
    empty = solve("-f", file)
    assert (empty.code, "the file has no puzzles" in empty.err) == (3, True)


def test_token_ids_solve_what_nobody_names(run, rope_bundle):
    """Of a bundle that does not say what its puzzles are; and a row of its table."""
    ids = ",".join(["1"] * 25)
    found = run("solve", rope_bundle, ids, "--puzzle-id", "6")
    assert found.code == 0
    assert "unverified: the bundle does not say what its puzzles are" in found.out
    assert re.match(r"(\d,){24}\d\n", found.out)
    other = run("solve", rope_bundle, ids, "--puzzle-id", "7")
    assert "puzzle numbers must be from 0 to 6" in other.err
    for wrong, message in (
        ("1,2,x", "'x' is no token id"),
        ("1,2,3", "of shape [puzzles, 25]"),
        (",".join(["7"] * 25), "ids outside 0 to 6"),
    ):
        assert message in run("solve", rope_bundle, wrong).err
    assert "table     puzzle, rows of 40" in run("inspect", rope_bundle).out
