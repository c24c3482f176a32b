"""Optimizers and schedules: the published trainer's numbers, replayed from its own cases."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, assert_close, cases

from edgert.errors import BadCheckpoint
from edgert.models.importers import load_source
from edgert.train.optim import Average, Optimizer, decays, orthogonal, takes_muon
from edgert.train.published import optimizer_state
from edgert.train.recipe import TrainConfig
from edgert.train.schedule import Tension, cosine

TRAINED = cases("hagi", lambda case: case.name.startswith("train_"))
TRACE: Case = next(case for case in cases("hexad") if case.name == "lr_trace")
TIGHT = {"atol": 2e-4, "rtol": 2e-4}  # where bf16 has no part in it


def config(case: Case) -> TrainConfig:
    """What the case says its trainer was told."""
    told = case.meta["loop_config"] | case.meta["optimizer_config"]
    batch, window = case["tokens"].shape[1], case["tokens"].shape[2] - 1
    return TrainConfig(
        steps=told["max_steps"],
        window=window,
        batch_size=batch,
        grad_accum_steps=told["grad_accum_steps"],
        optimizer=told["optimizer"],
        learning_rate=told["learning_rate"],
        min_lr_ratio=told["min_lr_ratio"],
        warmup_steps=told["warmup_steps"],
        weight_decay=told["weight_decay"],
        grad_clip=told["grad_clip"],
    )


def start(case: Case, name: str = "init_checkpoint"):
    model = load_source(case.folder / case.meta[name]).model
    return model.train().requires_grad_(True)


def replay(case: Case):
    """The case's steps: model, optimizer, and loss, gradient norm and rate of each step."""
    c, model = config(case), start(case)
    optimizer = Optimizer(model, c)
    batches = iter(torch.from_numpy(case["tokens"]))
    rows = []
    for step in range(c.steps):
        optimizer.clear()
        total = 0.0
        for _ in range(c.grad_accum_steps):
            tokens = next(batches)
            loss = model.loss(tokens[:, :-1], tokens[:, 1:]) / c.grad_accum_steps
            loss.backward()
            total += loss.item()
        norm = optimizer.clip()
        lr = cosine(
            step,
            peak=c.learning_rate,
            floor=c.min_lr_ratio * c.learning_rate,
            warmup=c.warmup_steps,
            steps=c.steps,
        )
        optimizer.step(lr)
        rows.append((total, norm, lr))
    return model, optimizer, np.array(rows)


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_the_published_trainer_is_replayed(case):
    """Loss, gradient norm and learning rate of each step, then logits and every weight."""
    model, _, rows = replay(case)
    assert_close(rows[:, 2], case["lr"], rtol=1e-12, where="lr")
    assert_close(rows[0, 0], case["loss"][0], **TIGHT, where="first loss")
    assert_close(rows[0, 1], case["grad_norm"][0], **TIGHT, where="first norm")
    assert_close(rows[:, 0], case["loss"], **case.tolerance, where="loss")
    assert_close(rows[:, 1], case["grad_norm"], **case.tolerance, where="norm")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(case["tokens"][0, :, :-1]))
    assert_close(logits, case["final_logits"], **case.tolerance, where="logits")
    final = start(case, "final_checkpoint").published()
    for name, view in model.published().items():
        assert_close(view, final[name], **case.tolerance, where=name)


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_moments_are_the_published_ones(case):
    """The optimizer's state in the published numbering, value by value."""
    _, optimizer, _ = replay(case)
    content = torch.load(case.folder / case.meta["final_checkpoint"], weights_only=True)
    ours, theirs = optimizer_state(optimizer), content["optimizer"]
    pairs = [(ours, theirs)]
    if "optimizers" in theirs:
        pairs = list(zip(ours["optimizers"], theirs["optimizers"], strict=True))
    for mine, wanted in pairs:
        groups = [
            ({k: v for k, v in g.items() if k != "lr"}, g["lr"]) for g in wanted["param_groups"]
        ]
        for group, (rest, lr) in zip(mine["param_groups"], groups, strict=True):
            assert group.items() >= rest.items()
            assert group["lr"] == pytest.approx(lr, rel=1e-12)
        assert mine["state"].keys() == wanted["state"].keys()
        for index, slots in wanted["state"].items():
            assert mine["state"][index].keys() == slots.keys()
            for slot, value in slots.items():
                assert_close(
                    mine["state"][index][slot], value, **case.tolerance, where=f"{index}.{slot}"
                )


