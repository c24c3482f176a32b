"""Which linear maps keep 8 bits: what rounding one costs, foreseen; as few as hold a budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_decoder import decoder

from edgert.export.mixed import MARGIN, harms, widen
from edgert.export.nbits import Scheme, scheme_of
from edgert.export.quantize import Quantizer

TOKENS = 48
COARSE = Scheme(4, block=16, mixed=True)


@pytest.fixture
def model() -> torch.nn.Module:
    """Small logits, so that what it draws from is far from certain."""
    found = decoder(hidden_size=64, num_layers=2, head_size=16, intermediate_size=128)
    found.embed.mul_(0.1)
    return found


def runner(model):
    return lambda ids: model(torch.from_numpy(ids[None]), model.eager(len(ids)))[0]


def said(model, count: int, seed: int = 0) -> list[np.ndarray]:
    """Windows that the model itself would write: no other weights suit them better."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (count, 1), generator=generator)
    for _ in range(TOKENS - 1):
        chances = model(ids, model.eager(ids.shape[1]))[:, -1].softmax(-1)
        ids = torch.cat((ids, torch.multinomial(chances, 1, generator=generator)), 1)
    return list(ids.numpy())


def nll(logits: torch.Tensor, ids: np.ndarray) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:])))


def divergence(want: torch.Tensor, got: torch.Tensor) -> float:
    p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_harm_is_the_divergence_that_rounding_one_map_brings(model) -> None:
    """Foreseen from gradients at one draw a token, so within a factor; the order mostly holds."""
    windows, run = said(model, 24), runner(model)
    quantizer = Quantizer(model, COARSE)
    maps = [name for name, p in model.named_parameters() if p.ndim == 2 and name != "embed"]
    quantizer.prepare(maps)
    foreseen = harms(quantizer, run, windows)
    assert list(foreseen) == maps
    assert not any(parameter.requires_grad for parameter in model.parameters())
    truth = [run(ids) for ids in windows]
    measured = {}
    for name in maps:
        alone = Quantizer(model, COARSE)
        alone.prepare([name])
        with alone.applied():
            pairs = zip(truth, windows, strict=True)
            measured[name] = np.mean([divergence(want, run(ids)) for want, ids in pairs])
    ratios = [foreseen[name] / measured[name] for name in maps]
    assert min(ratios) > 0.5
    assert max(ratios) < 2
    orders = (np.argsort([kind[name] for name in maps]) for kind in (foreseen, measured))
    ranks = [np.argsort(order) for order in orders]
    assert np.corrcoef(*ranks)[0, 1] > 0.7


def test_as_few_maps_as_hold_the_budget(model) -> None:
    """Half of what rounding all costs is allowed: some keep 8 bits, and one less does not do."""
    windows, run = said(model, 24), runner(model)
    narrow = widen(Quantizer(model, COARSE), run, windows, budget=100.0)["ratio"]
    assert narrow > 1.005
    goal = 1 + (narrow - 1) / 2
    quantizer = Quantizer(model, COARSE)
    found = widen(quantizer, run, windows, budget=1 + (goal - 1) / MARGIN)
    assert found["narrow_ratio"] == narrow
    assert found["ratio"] <= goal
    assert found["matrices"] == 8
    names = found["names"]
    assert 0 < len(names) < 8
    assert {n for n, (_, q) in quantizer.made.items() if q.bits == 8} == set(names)

    def ratio(wide: list[str]) -> float:
        quantizer.widen(wide)
        with quantizer.applied():
            lost = [nll(run(ids), ids) for ids in windows]
        return float(np.exp(np.mean(lost) - np.mean([nll(run(ids), ids) for ids in windows])))

    assert ratio(names) == pytest.approx(found["ratio"], abs=1e-6)
    assert ratio(names[:-1]) > goal


def test_none_where_none_is_needed_and_all_where_all_are(model) -> None:
    windows, run = said(model, 4), runner(model)
    assert widen(Quantizer(model, COARSE), run, windows, budget=100.0)["names"] == []
    found = widen(Quantizer(model, COARSE), run, windows, budget=0.5)
    assert len(found["names"]) == found["matrices"] == 8


def test_int4_is_mixed_unless_a_recipe_says_otherwise() -> None:
    assert scheme_of("int4").mixed
    assert not scheme_of("int8").mixed
    assert not scheme_of("int4", {"mixed": False}).mixed
