"""Scales tuned together, and the text that they are tuned on: what the model says itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_quant_mixed import divergence, runner, said
from tiny_decoder import decoder, imported

from edgert.errors import UsageError
from edgert.export.nbits import Scheme, scheme_of
from edgert.export.quantize import Quantizer
from edgert.export.spoken import ROUNDS, ROWS, spoken
from edgert.export.tuning import tune
from edgert.export.write import ExportOptions, export_bundle
from edgert.models.decoder import Decoder

COARSE = Scheme(4, block=32, tuned=True)


@pytest.fixture
def model() -> Decoder:
    """Small logits, so that what it draws from is far from certain."""
    sizes = {"hidden_size": 64, "num_layers": 2, "head_size": 16, "intermediate_size": 128}
    found = decoder(vocab_size=96, **sizes)
    found.embed.mul_(0.1)
    return found


def test_tuning_brings_the_model_nearer_on_what_it_did_not_read(model) -> None:
    """Codes stay, weights come back, and no parameter is left asking for gradients.

    Errors of random weights have little in common that a scale could make up for: by this text and
    rate the divergence falls by 4.5 %. Untuned, or tuned the wrong way, it would not fall at all.
    """
    run, unread = runner(model), said(model, 12, seed=1)
    quantizer = Quantizer(model, COARSE)
    quantizer.prepare_for(run, unread[0])
    assert len(quantizer.made) == 9  # the tied head, too
    weights = {name: p.clone() for name, p in model.named_parameters()}
    codes = {name: q.codes for name, (_, q) in quantizer.made.items()}
    truth = [run(ids) for ids in unread]

    def away() -> float:
        with quantizer.applied():
            pairs = zip(truth, unread, strict=True)
            return float(np.mean([divergence(want, run(ids)) for want, ids in pairs]))

    before = away()
    steps: list[int] = []
    tune(quantizer, run, said(model, 48), steps.append)
    assert sum(steps) == 48
    assert away() < 0.97 * before
    for name, (_, quantized) in quantizer.made.items():
        assert np.array_equal(quantized.codes, codes[name])
        assert (quantized.scales != 0).any()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert not parameter.requires_grad


def test_a_model_that_fails_in_between_is_as_it_was(model) -> None:
    run = runner(model)
    quantizer = Quantizer(model, COARSE)
    quantizer.prepare_for(run, said(model, 1)[0])
    weights = {name: p.clone() for name, p in model.named_parameters()}
    scales = {name: q.scales.copy() for name, (_, q) in quantizer.made.items()}

    def stop(steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(quantizer, run, said(model, 2), stop)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert not parameter.requires_grad
    assert all(np.array_equal(q.scales, scales[n]) for n, (_, q) in quantizer.made.items())


def test_a_model_says_what_it_holds_likely(model, tmp_path) -> None:
    """The surprise of what it said is, on average, the entropy of what it could have said."""
    out = export_bundle(imported(model), tmp_path / "tiny", ExportOptions(lowerings=("ort",))).path
    windows = spoken(out, "fp32-ort")
    assert len(windows) == ROUNDS * ROWS
    assert len({ids.tobytes() for ids in windows}) == len(windows)
    assert all(np.array_equal(a, b) for a, b in zip(windows, spoken(out, "fp32-ort"), strict=True))
    run = runner(model)
    gaps = []
    for ids in windows:
        chances = run(ids)[:-1].double().log_softmax(-1)
        surprise = -chances[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]
        gaps.append(surprise + (chances.exp() * chances).sum(-1))
    every = torch.cat(gaps)
    error = float(every.std() / len(every) ** 0.5)
    assert error < 0.02
    assert abs(float(every.mean())) < 4 * error


def test_int4_is_tuned_unless_a_recipe_says_otherwise() -> None:
    assert scheme_of("int4").tuned
    assert not scheme_of("int8").tuned
    assert not scheme_of("int4", {"tuned": False}).tuned
    with pytest.raises(UsageError, match="tuned"):
        scheme_of("int4", {"tuned": 1})
