"""The gate of models that solve: sound graphs pass however rounding grows, broken ones do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import cases
from small_solver import CONFIG, random_network, small_bundle

from edgert.bundle import Bundle
from edgert.errors import GateFailed
from edgert.export.check import check_bundle
from edgert.export.check_solving import Slots, _Gate
from edgert.export.comparison import Check, Comparison
from edgert.export.rounding import GROWTH, SPREAD, USEFUL, Rounding, own_rounding
from edgert.export.write import ExportOptions, export_bundle
from edgert.models.families import program as program_of
from edgert.models.hrm.graphs import Embedding, Turning
from edgert.models.hrm.model import HRM
from edgert.models.importers import load_source
from edgert.models.importers.common import Imported
from edgert.models.program import Turn

CASES = {case.name: case for case in cases("hrm")}
DEPTH = 12


def unsettled() -> HRM:
    """Random weights in which rounding grows a few times with each segment."""
    config = replace(CONFIG, num_heads=2, halt_max_steps=DEPTH)
    drawn = torch.Generator().manual_seed(1)
    network = HRM(config).initialize(drawn).eval().requires_grad_(False)
    network.puzzle_table.normal_(0.0, 1.0, generator=drawn)
    return network


def exported(network: HRM, out: Path, **options):
    source = Imported(network, "random", None, None, None, (), {}, {}, ())
    return export_bundle(source, out, ExportOptions(**options))


# ------------------------------------------------- sound graphs


def test_a_model_in_which_rounding_grows_passes(tmp_path):
    """It fails by the floor alone, which would hold for a model that settles."""
    found = exported(unsettled(), tmp_path / "b", lowerings=("ort",))
    said = json.loads((tmp_path / "b" / "parity.json").read_text())
    segments, free = said["checks"]
    assert (segments["free_running"], segments["states_max_abs"] > 0) == (None, True)
    told = free["free_running"]
    own = [at["logits"] for at in told["by_iteration"]]
    assert len(own) == DEPTH
    assert own == sorted(own)
    assert own[-1] > USEFUL  # by then nothing could be told apart, and the verdict says so
    assert 4 <= told["iterations_compared"] < DEPTH
    assert free["top1_total"] == 2 * 16 * told["iterations_compared"]
    assert "8 x own_rounding" in told["limit"]
    floor = 1 + GROWTH * (told["iterations_compared"] - 1)
    assert SPREAD * own[told["iterations_compared"] - 1] > floor * said["tolerance"]["fp32"]
    assert free["states_max_abs"] is None
    assert all(check.worst_share < 1 for check in found.verdict.checks)


@pytest.mark.parametrize("name", ["learned", "bidir_base"])
def test_a_model_that_settles_has_the_floor(name):
    """Trained or not: float32 is so near float64 at every iteration that all are compared."""
    case = CASES["orig_learned_nopuzzle" if name == "learned" else name]
    if name == "learned":
        source = load_source(case.folder)
    else:
        settings = {"seq_len": case["input_ids"].shape[1]}
        source = load_source(case.checkpoint, settings=settings)
    program = program_of(source.model)
    before = {name: t.clone() for name, t in source.model.state_dict().items()}
    ids = torch.randint(program.vocab_size, (2, program.context)).int()
    truth = list(program.turns({"ids": ids}))
    rounding = own_rounding(program, {"ids": ids}, truth)
    assert rounding.compared == len(truth) - 1 > 2
    for done in range(rounding.compared):
        assert set(rounding.slack(done, 3e-5).values()) == {1 + GROWTH * done}
    assert 0 < rounding.shares[-1]["logits"] < 1e-4
    # The model is as it was.
    for name, tensor in source.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_limits_have_an_end():
    """Where rounding reaches the size of the answer at once, two iterations have a limit of 1 %."""
    rounding = Rounding(({"a": 1e-7, "b": 1e-6}, {"a": 0.5, "b": 1e-5}, {"a": 0.5, "b": 1e-5}))
    assert rounding.compared == 2
    assert rounding.slack(0, 1e-5) == {"a": 1.0, "b": 1.0}
    assert rounding.slack(1, 1e-5) == {"a": USEFUL / 1e-5, "b": max(5.0, SPREAD)}
    assert rounding.slack(1, 1e-5, 0.0)["b"] == SPREAD
    assert Rounding(({"a": 0.5},)).compared == 1
    assert Rounding(({"a": 1e-7},) * 9).compared == 9


def test_one_graph_for_iterations_that_nothing_can_prove_is_refused():
    """All that the unrolled form gives is what is behind the last of them."""
    grown = Rounding(({"logits": 1e-7},) * 3 + ({"logits": 0.02},))
    turn = Turn({}, {}, {"logits": torch.zeros(2, 4, 3)})
    gate = _Gate(None, {}, [turn] * 5, grown)  # it is refused before anything is run
    with pytest.raises(GateFailed, match="nothing shows that 4 iterations in one") as failure:
        gate._whole(Comparison(Check("fp32-ort-unrolled", "whole"), 3e-5))
    assert "behind 3 of them, rounding alone moves" in failure.value.what
    assert "without the unrolled form" in (failure.value.do or "")


# ------------------------------------------------- broken graphs

Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def swapped_start(patch: pytest.MonkeyPatch) -> None:
    """The prologue hands out the initial states the wrong way round."""
    sound = Embedding.forward

    def forward(self, ids, *puzzle):
        e, z_h, z_l = sound(self, ids, *puzzle)
        return e, z_l, z_h

    patch.setattr(Embedding, "forward", forward)


def changed_turn(change: Callable[[Step, Step], Step]) -> Callable[[pytest.MonkeyPatch], None]:
    """What one segment is given (e, z_h, z_l) and what it returns, to something else."""

    def breakage(patch: pytest.MonkeyPatch) -> None:
        sound = Turning.forward
        patch.setattr(
            Turning,
            "forward",
            lambda self, *given: change(given, sound(self, *given)),
        )

    return breakage


def old_state(given: Step, found: Step) -> Step:
    """The low state is fed back as it came in."""
    return found[0], given[2] + 0, found[2]


def moved_signal(given: Step, found: Step) -> Step:
    return found[0], found[1], found[2] + 0.01


def coarse_state(given: Step, found: Step) -> Step:
    """The low state is fed back with 14 bits behind the point: less than a segment's tolerance."""
    return found[0], (found[1] * 2**14).round() / 2**14, found[2]


