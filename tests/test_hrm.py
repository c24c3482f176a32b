"""HRM in eager torch equals the published implementations, state by state, in every variant."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import Case, assert_close, cases
from torch import Tensor

from edgert.models.hrm.bidir import Bidir, Cycle
from edgert.models.hrm.config import BidirConfig, HRMConfig
from edgert.models.hrm.model import HRM, truncated_normal
from edgert.models.hrm.step import Step
from edgert.models.importers.hrm import read_hrm
from edgert.train.act import Carry, Grids, evaluate, first_carry, losses, metrics
from edgert.train.act import softmax_cross_entropy as softmax_loss
from edgert.train.act import stablemax_cross_entropy as stablemax_loss

ORIGINAL = cases("hrm", lambda case: "halt_max_steps" in case.meta.get("config", {}))
BIDIR = cases("hrm", lambda case: "max_cycles" in case.meta.get("config", {}))
ROUNDING = 1e-5  # between batch sizes, which change the order of sums in a product of matrices

original_cases = pytest.mark.parametrize("case", ORIGINAL, ids=lambda case: case.name)
bidir_cases = pytest.mark.parametrize("case", BIDIR, ids=lambda case: case.name)


class Found(NamedTuple):
    """A computed array and how far from the case's it may be; 0 is exact."""

    value: Any
    atol: float


@cache
def read(path: Path, seq_len: int | None) -> HRM | Bidir:
    settings = {} if seq_len is None else {"seq_len": seq_len}
    return read_hrm(path, settings=settings).model


def original(case: Case) -> HRM:
    """The model; with rotary positions no file of the case tells S."""
    model = read(case.checkpoint, case.meta["config"]["seq_len"])
    assert isinstance(model, HRM)
    return model


def bidirectional(case: Case) -> Bidir:
    model = read(case.checkpoint, None)
    assert isinstance(model, Bidir)
    return model


def grids(case: Case, prefix: str = "") -> Grids:
    names = ("inputs", "labels", "puzzle_identifiers")
    return Grids(*(torch.from_numpy(case[f"{prefix}{name}"]) for name in names))


class Recording(Step):
    """Keeps what is added to the residual stream and what the norms make of it."""

    deltas: list[Tensor]
    outputs: list[Tensor]

    def add_norm(self, x: Tensor, delta: Tensor, eps: float) -> Tensor:
        self.deltas.append(delta)
        self.outputs.append(super().add_norm(x, delta, eps))
        return self.outputs[-1]

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        self.outputs.append(super().layer_norm(x, weight, bias, eps))
        return self.outputs[-1]


def recording(*args: Any) -> Recording:
    step = Recording(*args)
    step.deltas, step.outputs = [], []
    return step


