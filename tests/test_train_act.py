"""Training in segments: the published trainer's numbers replayed, its rules by hand, its sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, assert_close, cases
from torch import Tensor

from edgert.errors import BadCheckpoint
from edgert.models.hrm.bidir import Bidir
from edgert.models.hrm.config import BidirConfig, HRMConfig
from edgert.models.hrm.model import HRM
from edgert.models.importers.hrm import read_hrm
from edgert.train.act import (
    IGNORED,
    Carry,
    Grids,
    Outcome,
    evaluate,
    first_carry,
    losses,
    metrics,
    softmax_cross_entropy,
    stablemax_cross_entropy,
    train,
)
from edgert.train.bidir_loss import halting_loss, published_loss
from edgert.train.optim_act import MOMENTS, AdamATan2, learning_rate, sign_sgd, total_steps

TRAINED = cases("hrm", lambda case: "train" in case.meta)
PREFIX = "train0_grad.model.inner."
LARGE = 4096  # elements from which on a case has a gradient's norm and sum only


def loaded(case: Case, name: str) -> HRM:
    settings = {"seq_len": case.meta["config"]["seq_len"]}
    model = read_hrm(case.folder / name, settings=settings).model
    assert isinstance(model, HRM)
    return model.train().requires_grad_(True)


def offered(case: Case, step: int) -> Grids:
    names = ("inputs", "labels", "puzzle_identifiers")
    return Grids(*(torch.from_numpy(case[f"train{step}_{name}"]) for name in names))


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_the_published_trainer_is_replayed(case: Case) -> None:
    """Losses, targets, halting and metrics of each step, the first gradients, all weights after."""
    stated = case.meta["train"]["tolerance"]
    model = loaded(case, case.meta["checkpoint"])
    optimizer = AdamATan2(model, betas=(0.9, 0.95), weight_decay=0.1)
    carry = first_carry(model, offered(case, 0))
    generator = torch.Generator().manual_seed(0)
    assert model.config.halt_exploration_prob == 0.0
    for step, lr in enumerate(case["train_lr"].tolist()):
        carry, outcome = train(model, carry, offered(case, step), generator)
        found = losses(outcome, carry.grids.labels, model.config.loss_type)
        optimizer.clear()
        (found.total / len(carry.steps)).backward()
        if not step:
            compare_gradients(case, model, outcome, stated["grad"])
        # Weights differ by `params_after` behind the last step: so may what follows from them.
        atol = stated["params_after"] if step else stated["grad"]
        assert found.q_continue is not None
        assert outcome.target is not None
        values = {"loss": found.total, "lm_loss": found.cells, "q_halt_loss": found.q_halt}
        values |= {"q_continue_loss": found.q_continue, "target_q": outcome.target}
        for name, value in values.items():
            want = case[f"train_{name}"][step]
            assert_close(value.detach(), want, atol=atol, where=f"{name} of step {step + 1}")
        assert_close(carry.steps, case["train_steps"][step], where="steps")
        assert_close(carry.halted, case["train_halted"][step], where="halted")
        sums = metrics(outcome, carry)
        for name in ("count", "exact_accuracy", "accuracy"):
            want = case[f"train_{name}"][step]
            assert_close(sums[name], want, atol=1e-6 * (name == "accuracy"), where=name)
        if outcome.rows is not None:
            assert model.puzzle_table is not None
            assert outcome.rows.grad is not None
            identifiers = carry.grids.identifiers
            sign_sgd(model.puzzle_table, identifiers, outcome.rows.grad, lr, 0.1)
        optimizer.step(lr)
    final = loaded(case, case.meta["train"]["after"])
    wanted = final.published() | final.fixed()
    before = loaded(case, case.meta["checkpoint"])
    for name, view in (model.published() | model.fixed()).items():
        assert_close(view, wanted[name], atol=stated["params_after"], where=name)
    moved = (wanted["lm_head.weight"] - before.published()["lm_head.weight"]).abs().max()
    assert moved > 10 * stated["params_after"]  # so that the comparison could fail


def compare_gradients(case: Case, model: HRM, outcome: Outcome, atol: float) -> None:
    found = model.published(gradient)
    names = {name for name in case.arrays if name.startswith("train0_grad.")}
    for name, got in found.items():
        want = case[PREFIX + name]
        if got.numel() > LARGE:
            got = torch.stack((got.norm(), got.sum()))
        assert_close(got, want, atol=atol, where=f"gradient of {name}")
    compared = {PREFIX + name for name in found}
    if outcome.rows is not None:
        assert outcome.rows.grad is not None
        local = "train0_grad.puzzle_local_weights"
        assert_close(outcome.rows.grad, case[local], atol=atol, where=local)
        compared.add(local)
    assert compared == names


def test_the_published_rates_are_those_of_the_schedule() -> None:
    """Warm-up over two steps and a cosine over eight, to a tenth: what this case was made with."""
    case = next(case for case in TRAINED if case.name == "orig_rope_puzzle")
    rates = [
        learning_rate(step, base=3e-3, warmup=2, total=8, floor=0.1)
        for step in range(1, len(case["train_lr"]) + 1)
    ]
    assert_close(rates, case["train_lr"], rtol=1e-12)


def test_the_schedule_by_hand() -> None:
    """Counted from 1: a line up to the base rate, half a cosine down, and never below the floor."""
    steps = (1, 2, 3, 4, 8, 12)
    found = [learning_rate(step, base=2.0, warmup=4, total=12, floor=0.1) for step in steps]
    assert_close(found, [0.5, 1.0, 1.5, 2.0, 1.1, 0.2], rtol=1e-12)
    assert learning_rate(1, base=1.0, warmup=0, total=0, floor=1.0) == 1.0
    assert all(learning_rate(n, base=3.0, warmup=2, total=9, floor=1.0) == 3.0 for n in (2, 5, 99))
    assert total_steps(20000, 1000, 1.0, 768) == 26041


def plain_atan2(
    w: np.ndarray, grads: list[np.ndarray], lr: float, decay: float, b1: float, b2: float
) -> np.ndarray:
    """The published formula, in float64, one element after the other."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        for i in np.ndindex(w.shape):
            w[i] *= 1 - lr * decay
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            w[i] -= lr / (1 - b1**t) * math.atan2(m[i], math.sqrt(v[i]) / math.sqrt(1 - b2**t))
    return w


