"""How early puzzles may end: what is measured, judged, recommended, stored, drawn."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_solver import DEPTH, MADE, random_network, small_bundle

import edgert
import edgert.halting_puzzles as halting
from edgert.bundle import Bundle
from edgert.errors import BadBundle, BadFile, UsageError
from edgert.halting import REPORT
from edgert.halting_data import Puzzles, read_puzzles
from edgert.halting_picture import best_of, picture
from edgert.halting_puzzles import PuzzlePoint, sweep
from edgert.halting_report import QUANTILES, store, to_json
from edgert.tasks.puzzleset import IGNORED
from edgert.tasks.puzzleset_write import PuzzleRows, write_puzzleset
from edgert.tasks.sudoku import FOUR, Sudoku

ASKED = np.stack([question for question, _ in MADE])
NUMBERS = np.arange(6)
NETWORK = random_network()


def eager(**options):
    """What the eager model says: answers [n, S], steps [n], and how much halting leads [n]."""
    rows = NETWORK.puzzle_rows(torch.from_numpy(NUMBERS))
    found = NETWORK.solve(torch.from_numpy(ASKED), rows, **options)
    return (
        found.logits.argmax(-1).int().numpy(),
        found.steps.numpy(),
        (found.q[:, 0] - found.q[:, 1]).numpy(),
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return small_bundle(NETWORK, tmp_path_factory.mktemp("solver") / "bundle")


@pytest.fixture(scope="module")
def model(bundle):
    with edgert.load(bundle) as loaded:
        yield loaded


def known(times: int = 2, **changes) -> Puzzles:
    """Puzzles whose solutions are said to be what the eager model says when it halts."""
    labels = np.tile(eager(early_exit=True)[0], (times, 1))
    asked, numbers = np.tile(ASKED, (times, 1)), np.tile(NUMBERS, times)
    made = Puzzles(asked, numbers, labels, np.ones(len(labels), np.bool_), None)
    return replace(made, **changes)


def at_depth(n: int) -> float:
    """The share of them that are answered like that behind n segments."""
    return float((eager(max_steps=n)[0] == eager(early_exit=True)[0]).all(-1).mean())


def test_the_network_halts_here_and_there():
    """Or the tests below would show little."""
    steps = eager(early_exit=True)[1]
    assert len(set(steps.tolist())) >= 3
    assert at_depth(DEPTH) < 1.0


@pytest.mark.parametrize("batch", [1, 4])
def test_every_policy_is_measured_on_the_same_puzzles(model, batch, monkeypatch):
    """Accuracy and segments are the eager model's, at each depth and by its own rule."""
    monkeypatch.setattr(halting, "PART", 4 // batch)
    report = sweep(model, known(), thresholds=[0.0, 1e30], batch=batch, rounds=2)
    names = ["full", *(f"fixed:{n}" for n in range(DEPTH - 1, 0, -1))]
    assert [p.policy for p in report.points] == [*names, "trained", "trained:0.0", "trained:1e+30"]
    for n, point in zip(range(DEPTH, 0, -1), report.points, strict=False):
        assert (point.iterations_mean, point.iterations_p95, point.halted) == (n, n, 0.0)
        assert point.exact == pytest.approx(at_depth(n))
    rule, same, never = report.points[DEPTH:]
    steps, halted = eager(early_exit=True)[1:]
    assert rule.iterations_mean == same.iterations_mean == pytest.approx(steps.mean())
    assert rule.iterations_p95 == np.percentile(np.tile(steps, 2), 95)
    assert (rule.exact, rule.halted) == (1.0, pytest.approx((halted > 0).mean()))
    assert (never.iterations_mean, never.halted) == (DEPTH, 0.0)
    assert never.exact == report.full.exact < 1.0
    assert (report.iterations, report.puzzles, report.rounds, report.batch) == (DEPTH, 12, 2, batch)
    assert [n for n, _ in report.line.points] == list(range(1, DEPTH + 1))
    assert report.full.speedup == 1.0
    assert 0.0 < report.host_share < 1.0
    assert report.judged_by == "solutions"


def test_thresholds_come_from_the_signals_at_full_depth(model):
    """Those of segments 1 to T - 1, one puzzle behind another; all of them make a difference."""
    report = sweep(model, known(), rounds=1)
    lead = np.stack([eager(max_steps=n)[2] for n in range(1, DEPTH)])
    thresholds = [float(p.policy.split(":")[1]) for p in report.points[DEPTH + 1 :]]
    assert thresholds == sorted(set(thresholds))
    assert len(thresholds) > 4
    wanted = np.quantile(np.tile(lead, 2), QUANTILES)
    np.testing.assert_allclose(thresholds, np.unique(wanted), rtol=0.01)
    means = [p.iterations_mean for p in report.points[DEPTH + 1 :]]
    assert means == sorted(means)


def point(policy: str, exact: float, mean: float, ms: float = 1.0) -> PuzzlePoint:
    return PuzzlePoint(policy, mean, mean, ms, ms, 1.0, 1.0, 1.0, exact=exact, halted=0.0)


@pytest.mark.parametrize(("loss", "wanted"), [(0.0, 1.0), (100.0, 0.0)])
def test_the_shortest_policy_that_is_as_good_is_recommended(model, loss, wanted):
    """Without a loss the trained rule (all right, which full depth is not); with any, one."""
    report = sweep(model, known(), loss=loss, thresholds=[], rounds=1)
    (chosen,) = [p for p in report.points if p.policy == report.recommended]
    good = [p for p in report.points if p.exact >= report.full.exact - loss / 100]
    assert chosen.iterations_mean == min(p.iterations_mean for p in good)
    assert chosen.exact >= wanted * report.full.exact
    if loss == 100.0:
        assert chosen.policy == "fixed:1"


def test_what_cannot_be_is_refused(model):
    for options, message in (
        ({"loss": -1.0}, "loss of -1"),
        ({"loss": 101.0}, "loss of 101"),
        ({"batch": 0}, "batch = 0"),
        ({"rounds": 0}, "rounds = 0"),
        ({"thresholds": [float("nan")]}, "trained:nan"),
    ):
        with pytest.raises(UsageError, match=message):
            sweep(model, known(), **options)


def lines(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_file_of_puzzles_with_and_without_solutions(model, tmp_path):
    """The checker judges where no solution is given, and says the same as the solution."""
    asked = [FOUR.text(question) for question, _ in MADE]
    solved = [FOUR.text(answer) for _, answer in MADE]
    rows = [*asked[:2], "", *(f"{a},{s}" for a, s in zip(asked[2:4], solved[2:4], strict=True))]
    rows += [f"{a}\t{s}" for a, s in zip(asked[4:], solved[4:], strict=True)]
    found = read_puzzles(model, lines(tmp_path / "boards", *rows), 100)
    assert found.known.tolist() == [False] * 2 + [True] * 4
    assert found.judged_by == "solutions and rules"
    np.testing.assert_array_equal(found.ids, [question for question, _ in MADE])
    assert (found.labels[:2] == IGNORED).all()
    np.testing.assert_array_equal(found.labels[2:], [answer for _, answer in MADE[2:]])

    def said(answers) -> list[bool]:
        made = [edgert.solving.Solution(a, 1, "limit", 0.0) for a in answers]
        return found.right(made).tolist()

    assert said([answer for _, answer in MADE]) == [True] * 6
    assert said([question for question, _ in MADE]) == [False] * 6
    assert said([None] * 6) == [False] * 6
    assert len(read_puzzles(model, tmp_path / "boards", 3)) == 3


def test_a_data_set_is_spread_evenly_over_its_test_split(model, tmp_path):
    rows = [PuzzleRows(i, MADE[i][0][None], MADE[i][1][None]) for i in range(6)]
    names = ["<blank>", *"abcde"]
    write_puzzleset(
        tmp_path / "set",
        {"train": [[rows[0]]], "test": [[row] for row in rows]},
        seq_len=FOUR.seq_len,
        vocab_size=6,
        identifiers=names,
    )
    found = read_puzzles(model, tmp_path / "set", 3)
    assert found.number.tolist() == [0, 2, 5]
    np.testing.assert_array_equal(found.ids, [MADE[i][0] for i in (0, 2, 5)])
    assert found.right([edgert.solving.Solution(MADE[i][1], 1, "x", 0.0) for i in (0, 2, 5)]).all()
    assert len(read_puzzles(model, tmp_path / "set", 100)) == 6
    write_puzzleset(
        tmp_path / "other",
        {"train": [[PuzzleRows(0, np.ones((1, 25), int), np.ones((1, 25), int))]]},
        seq_len=25,
        vocab_size=6,
    )
    with pytest.raises(UsageError, match="25 cells of 6 values, the model 16"):
        read_puzzles(model, tmp_path / "other", 3)


def test_what_is_no_set_of_puzzles_is_refused(model, tmp_path):
    question, answer = (FOUR.text(tokens) for tokens in MADE[0])
    for rows, message in (
        ([question, question[:-1]], "line 2"),
        ([f"{question},{question}"], "the solution is wrong"),
        ([f"{question},{answer},{answer}"], "3 fields"),
        ([f"{question},x{answer[1:]}"], "line 1: row 1, column 1"),
        (["", "  "], "no puzzles"),
    ):
        with pytest.raises(UsageError) as error:
            read_puzzles(model, lines(tmp_path / "wrong", *rows), 10)
        assert message in str(error.value)
    (tmp_path / "wrong").write_bytes(b"\xff\xfe")
    with pytest.raises(BadFile, match="not UTF-8"):
        read_puzzles(model, tmp_path / "wrong", 10)
    with pytest.raises(BadFile, match="cannot be read"):
        read_puzzles(model, tmp_path / "none", 10)


def test_where_rules_do_not_decide_solutions_are_needed(model, tmp_path, monkeypatch):
    undecided = replace(FOUR.check(*MADE[0]), decided=False)
    monkeypatch.setattr(Sudoku, "check", lambda *_: undecided)
    question, answer = (FOUR.text(tokens) for tokens in MADE[0])
    with pytest.raises(UsageError, match="only a solution tells"):
        read_puzzles(model, lines(tmp_path / "boards", question), 10)
    assert read_puzzles(model, lines(tmp_path / "boards", f"{question},{answer}"), 10).known.all()


def test_the_picture_shows_every_policy_and_the_best_of_them(model):
    points = [point("full", 0.9, 5, 5.0), point("fixed:1", 0.5, 1, 1.0)]
    points += [point("fixed:3", 0.4, 3, 3.0), point("trained", 0.9, 2, 2.0)]
    assert [p.policy for p in best_of(points)] == ["fixed:1", "trained"]
    report = replace(sweep(model, known(1), thresholds=[], rounds=1), points=tuple(points))
    root = ElementTree.fromstring(picture(replace(report, recommended="trained")))
    space = "{http://www.w3.org/2000/svg}"
    dots = root.findall(f"{space}circle")
    assert [d.find(f"{space}title").text.split(":")[0] for d in dots] == [
        *("full", "fixed", "fixed", "trained")
    ]
    assert [d.get("class") for d in dots] == ["dot", "dot", "dot", "chosen"]
    across = [float(d.get("cx")) for d in dots]
    assert across[1] < across[3] < across[2] < across[0]
    assert float(dots[0].get("cy")) == float(dots[3].get("cy")) < float(dots[1].get("cy"))
    assert len(root.find(f"{space}polyline").get("points").split()) == 2


def test_the_verb_stores_draws_and_prints(run, bundle, tmp_path):
    """And `auto` is what it recommends, from then on."""
    rows = [f"{FOUR.text(question)},{FOUR.text(answer)}" for question, answer in MADE]
    data = lines(tmp_path / "boards", *rows)
    with edgert.load(bundle) as model, pytest.raises(UsageError, match="no halting report"):
        model.solving(known(1).ids, halt="auto")
    dry = run("halt", bundle, "--data", data, "--dry-run", "--json", "--rounds", 1)
    assert dry.code == 0, dry.err
    found = json.loads(dry.out)
    assert found["puzzles"] == 6
    assert found["points"][0]["policy"] == "full"
    assert REPORT not in Bundle.open(bundle).manifest.reports
    assert not list(bundle.parent.glob("*.svg"))

    got = run("halt", bundle, "--data", data, "--rounds", 1, "--threshold", 0.5, "--batch", 2)
    assert got.code == 0, got.err
    table = got.out.splitlines()
    assert table[0].split() == [
        *("policy", "exact", "%", "segments", "mean", "/", "p95", "ms", "/", "puzzle", "vs"),
        *("full", "of", "possible"),
    ]
    assert [row.split()[0] for row in table[1 : DEPTH + 3]] == [
        *("full", "fixed:4", "fixed:3", "fixed:2", "fixed:1", "trained", "trained:0.5")
    ]
    assert sum("<- recommended" in row for row in table) == 1
    assert "a puzzle takes" in got.out
    assert "outside the graphs" in got.out
    assert got.err.endswith("bundle.halting.svg   stored in the bundle: halting.json\n")
    drawn = bundle.parent / "bundle.halting.svg"
    assert ElementTree.parse(drawn).getroot().tag.endswith("svg")
    stored = json.loads((bundle / REPORT).read_text())
    Bundle.open(bundle, verify=True)
    with edgert.load(bundle) as model:
        exit = model.solving(known(1).ids, halt="auto").exit
        assert exit == model.runner.exit(stored["recommended"])

    other = tmp_path / "own.svg"
    assert run("halt", bundle, "--data", data, "--dry-run", "-o", other, "--rounds", 1).code == 0
    assert other.exists()
    got = run("halt", bundle, "--data", data, "-o", tmp_path / "none" / "a.svg")
    assert got.code == UsageError.exit_code
    assert "no folder for the picture" in got.err
    got = run("halt", bundle, "--data", data, "--window", 8)
    assert got.code == UsageError.exit_code
    assert "--window is for a model that decodes" in got.err


@pytest.mark.parametrize("wrong", [None, 3, [], "settle:0.1", "auto", "fixed:0"])
def test_a_report_that_recommends_nonsense_is_refused(bundle, model, wrong):
    content = to_json(sweep(model, known(1), thresholds=[], rounds=1), model)
    store(Bundle.open(bundle), content | {"recommended": wrong})
    with edgert.load(bundle) as loaded, pytest.raises(BadBundle, match="recommends no policy"):
        loaded.solving(known(1).ids, halt="auto")


def test_a_model_that_solves_nothing_is_refused(model_a_bundle):
    with edgert.load(model_a_bundle) as decoder, pytest.raises(UsageError, match="solve puzzles"):
        halting.sweep(decoder, known())