def wrong_alone(given: Step, found: Step) -> Step:
    """A row that has nothing beside it gets another state."""
    return found[0] * (1 + 0.01 * (1 // found[0].shape[0])), found[1], found[2]


BREAKAGES = [
    (swapped_start, "state 'z_h' differs", "check 'segments', before the first iteration"),
    (changed_turn(old_state), "state 'z_l' differs", "check 'segments', iteration 0"),
    (changed_turn(moved_signal), "signal 'halt' differs", "check 'segments', iteration 0"),
    (changed_turn(coarse_state), "result '.*' differs", "check 'free', iteration"),
    (changed_turn(wrong_alone), "result '.*' differs", "check 'free', row 0 alone, iteration 0"),
]
NAMES = ["swapped_start", "old_state", "moved_signal", "coarse_state", "wrong_alone"]


@pytest.mark.parametrize(("breakage", "what", "where"), BREAKAGES, ids=NAMES)
def test_a_broken_graph_is_found(breakage, what, where, tmp_path, monkeypatch):
    """Also in a model whose limits grow; the last two only by running freely."""
    breakage(monkeypatch)
    with pytest.raises(GateFailed, match=what) as failure:
        exported(unsettled(), tmp_path / "b", lowerings=("ort",))
    assert where in failure.value.where
    assert not (tmp_path / "b").exists()


@pytest.fixture(scope="module")
def settled(tmp_path_factory) -> tuple[Path, HRM]:
    network = random_network()
    return small_bundle(network, tmp_path_factory.mktemp("gate") / "b"), network


def fed_back_wrongly(patch: pytest.MonkeyPatch) -> None:
    """From the second iteration on, the runtime hands the low state of the first row to all.
    A carry that is put in from outside hides that."""
    sound = Slots.advance

    def advance(self) -> None:
        low = self.at("value.z_l", self._turn).host
        if getattr(self, "ran", False) and not getattr(self, "adopted", False):
            low[:] = low[0]
        self.ran, self.adopted = True, False
        sound(self)

    adopt = Slots.adopt

    def adopted(self, row, values, steps) -> None:
        self.adopted = True
        adopt(self, row, values, steps)

    patch.setattr(Slots, "advance", advance)
    patch.setattr(Slots, "adopt", adopted)


def test_a_carry_fed_back_wrongly_shows_when_it_runs_freely(settled, monkeypatch):
    path, network = settled
    check_bundle(path, program_of(network))
    fed_back_wrongly(monkeypatch)
    with pytest.raises(GateFailed, match="result 'logits' differs") as failure:
        check_bundle(path, program_of(network))
    assert "check 'free', iteration 1" in failure.value.where


def test_a_count_that_stands_still_shows_when_it_runs_freely(tmp_path, monkeypatch):
    """A cycle that depends on how many there were; from a carry, the count is put in with it."""
    case = CASES["bidir_cycle"]
    source = load_source(case.checkpoint, settings={"seq_len": case["input_ids"].shape[1]})
    export_bundle(source, tmp_path / "b", ExportOptions(lowerings=("ort",)))
    assert Bundle.open(tmp_path / "b").manifest.variants
    sound = Slots.advance

    def advance(self) -> None:
        sound(self)
        self.steps -= 1

    monkeypatch.setattr(Slots, "advance", advance)
    with pytest.raises(GateFailed, match="result 'logits' differs") as failure:
        check_bundle(tmp_path / "b", program_of(source.model))
    assert "check 'free', iteration 1" in failure.value.where