def small(**changes: Any) -> HRM:
    config = HRMConfig(
        seq_len=4,
        vocab_size=5,
        hidden_size=8,
        num_heads=2,
        expansion=4.0,
        h_cycles=2,
        l_cycles=2,
        h_layers=1,
        l_layers=1,
        pos_encodings="learned",
        halt_max_steps=4,
        puzzle_emb_ndim=8,
        num_puzzle_identifiers=6,
    )
    return HRM(replace(config, **changes)).initialize(torch.Generator().manual_seed(0))


def test_adam_atan2_is_its_formula() -> None:
    """Five updates with gradients of all sizes, zeros among them; atan2(0, 0) is no trouble."""
    model, rng = small(), np.random.default_rng(3)
    optimizer = AdamATan2(model, betas=(0.8, 0.9), weight_decay=0.3)
    names = model.published()
    start = {name: view.numpy().astype(np.float64) for name, view in names.items()}
    given: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for name, view in model.published(gradient).items():
            scale = 10.0 ** rng.integers(-12, 3, size=view.shape)
            value = rng.normal(size=view.shape) * scale * (rng.random(view.shape) < 0.8)
            view.copy_(torch.from_numpy(value))
            given[name].append(view.numpy().astype(np.float64))
        optimizer.step(0.01)
    for name, view in names.items():
        want = plain_atan2(start[name], given[name], 0.01, 0.3, 0.8, 0.9)
        # Five roundings to float32 of values up to 5.
        assert_close(view, want, atol=1e-6, rtol=1e-6, where=name)