@torch.no_grad()
def first_segment(case: Case, tight: float) -> dict[str, Found]:
    """The embedding, the tables, each sub-module's first call and each update of segment 0."""
    model = original(case)
    c, grid = model.config, grids(case)
    e = model.embed(grid.inputs, model.puzzle_rows(grid.identifiers))
    found = {"input_embeddings": Found(e, tight)}
    if c.pos_encodings == "rope":
        assert model.cos is not None
        assert model.sin is not None
        found["rope_cos"] = Found(torch.cat((model.cos, model.cos), -1), tight)
        found["rope_sin"] = Found(torch.cat((model.sin, model.sin), -1), tight)
    z_h, z_l = model.initial(len(grid.inputs))
    updates = []
    for number, level in enumerate(c.updates):
        step = recording(c.num_heads, model.cos, model.sin)
        z_h, z_l = model.refine(step, z_h, z_l, e, level)
        updates.append(z_l if level == "L" else z_h)
        if number == c.updates.index(level):
            for block in range(len(step.deltas) // 2):
                name = f"seg0_first.{level}_level.{block}"
                found[f"{name}.attn"] = Found(step.deltas[2 * block], tight)
                found[f"{name}.mlp"] = Found(step.deltas[2 * block + 1], tight)
                found[f"{name}.out"] = Found(step.outputs[2 * block + 1], tight)
    found["seg0_updates"] = Found(torch.stack(updates), tight)
    return found


def stored(case: Case, done: int, halted: Any) -> Carry:
    """The carry behind `done` segments as the case has it."""
    z_h, z_l = (torch.from_numpy(case[name][done - 1]) for name in ("z_H", "z_L"))
    steps = torch.from_numpy(case["steps"][done - 1])
    return Carry(z_h, z_l, steps, torch.tensor(halted), grids(case))


@torch.no_grad()
def segments(case: Case, tight: float, wide: float) -> dict[str, Found]:
    """All T segments in a row, and the sums of the published loss head over them."""
    model, per_cell = original(case), case.meta["tolerance"]["tok_loss"]
    batch = len(case["inputs"])
    carry = first_carry(model, grids(case))
    rows: dict[str, list[Any]] = {}
    for done in range(model.config.halt_max_steps):
        carry, outcome = evaluate(model, carry, grids(case, "b2_") if done else grids(case))
        told = losses(outcome, carry.grids.labels, model.config.loss_type)
        # Losses from the case's own logits, so that their tolerance is not that of the loop.
        logits = torch.from_numpy(case["logits"][done])
        row = {
            "logits": outcome.logits,
            "q_halt_logits": outcome.q_halt,
            "q_continue_logits": outcome.q_continue,
            "z_H": carry.z_h,
            "z_L": carry.z_l,
            "steps": carry.steps,
            "halted": carry.halted,
            "tok_loss_stablemax": stablemax_loss(logits, carry.grids.labels),
            "tok_loss_softmax": softmax_loss(logits, carry.grids.labels),
            "metric_lm_loss": told.cells,
            "metric_q_halt_loss": told.q_halt,
            "metric_loss": told.total,
        } | {f"metric_{name}": value for name, value in metrics(outcome, carry).items()}
        for name, value in row.items():
            rows.setdefault(name, []).append(np.asarray(value))
    tolerances = {name: 0.0 for name in ("steps", "halted", "metric_count", "metric_steps")}
    tolerances |= {f"metric_{name}": 0.0 for name in ("exact_accuracy", "q_halt_accuracy")}
    tolerances |= {"tok_loss_stablemax": per_cell, "tok_loss_softmax": per_cell}
    # Sums over a batch, of means over cells and of halting losses.
    tolerances |= {f"metric_{name}": wide * batch for name in ("lm_loss", "q_halt_loss", "loss")}
    tolerances["metric_accuracy"] = 1e-6  # a float32 sum of a batch of shares
    return {name: Found(np.stack(v), tolerances.get(name, wide)) for name, v in rows.items()}


@torch.no_grad()
def exits(case: Case, wide: float) -> dict[str, Found]:
    model, grid = original(case), grids(case)
    answer = model.solve(grid.inputs, model.puzzle_rows(grid.identifiers), early_exit=True)
    return {
        "early_exit_step": Found(answer.steps, 0.0),
        "early_exit_logits": Found(answer.logits, wide),
        "early_exit_tokens": Found(answer.logits.argmax(-1).int(), 0.0),
    }


def resets(case: Case, tight: float) -> dict[str, Found]:
    """A batch that all slots take over, and one that only slot 0 does."""
    model, batch = original(case), len(case["inputs"])
    most = model.config.halt_max_steps
    stream, new = evaluate(model, stored(case, most, case["halted"][-1]), grids(case, "b2_"))
    first = stored(case, 1, [i == 0 for i in range(batch)])
    mixed, outcome = evaluate(model, first, grids(case, "b2_"))
    return {
        "stream_logits": Found(new.logits, tight),
        "stream_z_H": Found(stream.z_h, tight),
        "stream_z_L": Found(stream.z_l, tight),
        "stream_steps": Found(stream.steps, 0.0),
        "mixed_logits": Found(outcome.logits, tight),
        "mixed_q_halt_logits": Found(outcome.q_halt, tight),
        "mixed_z_H": Found(mixed.z_h, tight),
        "mixed_z_L": Found(mixed.z_l, tight),
        "mixed_steps": Found(mixed.steps, 0.0),
        "mixed_current_inputs": Found(mixed.grids.inputs, 0.0),
    }


def compare(case: Case, found: dict[str, Found], given: set[str]) -> None:
    """In the order of computation: the first name that fails is the culprit. None is left out."""
    for name, (value, atol) in found.items():
        assert_close(value, case[name], atol=atol, where=name)
    left_out = {name for name in case.arrays if not name.startswith("train")} - set(found) - given
    assert not left_out


@original_cases
def test_every_array_equals_the_published_network(case: Case) -> None:
    """Tables, sub-modules, all updates, T segments in a row, early exit, and slots taken over."""
    tight = case.meta["tolerance"]["segment_from_reference_carry"]
    wide = case.meta["tolerance"]["free_running_all_segments"]
    assert original(case).config.updates == case.meta["seg0_update_order"]
    found = first_segment(case, tight) | segments(case, tight, wide)
    names = {"inputs", "labels", "puzzle_identifiers"}
    compare(
        case, found | exits(case, wide) | resets(case, tight), names | {f"b2_{n}" for n in names}
    )


@original_cases
@torch.no_grad()
def test_each_segment_from_the_published_carry(case: Case) -> None:
    """Rounding does not add up when each segment starts from what the published one left."""
    model, grid = original(case), grids(case)
    atol = case.meta["tolerance"]["segment_from_reference_carry"]
    e = model.embed(grid.inputs, model.puzzle_rows(grid.identifiers))
    z_h, z_l = model.initial(len(grid.inputs))
    for done in range(model.config.halt_max_steps):
        found = model.segment(z_h, z_l, e)
        q = np.stack((case["q_halt_logits"][done], case["q_continue_logits"][done]), -1)
        wanted = {name: case[name][done] for name in ("z_H", "z_L", "logits")} | {"q": q}
        for got, (name, want) in zip(found, wanted.items(), strict=True):
            assert_close(got, want, atol=atol, where=f"{name} of segment {done + 1}")
        z_h, z_l = (torch.from_numpy(case[name][done]) for name in ("z_H", "z_L"))


@original_cases
@torch.no_grad()
def test_solving_without_early_exit_is_the_published_evaluation(case: Case) -> None:
    """All T segments, or as many as are asked for: no parameter depends on T."""
    model, grid = original(case), grids(case)
    rows = model.puzzle_rows(grid.identifiers)
    wide = case.meta["tolerance"]["free_running_all_segments"]
    for steps in range(1, model.config.halt_max_steps + 1):
        answer = model.solve(grid.inputs, rows, max_steps=steps)
        assert_close(answer.logits, case["logits"][steps - 1], atol=wide, where=f"T = {steps}")
        assert answer.steps.tolist() == [steps] * len(grid.inputs)
    assert torch.equal(answer.logits, model.solve(grid.inputs, rows).logits)


@original_cases
@torch.no_grad()
def test_early_exit_obeys_its_least_number_and_its_margin(case: Case) -> None:
    """Recomputed from the published scores, for samples that are nowhere close to the margin."""
    model, grid = original(case), grids(case)
    rows, most = model.puzzle_rows(grid.identifiers), model.config.halt_max_steps
    lead = case["q_halt_logits"] - case["q_continue_logits"]  # [T, B]
    wide = case.meta["tolerance"]["free_running_all_segments"]
    for least, margin in ((2, 0.0), (most, 0.0), (1, 0.5), (1, 1e9)):
        clear = (abs(lead - margin) > 2 * wide).all(0)  # rounding cannot change the decision
        assert clear.any()
        stops = lead > margin
        stops[: least - 1] = False
        stops[-1] = True
        answer = model.solve(grid.inputs, rows, early_exit=True, min_steps=least, margin=margin)
        assert (answer.steps.numpy() == stops.argmax(0) + 1)[clear].all()


@original_cases
@torch.no_grad()
def test_a_sample_does_not_feel_its_batch(case: Case) -> None:
    """Alone it has the same first segment, ends at the same one, and with the same logits."""
    model, grid = original(case), grids(case)
    wide = case.meta["tolerance"]["free_running_all_segments"]  # rounding grows by the segment
    rows = model.puzzle_rows(grid.identifiers)
    first = model.solve(grid.inputs, rows, max_steps=1)
    last = model.solve(grid.inputs, rows, early_exit=True)
    for i in range(len(grid.inputs)):
        vec = None if rows is None else rows[i : i + 1]
        alone = model.solve(grid.inputs[i : i + 1], vec, max_steps=1)
        assert_close(alone.logits[0], first.logits[i], atol=ROUNDING, where=f"first of {i}")
        alone = model.solve(grid.inputs[i : i + 1], vec, early_exit=True)
        assert alone.steps.tolist() == last.steps[i : i + 1].tolist()
        assert_close(alone.logits[0], last.logits[i], atol=wide, where=f"last of {i}")


@original_cases
@torch.no_grad()
def test_no_weight_of_the_original_is_silent(case: Case) -> None:
    """Each tensor that is read is needed: with it zeroed, logits or scores are clearly wrong."""
    model, grid = original(case), grids(case)

    def outputs() -> Tensor:
        e = model.embed(grid.inputs, model.puzzle_rows(grid.identifiers))
        found = model.segment(*model.initial(len(grid.inputs)), e)
        return torch.cat((found.logits.flatten(), found.q.flatten()))

    before = outputs()
    for name, tensor in (model.published() | model.fixed()).items():
        kept = tensor.clone()
        tensor.zero_()
        assert (outputs() - before).abs().max() > 1e-3, name
        tensor.copy_(kept)


@original_cases
@torch.no_grad()
def test_a_reset_row_forgets_even_nan(case: Case) -> None:
    """It is selected, not multiplied: an undefined first state may hold anything."""
    model = original(case)
    shape = (2, model.config.positions, model.config.hidden_size)
    nan = torch.full(shape, float("nan"))
    z_h, z_l = model.reset(torch.tensor([True, False]), nan, nan)
    for got, fresh in zip((z_h, z_l), model.initial(1), strict=True):
        assert torch.equal(got[0], fresh[0])
        assert got[1].isnan().all()


@original_cases
def test_only_the_last_two_updates_are_differentiated(case: Case) -> None:
    """The one-step gradient is that of the last L and H update from a state taken as given."""
    model, grid = original(case).train().requires_grad_(True), grids(case)
    try:
        e = model.embed(grid.inputs, model.puzzle_rows(grid.identifiers))
        z_h, z_l = model.initial(len(grid.inputs))
        found = model.segment(z_h, z_l, e, one_step_gradient=True)
        assert not found.z_h.requires_grad
        assert not found.z_l.requires_grad
        weights = list(model.parameters())
        got = torch.autograd.grad(found.logits.square().sum() + found.q.sum(), weights)
        with torch.no_grad():
            before = model.refine(model.eager(), z_h, z_l, e, model.config.updates[:-2])
        e = model.embed(grid.inputs, model.puzzle_rows(grid.identifiers))
        z_h, _ = model.refine(model.eager(), *before, e, "LH")
        logits, q = model.heads(z_h)
        want = torch.autograd.grad(logits.square().sum() + q.sum(), weights)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        e = model.embed(grid.inputs, model.puzzle_rows(grid.identifiers))
        whole = model.segment(*model.initial(len(grid.inputs)), e)
        full = torch.autograd.grad(whole.logits.square().sum() + whole.q.sum(), weights)
        assert any(not torch.allclose(a, b) for a, b in zip(got, full, strict=True))
    finally:
        model.eval().requires_grad_(False)


@original_cases
def test_counts_are_those_of_the_published_network(case: Case) -> None:
    """Parameters that are trained, and everything in a state dict."""
    model = original(case)
    assert sum(p.numel() for p in model.parameters()) == case.meta["n_params"]
    state = model.published() | model.fixed()
    assert sum(t.numel() for t in state.values()) == case.meta["n_state"]


@bidir_cases
@torch.no_grad()
def test_every_cycle_equals_the_published_network(case: Case) -> None:
    """Embedding, first layer, both states, halting and logits of all cycles; then both stops."""
    model = bidirectional(case)
    c, ids = model.config, torch.from_numpy(case["input_ids"])
    stated = case.meta["tolerance"]
    x = model.embed(ids)
    found = {
        "pe_first_rows": Found(model.pe[: ids.shape[1]], 0.0),
        "x_emb": Found(x, stated["state"]),
    }
    norms, cycles = [], list[Cycle]()
    high = low = x
    for number in range(c.max_cycles):
        step = recording(c.num_heads)
        cycles.append(model.cycle(high, low, number, x, step))
        high, low = cycles[-1].high, cycles[-1].low
        norms.append(step.outputs[2 * c.num_h_layers])
        if not number:
            found["h_layer0_cycle0_out"] = Found(step.outputs[1], stated["state"])
    whole, alone = model.solve(ids), model.solve(ids, per_sample=True)
    assert whole.cycles.tolist() == [int(case["cycles_used"])] * len(ids)
    found |= {
        "cycle_h_norm_out": Found(torch.stack(norms), stated["state"]),
        "cycle_l_state": Found(torch.stack([cycle.low for cycle in cycles]), stated["state"]),
        "cycle_h_state": Found(torch.stack([cycle.high for cycle in cycles]), stated["state"]),
        "cycle_halt_logit": Found(torch.stack([cycle.halt for cycle in cycles]), stated["halt"]),
        "cycle_logits": Found(torch.stack([cycle.logits for cycle in cycles]), stated["logits"]),
        "cycles_used": Found(np.asarray(len(whole.p)), 0.0),
        "halt_probs": Found(whole.p, stated["halt"]),
        "logits": Found(whole.logits, stated["logits"]),
        "per_sample_cycles": Found(alone.cycles, 0.0),
        "per_sample_logits": Found(alone.logits, stated["logits"]),
    }
    compare(case, found, {"input_ids"})


@bidir_cases
@torch.no_grad()
def test_the_rule_for_a_sample_is_that_of_a_batch_of_one(case: Case) -> None:
    model = bidirectional(case)
    ids = torch.from_numpy(case["input_ids"])
    together = model.solve(ids, per_sample=True)
    for i in range(len(ids)):
        for per_sample in (False, True):
            alone = model.solve(ids[i : i + 1], per_sample=per_sample)
            assert alone.cycles.tolist() == together.cycles[i : i + 1].tolist()
            assert_close(alone.logits[0], together.logits[i], atol=ROUNDING, where=f"sample {i}")


@bidir_cases
@torch.no_grad()
def test_no_weight_of_the_bidirectional_form_is_silent(case: Case) -> None:
    """But for the bias of the keys, which adds the same to all scores of a query."""
    model = bidirectional(case)
    ids, d = torch.from_numpy(case["input_ids"]), model.config.hidden_size

    def outputs() -> Tensor:
        cycles = list(model.unroll(ids))
        return torch.cat([t.flatten() for cycle in cycles for t in (cycle.logits, cycle.halt)])

    before = outputs()
    for name, tensor in (model.published() | model.fixed()).items():
        kept = tensor.clone()
        tensor.zero_()
        assert (outputs() - before).abs().max() > 1e-3, name
        tensor.copy_(kept)
        if name.endswith("in_proj_bias"):
            tensor[d : 2 * d].add_(1.0)
            assert (outputs() - before).abs().max() < 1e-3, name
            tensor.copy_(kept)


@bidir_cases
def test_counts_are_those_of_the_published_bidirectional_network(case: Case) -> None:
    model = bidirectional(case)
    assert sum(p.numel() for p in model.parameters()) == case.meta["n_params"]
    state = model.published() | model.fixed()
    assert sum(t.numel() for t in state.values()) == case.meta["n_state"]


def small(**changes: Any) -> HRM:
    config = HRMConfig(
        seq_len=6,
        vocab_size=5,
        hidden_size=8,
        num_heads=2,
        expansion=4.0,
        h_cycles=2,
        l_cycles=1,
        h_layers=1,
        l_layers=1,
        pos_encodings="learned",
        halt_max_steps=3,
    )
    model = HRM(replace(config, **changes)).eval()
    return model.initialize(torch.Generator().manual_seed(0)).requires_grad_(False)


def small_bidir(**changes: Any) -> Bidir:
    config = BidirConfig(5, 8, 2, 1, 1, max_cycles=5, positions=9, seq_len=6)
    model = Bidir(replace(config, **changes)).eval()
    return model.initialize(torch.Generator().manual_seed(0)).requires_grad_(False)


IDS = torch.tensor([[0, 1, 2, 3, 4, 0], [4, 4, 1, 0, 2, 3]])


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize(("width", "prefix"), [(0, 0), (3, 1), (8, 1), (9, 2), (24, 3)])
@torch.no_grad()
def test_any_puzzle_width_makes_whole_slots_in_front(
    positions: str, width: int, prefix: int
) -> None:
    """The last slot is filled up with zeros; the grid comes behind it, and so do its positions."""
    model = small(pos_encodings=positions, puzzle_emb_ndim=width, num_puzzle_identifiers=2)
    assert model.config.prefix == prefix
    assert model.config.positions == prefix + 6
    assert model.config.letter == ("A1" if positions == "rope" and prefix else "A2")
    vec = torch.arange(2.0 * width).reshape(2, width) + 1 if width else None
    e = model.embed(IDS, vec)
    t = e / 8**0.5
    if model.embed_pos is not None:
        t = t / 0.707106781 - model.embed_pos
    assert t.shape == (2, prefix + 6, 8)
    assert_close(t[:, prefix:], model.embed_tokens[IDS], atol=1e-6)
    slots = t[:, :prefix].flatten(1)
    if vec is not None:
        assert_close(slots[:, :width], vec, rtol=1e-6, atol=1e-6)
    assert_close(slots[:, width:], torch.zeros(2, prefix * 8 - width), atol=1e-6)
    assert model.solve(IDS, vec).logits.shape == (2, 6, 5)


@torch.no_grad()
def test_nothing_halts_before_training() -> None:
    """Both scores are -5, and a tie goes on."""
    answer = small(pos_encodings="rope").solve(IDS, early_exit=True)
    assert answer.q.tolist() == [[-5.0, -5.0]] * 2
    assert answer.steps.tolist() == [3, 3]


def test_half_split_rotation_turns_the_right_pairs() -> None:
    """At position n, x_j + i x_(j + D/2) turns by n * theta^(-2j/D): complex arithmetic says so."""
    from edgert.models.hrm.step import half_split, rotate
    from edgert.models.layers import rope_tables

    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    got = rotate(x, *half_split(*rope_tables(100.0, 6, 5)))
    angles = np.arange(5)[:, None] * 100.0 ** (-np.arange(3) / 3)
    turned = (x.numpy()[..., :3] + 1j * x.numpy()[..., 3:]) * np.exp(1j * angles)
    assert_close(got, np.concatenate((turned.real, turned.imag), -1), atol=1e-6)


@pytest.mark.parametrize(
    ("expansion", "hidden", "width"),
    [(4.0, 512, 1536), (2.0, 36, 256), (4.0, 96, 256), (4, 97, 512)],
)
def test_the_gated_width_is_a_multiple_of_256(expansion: float, hidden: int, width: int) -> None:
    config = replace(small().config, expansion=expansion, hidden_size=hidden)
    assert config.intermediate_size == width


def test_truncated_normals_have_exactly_the_stated_deviation() -> None:
    """Cut off at two deviations of the whole one, which is 1.136847 times as large."""
    x = torch.empty(1_000_000)
    truncated_normal(x, 0.5, torch.Generator().manual_seed(3))
    assert abs(float(x.std()) - 0.5) < 2e-3  # 5 standard errors
    assert abs(float(x.mean())) < 2.5e-3
    assert 1.13 < float(x.abs().max()) <= 2 * 0.5 * 1.136847 + 1e-6
    truncated_normal(x, 0.0, torch.Generator())
    assert not x.any()


def test_initial_weights_of_the_original() -> None:
    """By their inputs; the q head 0 and -5; the puzzle table 0, and not among the parameters."""
    model = small(hidden_size=64, vocab_size=50, puzzle_emb_ndim=64, num_puzzle_identifiers=4)
    for name, view in model.published().items():
        if name == "q_head.bias":
            assert view.tolist() == [-5.0, -5.0]
        elif name == "q_head.weight":
            assert not view.any()
        else:
            inputs = 64 if name.startswith("embed") else view.shape[1]
            assert abs(float(view.std()) * inputs**0.5 - 1) < 0.1, name
    assert 0.7 < float(model.h_init.std()) < 1.3
    assert not torch.equal(model.h_init, model.l_init)
    assert model.puzzle_table is not None
    assert model.puzzle_table.shape == (4, 64)
    assert not model.puzzle_table.any()
    assert "puzzle_table" not in model.state_dict()


@pytest.mark.parametrize("fresh", [False, True])
def test_initial_weights_of_the_bidirectional_form(fresh: bool) -> None:
    """B1 as PyTorch makes such modules, B2 with Xavier's bounds and no biases."""
    d = 64
    model = small_bidir(hidden_size=d, vocab_size=90, cycle_embedding=fresh)
    biased = {"linear1.bias": d, "linear2.bias": 4 * d, "halt_predictor.bias": 2 * d}
    biased |= dict.fromkeys(("h_to_l.bias", "l_to_h.bias", "output.bias"), d)
    for name, view in model.published().items():
        if "norm" in name:
            assert (view == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("embedding.weight"):
            assert abs(float(view.std()) / (0.02 if fresh else 1.0) - 1) < 0.15, name
        elif name.endswith("bias") and (fresh or "self_attn" in name):
            assert not view.any(), name
        else:
            inputs = view.shape[1] if view.ndim == 2 else biased[name.rpartition(".0.")[2]]
            bound = inputs**-0.5
            if view.ndim == 2 and (fresh or name.endswith("in_proj_weight")):
                bound = (6 / sum(view.shape)) ** 0.5
            largest = float(view.abs().max())
            assert largest <= bound, name
            assert largest > 0.9 * bound or view.numel() == 1, name


def test_sinusoids_alternate() -> None:
    """Sines in even columns, cosines in odd ones, of t * 10000^(-2k/d)."""
    pe = small_bidir(hidden_size=8, positions=9).pe
    t, k = np.arange(9)[:, None], np.arange(4)
    angles = t * 10000.0 ** (-2 * k / 8)
    assert_close(pe[:, 0::2], np.sin(angles), atol=1e-6)
    assert_close(pe[:, 1::2], np.cos(angles), atol=1e-6)


@torch.no_grad()
def test_the_input_is_added_again_only_if_asked() -> None:
    """To both states, before each cycle but the first; the weights are the same."""
    plain, again = small_bidir(), small_bidir(reinject_input=True)
    x = plain.embed(IDS)
    found = list(again.unroll(IDS))
    high = low = x
    for number, cycle in enumerate(found):
        if number:
            high, low = high + x, low + x
        expected = plain.cycle(high, low, number)
        for a, b in zip(cycle, expected, strict=True):
            assert_close(a, b, atol=1e-6, where=f"cycle {number}")
        high, low = expected.high, expected.low
    without = list(plain.unroll(IDS))
    assert torch.equal(without[0].logits, found[0].logits)
    assert (without[-1].logits - found[-1].logits).abs().max() > 1e-3


@pytest.mark.parametrize(("fresh", "least"), [(False, 2), (True, 4)])
@torch.no_grad()
def test_nothing_stops_before_its_least_cycle(fresh: bool, least: int) -> None:
    """However sure it is; and a head that is never sure runs all cycles."""
    model = small_bidir(cycle_embedding=fresh)
    for bias, cycles in ((50.0, least), (-50.0, 5)):
        model.halt.bias.fill_(bias)
        for per_sample in (False, True):
            assert model.solve(IDS, per_sample=per_sample).cycles.tolist() == [cycles] * 2
        assert model.solve(IDS, max_cycles=3).cycles.tolist() == [min(cycles, 3)] * 2


def test_dropout_acts_where_the_published_layer_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training only: embedding, attention weights and output, twice in the feed-forward."""
    model = small_bidir(dropout=0.5)
    acted: list[tuple[int, ...]] = []
    real = torch.nn.functional.dropout

    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        out = real(x, p, training)
        if not torch.equal(out, x):
            acted.append(tuple(x.shape))
        return out

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    eager = next(model.unroll(IDS)).logits
    assert torch.equal(eager, next(model.unroll(IDS)).logits)
    assert acted == []
    model.train()
    next(model.unroll(IDS))
    layer = [(2, 2, 6, 6), (2, 6, 8), (2, 6, 32), (2, 6, 8)]
    assert acted == [(2, 6, 8), *layer, *layer]


@pytest.mark.parametrize("make", [small, small_bidir])
def test_gradients_can_be_reached_by_published_names(make: Any) -> None:
    """`published` gives views of whatever it is told to pick, in published orientation."""
    model = make().requires_grad_(True)
    copies = {p: torch.full_like(p, float(i)) for i, p in enumerate(model.parameters())}
    picked = model.published(lambda p: copies[p])
    assert {k: v.shape for k, v in picked.items()} == {
        k: v.shape for k, v in model.published().items()
    }
    assert sum(v.numel() for v in picked.values()) == sum(p.numel() for p in model.parameters())
    for view in picked.values():
        view.fill_(-1.0)
    assert all((copy == -1.0).all() for copy in copies.values())
