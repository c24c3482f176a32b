"""Perplexity of the demo's real model: equal to what `transformers` gives on the same tokens."""

from __future__ import annotations

import math
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from smollm2 import NEEDS_MODEL, exported, published

import edgert
from edgert.evaluate import perplexity

pytestmark = NEEDS_MODEL

WINDOW, STRIDE, TOKENS = 512, 256, 900


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return exported(tmp_path_factory)


@pytest.fixture(scope="module")
def text() -> str:
    """English prose about Python that comes with it, in the order of its headings."""
    topics = pydoc_data.topics.topics
    return "".join(topics[name] for name in sorted(topics))[:20_000]


def guide(model, ids: list[int]) -> tuple[float, float, int]:
    """The loop of transformers' guide on perplexity, as it is printed there, but for the device.

    Returns its perplexity (a mean of windows), and beside it the sum over tokens in float64 with
    the number of them: each token that has a label and something before it.
    """
    input_ids = torch.tensor([ids])
    nll_sum, n_tokens, exact, exact_tokens, prev_end_loc = 0.0, 0, 0.0, 0, 0
    for begin_loc in range(0, len(ids), STRIDE):
        end_loc = min(begin_loc + WINDOW, len(ids))
        trg_len = end_loc - prev_end_loc
        window = input_ids[:, begin_loc:end_loc]
        target_ids = window.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            outputs = model(window, labels=target_ids)
        num_loss_tokens = int((target_ids != -100).sum()) - 1
        nll_sum += float(outputs.loss) * num_loss_tokens
        n_tokens += num_loss_tokens

        logits = outputs.logits[0, :-1].double()
        labels = target_ids[0, 1:]
        exact += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        exact_tokens += int((labels != -100).sum())
        prev_end_loc = end_loc
        if end_loc == len(ids):
            break
    return math.exp(nll_sum / n_tokens), exact, exact_tokens


def test_perplexity_equals_transformers(bundle, text) -> None:
    """1e-3 of both numbers as the guide has them; 1e-5 where each token counts alike, which is
    what is left of two frameworks' float32 once it is averaged over 900 tokens."""
    with edgert.load(bundle) as model:
        assert model.tokenizer
        ids = model.tokenizer.encode(text, special=False)[:TOKENS]
        nbytes = len(model.tokenizer.decode(ids[1:], skip_special=False).encode())
        got = perplexity(model, text, window=WINDOW, stride=STRIDE, limit=TOKENS)
    assert (got.tokens, got.read, got.bytes) == (TOKENS - 1, TOKENS, nbytes)
    as_printed, exact, tokens = guide(published(), ids)
    assert got.perplexity == pytest.approx(as_printed, rel=1e-3)
    assert tokens == got.tokens
    assert got.nll == pytest.approx(exact, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(exact / tokens), rel=1e-4)
    assert got.bits_per_byte == pytest.approx(exact / math.log(2) / nbytes, rel=1e-3)
    assert 2 < got.perplexity < 50  # a language model at work, not a uniform one