def test_the_optimizer_s_state_comes_back_by_published_names() -> None:
    """A restored optimizer takes the same step, bit for bit; a wrong state names all it lacks."""
    model = small()
    optimizer = AdamATan2(model)

    def step(model: HRM, optimizer: AdamATan2, seed: int) -> None:
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * seed + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(0.01)

    step(model, optimizer, 1)
    other = small()
    for view, source in zip(other.published().values(), model.published().values(), strict=True):
        view.copy_(source)
    state = {name: view.clone() for name, view in optimizer.state().items()}
    assert {name.partition(".")[2] for name in state} == set(model.published())
    restored = AdamATan2(other)
    restored.restore(optimizer.updates, state, "here")
    step(model, optimizer, 2)
    step(other, restored, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    first, second = (f"{slot}.lm_head.weight" for slot in MOMENTS)
    del state[first]
    state[second] = torch.zeros(1)
    state["exp_avg.other"] = torch.zeros(1)
    with pytest.raises(BadCheckpoint) as failure:
        restored.restore(2, state, "here")
    told = str(failure.value)
    assert f"{first} is missing" in told
    assert f"{second} is [1], the weight is [5, 8]" in told
    assert "exp_avg.other belongs to no weight" in told


def test_sign_sgd_adds_up_what_slots_share() -> None:
    """One update a row and not a slot; sign(0) is 0; decay only in rows of the batch."""
    table = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    grads = torch.tensor([[1.0, -5.0, 2.0], [0.5, 0.0, -3.0], [3.0, 4.0, -2.0]])
    sign_sgd(table, torch.tensor([2, 0, 2], dtype=torch.int32), grads, 0.1, 0.5)
    kept = 1 - 0.1 * 0.5
    want = [
        [1 * kept - 0.1, 2 * kept, 3 * kept + 0.1],
        [4.0, 5.0, 6.0],
        [7 * kept - 0.1, 8 * kept + 0.1, 9 * kept],
    ]
    assert_close(table, np.array(want), atol=1e-6)


@pytest.mark.parametrize("value", [-3.0, -1e-3, 0.0, 0.5, 1.0, 2.0, 1e6, -1e6])
def test_the_gradient_of_stablemax_is_finite(value: float) -> None:
    """At 1 above all, where the branch that is not taken divides by 0."""
    logits = torch.tensor([[value, 1.0, 0.0, -2.0]], requires_grad=True)
    loss = stablemax_cross_entropy(logits, torch.tensor([0]))
    assert loss.dtype == torch.float64
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    s = [x + 1 if x >= 0 else 1 / (1 - x) for x in (value, 1.0, 0.0, -2.0)]
    exact = float(torch.tensor(value).double())
    s[0] = exact + 1 if exact >= 0 else 1 / (1 - exact)
    assert_close(loss.detach(), [-math.log(s[0] / sum(s))], rtol=1e-12, atol=1e-12)


def test_stablemax_has_the_gradient_of_its_formula() -> None:
    """Against finite differences in float64, away from 0, where the second derivative jumps."""
    logits = torch.tensor([[-2.0, -0.5, 0.5, 1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    for label in range(5):
        torch.autograd.gradcheck(
            lambda x, label=label: stablemax_cross_entropy(x, torch.tensor([label])), logits
        )


@pytest.mark.parametrize("loss", [stablemax_cross_entropy, softmax_cross_entropy])
def test_ignored_cells_cost_nothing(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Neither value nor gradient, whatever their logits."""
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    labels = torch.tensor([[1, IGNORED, 3], [IGNORED] * 3], dtype=torch.int32)
    found = loss(logits, labels)
    assert found.shape == labels.shape
    assert ((found == 0) == (labels == IGNORED)).all()
    found.sum().backward()
    assert logits.grad is not None
    assert ((logits.grad == 0).all(-1) == (labels == IGNORED)).all()


def test_losses_and_metrics_by_hand() -> None:
    """Three slots: half right, without labels, and all right; the last two halted."""
    logits = torch.zeros(3, 2, 3)
    answers = torch.tensor([[1, 2], [0, 0], [2, 1]])
    logits.scatter_(-1, answers[..., None], 3.0)
    labels = torch.tensor([[1, 1], [IGNORED, IGNORED], [2, IGNORED]])
    q_halt, q_continue = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.0, -1.0])
    target = torch.tensor([0.25, 0.5, 1.0])
    outcome = Outcome(logits, q_halt, q_continue, target)
    found = losses(outcome, labels, "softmax_cross_entropy")

    def bce(score: float, want: float) -> float:
        p = 1 / (1 + math.exp(-score))
        return -(want * math.log(p) + (1 - want) * math.log(1 - p))

    total = math.exp(3) + 2
    right, wrong = math.log(total) - 3, math.log(total)
    cells = (right + wrong) / 2 + right
    halt = bce(0.5, 0) + bce(-1.0, 1) + bce(2.0, 1)  # without any label, all of them are right
    go_on = bce(1.0, 0.25) + bce(0.0, 0.5) + bce(-1.0, 1.0)
    assert found.q_continue is not None
    got = [found.cells, found.q_halt, found.q_continue, found.total]
    assert_close(got, [cells, halt, go_on, cells + 0.5 * (halt + go_on)], rtol=1e-6)
    without = losses(replace(outcome, target=None), labels, "softmax_cross_entropy")
    assert without.q_continue is None
    assert_close(without.total, cells + 0.5 * halt, rtol=1e-6)
    state = torch.zeros(3, 1, 1)
    steps, halted = torch.tensor([3, 4, 2]), torch.tensor([False, True, True])
    grids = Grids(labels, labels, torch.zeros(3))
    assert metrics(outcome, Carry(state, state, steps, halted, grids)) == {
        "count": 1.0,
        "accuracy": 1.0,
        "exact_accuracy": 1.0,
        "q_halt_accuracy": 1.0,
        "steps": 2.0,
    }
    everyone = Carry(state, state, steps, torch.tensor([True] * 3), grids)
    assert metrics(outcome, everyone) == {
        "count": 2.0,
        "accuracy": 1.5,
        "exact_accuracy": 1.0,
        "q_halt_accuracy": 1.0,  # the first slot's score says right, and it is not
        "steps": 5.0,
    }


def batch(seed: int, size: int = 3) -> Grids:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = (torch.randint(0, 5, (size, 4), generator=generator) for _ in range(2))
    return Grids(inputs, labels, torch.randint(0, 6, (size,), generator=generator))


def decided(q: tuple[float, float], **changes: Any) -> HRM:
    """A model whose scores are the same for all."""
    model = small(halt_exploration_prob=0.0, **changes)
    with torch.no_grad():
        model.q_bias.copy_(torch.tensor(q))
    return model


def test_slots_keep_their_puzzle_until_halted() -> None:
    """Whoever is not halted ignores the batch offered; the first call ignores what was there."""
    model = decided((-1.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    carry = first_carry(model, batch(1))
    nan = torch.full_like(carry.z_h, float("nan"))
    carry = replace(carry, z_h=nan, z_l=nan, steps=torch.tensor([9, 9, 9], dtype=torch.int32))
    for done in range(4):
        carry, outcome = train(model, carry, batch(2 + done), generator)
        assert torch.isfinite(outcome.logits).all()
        assert torch.equal(carry.grids.inputs, batch(2).inputs)
        assert carry.steps.tolist() == [done + 1] * 3
        assert carry.halted.tolist() == [done == 3] * 3
    carry, _ = train(
        model, replace(carry, halted=torch.tensor([0, 1, 0]).bool()), batch(7), generator
    )
    for mine, new, old in zip(
        (carry.grids.inputs, carry.grids.labels, carry.grids.identifiers),
        (batch(7).inputs, batch(7).labels, batch(7).identifiers),
        (batch(2).inputs, batch(2).labels, batch(2).identifiers),
        strict=True,
    ):
        assert torch.equal(mine, torch.stack((old[0], new[1], old[2])))
    assert carry.steps.tolist() == [5, 1, 5]


def test_training_halts_where_evaluation_goes_on() -> None:
    """A score of halting that is higher ends a slot in training only; a tie ends none."""
    generator = torch.Generator().manual_seed(0)
    for q, ends in (((1.0, -1.0), True), ((1.0, 1.0), False)):
        model = decided(q)
        carry, outcome = train(model, first_carry(model, batch(1)), batch(1), generator)
        assert carry.halted.tolist() == [ends] * 3
        assert outcome.target is not None
        carry, outcome = evaluate(model, first_carry(model, batch(1)), batch(1))
        assert carry.halted.tolist() == [False] * 3
        assert outcome.target is None
        assert outcome.rows is None
        assert not outcome.logits.requires_grad


def test_exploration_holds_slots_up() -> None:
    """Of slots that would halt at once, all wait for a number drawn uniformly from 2 to T."""
    model = decided((1.0, -1.0))
    model.config = replace(model.config, halt_exploration_prob=1.0)
    generator = torch.Generator().manual_seed(4)
    many = batch(1, 3000)
    for steps, share in ((0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0)):
        carry = replace(
            first_carry(model, many),
            steps=torch.full((3000,), steps, dtype=torch.int32),
            halted=torch.zeros(3000, dtype=torch.bool),
        )
        carry, _ = train(model, carry, many, generator)
        found = float(carry.halted.float().mean())
        assert abs(found - share) < 5 * math.sqrt(max(share * (1 - share), 1e-9) / 3000) + 1e-9
    model.config = replace(model.config, halt_exploration_prob=0.1)
    carry, _ = train(model, first_carry(model, many), many, generator)
    held = 1 - float(carry.halted.float().mean())
    assert abs(held - 0.1) < 5 * math.sqrt(0.09 / 3000)


def test_the_target_is_one_segment_ahead() -> None:
    """The better score of the next segment; behind the last one only that of halting."""
    model = small(halt_exploration_prob=0.0)
    with torch.no_grad():
        model.q_head.normal_(generator=torch.Generator().manual_seed(16))
    grids = batch(3)
    carry = replace(
        first_carry(model, grids),
        steps=torch.tensor([0, 1, 3], dtype=torch.int32),
        halted=torch.zeros(3, dtype=torch.bool),
    )
    after, outcome = train(model, carry, grids, torch.Generator().manual_seed(0))
    with torch.no_grad():
        e = model.embed(grids.inputs, model.puzzle_rows(grids.identifiers))
        q = model.segment(after.z_h, after.z_l, e).q
    assert q.argmax(-1).tolist() == [1, 0, 1]  # so that each rule would give another number
    want = torch.stack((q[0, 1], q[1, 0], q[2, 0])).sigmoid()
    assert outcome.target is not None
    assert not outcome.target.requires_grad
    assert torch.equal(outcome.target, want)


def test_a_single_segment_has_no_continue_loss() -> None:
    """With T = 1 every slot halts, and nothing is said of going on."""
    model = small(halt_max_steps=1)
    carry, outcome = train(
        model, first_carry(model, batch(1)), batch(1), torch.Generator().manual_seed(0)
    )
    assert carry.halted.tolist() == [True] * 3
    assert outcome.target is None


def test_without_a_puzzle_table_there_are_no_rows() -> None:
    model = small(puzzle_emb_ndim=0)
    carry, outcome = train(
        model, first_carry(model, batch(1)), batch(1), torch.Generator().manual_seed(0)
    )
    assert outcome.rows is None
    losses(outcome, carry.grids.labels, model.config.loss_type).total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_small_network_learns() -> None:
    """To turn each digit into the next one: all of 8 grids are right behind 150 updates."""
    model = small(halt_exploration_prob=0.1, puzzle_emb_ndim=0)
    optimizer = AdamATan2(model, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    grids = batch(5, 8)
    grids = replace(grids, labels=(grids.inputs + 1) % 5)
    carry = first_carry(model, grids)
    for step in range(150):
        carry, outcome = train(model, carry, grids, generator)
        optimizer.clear()
        (losses(outcome, carry.grids.labels, "stablemax_cross_entropy").total / 8).backward()
        optimizer.step(learning_rate(step + 1, base=5e-3, warmup=10, total=150, floor=0.1))
    model.eval()
    assert (model.solve(grids.inputs).logits.argmax(-1) == grids.labels).all()
    assert (model.solve(grids.inputs, early_exit=True).steps < 4).any()  # halting is learned, too


def count(make: Callable[[], torch.nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


PUBLISHED = HRMConfig(
    seq_len=900,
    vocab_size=12,
    hidden_size=512,
    num_heads=8,
    expansion=4.0,
    h_cycles=2,
    l_cycles=2,
    h_layers=4,
    l_layers=4,
    pos_encodings="rope",
    halt_max_steps=16,
    puzzle_emb_ndim=512,
    num_puzzle_identifiers=1000,
)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 27_276_290),
        ({"vocab_size": 11, "seq_len": 81, "num_puzzle_identifiers": 1}, 27_275_266),
        ({"vocab_size": 6}, 27_270_146),
        (
            {"seq_len": 16, "vocab_size": 6, "hidden_size": 64, "num_heads": 4, "h_layers": 1}
            | {"l_layers": 1, "pos_encodings": "learned", "puzzle_emb_ndim": 64},
            133_058,
        ),
    ],
)
def test_the_original_has_exactly_the_published_size(
    changes: dict[str, Any], parameters: int
) -> None:
    """Buffers and the puzzle table are not among the parameters."""
    config = replace(PUBLISHED, **changes)
    assert count(lambda: HRM(config)) == parameters


@pytest.mark.parametrize(
    ("config", "parameters", "state"),
    [
        (BidirConfig(12, 256, 8, 4, 3), 5_667_597, 6_947_597),
        (BidirConfig(12, 256, 8, 4, 3, cycle_embedding=True), 5_669_645, 6_949_645),
        (BidirConfig(6, 64, 4, 2, 1, max_cycles=4), 159_431, 159_431 + 5000 * 64),
    ],
)
def test_the_bidirectional_form_has_exactly_the_published_size(
    config: BidirConfig, parameters: int, state: int
) -> None:
    """5,667,597 are trained; with the table of sinusoids the state dict has 1,280,000 more."""
    assert count(lambda: Bidir(config)) == parameters
    with torch.device("meta"):
        model = Bidir(config)
    stored = model.published() | model.fixed()
    assert sum(tensor.numel() for tensor in stored.values()) == state


@dataclass(frozen=True)
class Said:
    """Stands for a cycle: only what the losses read."""

    logits: Tensor
    halt: Tensor


def said(seed: int) -> list[Said]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Said(
            torch.randn(2, 3, 4, generator=generator, requires_grad=True),
            torch.randn(2, generator=generator, requires_grad=True),
        )
        for _ in range(3)
    ]


def nats(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Cross-entropy of each cell in float64; 0 where the label is ignored."""
    x = logits.detach().double().numpy()
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.maximum(labels.numpy(), 0)[..., None], -1)[..., 0]
    return np.where(labels.numpy() == IGNORED, 0.0, -picked)


def test_the_published_loss_of_cycles_by_hand() -> None:
    """The last cycle's mean over all cells, ignored ones counted, and a hundredth of mean p."""
    cycles, labels = said(0), torch.tensor([[0, 1, IGNORED], [3, 3, 2]], dtype=torch.int32)
    loss = published_loss(cycles, labels)
    p = np.mean([1 / (1 + np.exp(-c.halt.detach().numpy())) for c in cycles])
    assert_close(loss.detach(), nats(cycles[-1].logits, labels).mean() + 0.01 * p, rtol=1e-6)
    loss.backward()
    for cycle in cycles:  # why it teaches nothing: every p is pushed down, right answer or not
        assert cycle.halt.grad is not None
        assert (cycle.halt.grad > 0).all()
    assert cycles[0].logits.grad is None


def test_the_halting_loss_of_cycles_by_hand() -> None:
    """Means over cycles; the halting logit is pushed up where all labelled cells are right."""
    cycles = said(1)
    labels = cycles[1].logits.argmax(-1).clone()
    labels[0, 2] = IGNORED
    labels[1, 0] = (labels[1, 0] + 1) % 4
    loss = halting_loss(cycles, labels)
    want = 0.0
    for cycle in cycles:
        p = 1 / (1 + np.exp(-cycle.halt.detach().double().numpy()))
        right = (cycle.logits.argmax(-1) == labels) | (labels == IGNORED)
        solved = right.all(-1).numpy()
        want += nats(cycle.logits, labels).sum() / 5
        want += 0.5 * -np.log(np.where(solved, p, 1 - p)).mean()
    assert_close(loss.detach(), want / 3, rtol=1e-6)
    loss.backward()
    assert cycles[1].halt.grad is not None
    assert cycles[1].halt.grad[0] < 0 < cycles[1].halt.grad[1]
    for cycle in cycles:
        assert cycle.logits.grad is not None
        assert cycle.logits.grad.abs().max() > 0


@pytest.mark.parametrize("reinject", [False, True])
def test_a_small_bidirectional_network_learns(reinject: bool) -> None:
    """The same task as above; its halting head learns to tell that answers are right."""
    config = BidirConfig(5, 16, 2, 1, 1, max_cycles=3, dropout=0.0, reinject_input=reinject)
    model = Bidir(config).initialize(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    grids = batch(5, 8)
    labels = (grids.inputs + 1) % 5
    for _ in range(120):
        optimizer.zero_grad()
        halting_loss(list(model.unroll(grids.inputs)), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    answer = model.eval().solve(grids.inputs, per_sample=True)
    assert (answer.logits.argmax(-1) == labels).all()
    assert answer.cycles.tolist() == [2] * 8  # no earlier one may end