@pytest.mark.parametrize(("letter", "groups"), [("a", (86, 25)), ("d", (96, 35))])
def test_groups_have_the_published_sizes(letter, groups):
    """Tensors that decay and that do not, of the published A and D; Muon's 82 and 49 of D."""
    from edgert.models.hagi.config import HAGIConfig
    from edgert.models.hagi.model import HAGI

    loop = letter == "d"
    with torch.device("meta"):
        model = HAGI(
            HAGIConfig(
                vocab_size=49152,
                hidden_size=768,
                num_query_heads=12,
                num_kv_heads=4,
                intermediate_size=2048,
                use_loop=loop,
                use_gdr=loop,
            )
        )
    named = model.published()
    decayed = [n for n, t in named.items() if decays(n, t)]
    assert (len(decayed), len(named) - len(decayed)) == groups
    if loop:
        muon = [n for n, t in named.items() if takes_muon(n, t)]
        assert (len(muon), sum(named[n].numel() for n in muon)) == (82, 57_982_976)
        assert len(named) - len(muon) == 49


@pytest.mark.parametrize("name", ["real", "syn_mixed", "syn_zero_first", "syn_overflow", "syn_nan"])
def test_tension_traces_are_exact(name):
    """Each column of the upstream trace, infinite and NaN norms included."""
    told = TRACE.meta["real_trace_config" if name == "real" else "synthetic_trace_config"]
    columns = {key: TRACE[f"{name}_{key}"] for key in ("multiplier", "ema_after", "base_lr", "lr")}
    norms = TRACE[f"{name}_grad_norm"]
    tension = Tension(told["tension_ema_beta"], told["hybrid_clip_lo"], told["hybrid_clip_hi"])
    got: dict[str, list[float]] = {key: [] for key in columns}
    for step, norm in enumerate(norms.tolist()):
        base = cosine(
            step,
            peak=told["lr"],
            floor=0.1 * told["lr"],
            warmup=told["warmup"],
            steps=len(norms),
        )
        multiplier = tension(norm)
        for key, value in zip(
            columns, (multiplier, tension.ema, base, base * multiplier), strict=True
        ):
            got[key].append(value)
    for key, wanted in columns.items():
        finite = np.isfinite(wanted)
        assert_close(np.array(got[key])[finite], wanted[finite], **TRACE.tolerance, where=key)
        np.testing.assert_array_equal(np.array(got[key])[~finite], wanted[~finite])


def test_the_schedule_ends_at_its_floor_and_stays_there():
    args = {"peak": 1.0, "floor": 0.1, "warmup": 2, "steps": 10}
    assert [cosine(s, **args) for s in (0, 1)] == [0.5, 1.0]
    assert cosine(2, **args) == 1.0
    assert cosine(10, **args) == cosine(99, **args) == pytest.approx(0.1)


def test_adamw_is_torchs_own_on_published_tensors():
    """Fused weights or separate ones: elementwise arithmetic does not see the difference."""
    case = next(case for case in TRAINED if case.name == "train_adamw")
    model = start(case)
    c = config(case)
    optimizer = Optimizer(model, c)
    names = model.published()
    plain = {n: torch.nn.Parameter(v.clone()) for n, v in names.items()}
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in plain.items() if decays(n, p)], "weight_decay": 0.1},
            {"params": [p for n, p in plain.items() if not decays(n, p)], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=c.betas,
        eps=c.eps,
    )
    for tokens in torch.from_numpy(case["tokens"][:4]):
        optimizer.clear()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        for name, grad in model.published(lambda p: p.grad).items():
            plain[name].grad = grad.clone()
        optimizer.step(1e-2)
        reference.step()
    for name, view in names.items():  # a few roundings of each of four updates
        assert_close(view, plain[name].detach(), atol=1e-6, rtol=1e-6, where=name)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_orthogonal_makes_singular_values_about_one(shape):
    """Newton-Schulz in bf16, five steps: singular values in the band the method is known for."""
    found = orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 5)
    assert found.shape == shape
    values = torch.linalg.svdvals(found.float())
    assert 0.5 < values.min() < values.max() < 1.3


def test_weights_without_a_gradient_stay_as_they_are():
    """As published: neither moments nor decay for what the loss does not reach."""
    case = next(case for case in cases("hagi") if case.name == "model_d_nogeo")
    model = load_source(case.checkpoint).model.train().requires_grad_(True)
    for kind in ("adamw", "muon"):
        optimizer = Optimizer(model, TrainConfig(steps=1, window=8, batch_size=1, optimizer=kind))
        before = {n: v.clone() for n, v in model.published().items()}
        ids = torch.from_numpy(case["input_ids"])
        optimizer.clear()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step(1e-2)
        still = {n for n, v in model.published().items() if torch.equal(v, before[n])}
        unused = {"gate_scalar", "gate_bivector", "geo_to_scalar.weight", "geo_to_bivector.weight"}
        assert still == {f"gdr.{name}" for name in unused}
        assert not any(key.endswith(tuple(unused)) for key in optimizer.state())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_come_back_as_they_were(kind):
    """The next update is the same, bit for bit, behind a round trip of the state."""
    case = TRAINED[0]
    c = TrainConfig(steps=9, window=17, batch_size=3, optimizer=kind)
    tokens = torch.from_numpy(case["tokens"])

    def update(model, optimizer, batch) -> None:
        optimizer.clear()
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.clip()
        optimizer.step(1e-3)

    one = start(case)
    first = Optimizer(one, c)
    for batch in tokens[:3]:
        update(one, first, batch)
    two = start(case)
    second = Optimizer(two, c)
    for name, view in two.published().items():
        view.copy_(one.published()[name])
    second.restore(3, {k: v.clone() for k, v in first.state().items()}, "here")
    for batch in tokens[3:6]:
        update(one, first, batch)
        update(two, second, batch)
    for name, view in two.published().items():
        assert torch.equal(view, one.published()[name]), name
    states = first.state(), second.state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_state_that_does_not_fit_is_refused_whole():
    """Unknown, wrongly shaped and missing moments in one message."""
    case = TRAINED[0]
    optimizer = Optimizer(start(case), config(case))
    state = {
        "exp_avg.embed.weight": torch.zeros(3),
        "exp_avg.nothing": torch.zeros(1),
        "momentum_buffer.final_norm.weight": torch.zeros(32),
        "exp_avg.final_norm.weight": torch.zeros(32),
    }
    with pytest.raises(BadCheckpoint) as caught:
        optimizer.restore(1, state, "step-1")
    for line in (
        "exp_avg.embed.weight is [3], the weight is [67, 32]",
        "exp_avg.nothing belongs to no weight",
        "momentum_buffer.final_norm.weight belongs to no weight",
        "exp_avg_sq.final_norm.weight is missing",
    ):
        assert line in str(caught.value)


def test_the_average_follows_its_definition():
    """average = d * average + (1 - d) * weight, and a swap that undoes itself bit for bit."""
    model = start(TRAINED[0])
    average = Average(model, 0.9)
    before = model.embed.detach().clone()
    with torch.no_grad():
        model.embed += 1
    average.update()
    assert_close(average.published()["embed.weight"], before + 0.1, atol=1e-6, where="average")
    held = {n: v.clone() for n, v in model.published().items()}
    average.swap()
    assert not torch.equal(model.embed, held["embed.weight"])
    average.swap()
    assert all(torch.equal(v, held[n]) for n, v in model.published().items())


def test_clipping_reports_the_norm_before_it():
    model = start(TRAINED[0])
    optimizer = Optimizer(model, TrainConfig(steps=1, window=8, batch_size=1, grad_clip=1.0))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    count = sum(p.numel() for p in model.parameters())
    assert optimizer.clip() == pytest.approx(2 * math.sqrt(count), rel=1e-6)
    clipped = sum(float((p.grad**2).sum()) for p in model.parameters())
    assert clipped == pytest.approx(1.0, rel=1e-4)


def test_cases_are_small():
    """A case carries what its test reads, and no more."""
    folder: Path = TRACE.folder
    assert sum(p.stat().st_size for p in folder.iterdir()) < 100_000
