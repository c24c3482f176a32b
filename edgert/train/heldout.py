"""How well a model predicts the text it was not trained on, and what that is worth.

score        nats of every token, in the convention of `edgert.evaluate`: the figures of
             `edgert eval` on the exported model are the same
Bigram       what counting pairs of neighbours would give on the same tokens
sensitivity  how much predictions depend on the input: 0 is a model that always says the same
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from edgert.evaluate import windows
from edgert.models.trainable import TextModel as Model
from edgert.train.data import Tokens
from edgert.train.device import device_of

COLLAPSED = 1e-3
"""Below this sensitivity a model is reported as collapsed."""

MAX_LOGITS = 1 << 24  # held at once in evaluation: 64 MiB of float32
MAX_BIGRAM_VOCAB = 1 << 12
_CHUNK = 1 << 22


@dataclass(frozen=True)
class HeldOut:
    """What held-out text cost. Bits per byte are None where tokens have no text.

    loss         nats a token; nll is their sum over `tokens` scored tokens of `bytes` bytes
    bigram       bits per byte of the bigram model on the same tokens; None for large vocabularies
    sensitivity  see `sensitivity`
    """

    loss: float
    nll: float
    tokens: int
    bytes: int | None
    bits_per_byte: float | None
    bigram: float | None
    sensitivity: float
    collapsed: bool
    window: int
    stride: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def logged(self) -> dict[str, Any]:
        return {"heldout": self.loss, "sensitivity": self.sensitivity}

    def said(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.3f} bits/byte"
        return f"{self.loss:.4f}{bits}"

    def card(self) -> list[tuple[str, str]]:
        bits = "" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f} bits per byte, "
        rows = [("held out", f"{bits}{self.loss:.4f} nats a token, {self.tokens:,} tokens")]
        if self.bigram is not None:
            rows.append(("bigram", f"{self.bigram:.4f} bits per byte on the same tokens"))
        felt = f"sensitivity to input {self.sensitivity:.2f} (0: always the same answer)"
        return [*rows, ("responds", felt)]

    def warnings(self) -> list[str]:
        if not self.collapsed:
            return []
        return [
            f"collapsed: predictions hardly depend on the input (sensitivity "
            f"{self.sensitivity:.1e}, at least {COLLAPSED:g} is expected)"
        ]


@torch.no_grad()
def score(model: Model, ids: NDArray[np.int64], window: int, stride: int) -> NDArray[np.float64]:
    """-ln p of each token [T] in nats, given what its window holds before it; NaN if not scored.

    Which tokens are scored, and behind which context, `edgert.evaluate` says.
    """
    costs = np.full(len(ids), np.nan)
    plan = list(windows(len(ids), window, stride))
    rows = max(1, MAX_LOGITS // (window * model.config.vocab_size))
    whole = [place for place in plan if place[2] - place[0] == window]
    for at in range(0, len(whole), rows):
        _score(model, ids, whole[at : at + rows], costs)
    for place in plan:
        if place[2] - place[0] != window:
            _score(model, ids, [place], costs)
    return costs


def _score(
    model: Model,
    ids: NDArray[np.int64],
    places: list[tuple[int, int, int]],
    costs: NDArray[np.float64],
) -> None:
    """Windows of one length, at once."""
    batch = torch.from_numpy(np.stack([ids[begin:end] for begin, _, end in places]))
    batch = batch.to(device_of(model))
    logits = model(batch)[:, :-1].float()
    found = F.cross_entropy(logits.flatten(0, 1).double(), batch[:, 1:].flatten(), reduction="none")
    rows = found.view(len(places), -1).cpu().numpy()
    for row, (begin, context, end) in zip(rows, places, strict=True):
        first = max(1, context)
        costs[begin + first : end] = row[first - 1 :]


@torch.no_grad()
def sensitivity(model: Model, ids: NDArray[np.int64], window: int) -> float:
    """Mean total-variation distance, 0 to 1, between next-token predictions behind different
    texts and their mean: up to 64 windows spread over `ids`."""
    count = min(64, max(2, len(ids) // window))
    length = min(window, len(ids) - 1)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    batch = torch.from_numpy(np.stack([ids[s : s + length] for s in starts])).to(device_of(model))
    rows = max(1, MAX_LOGITS // (length * model.config.vocab_size))
    last = torch.cat([model(part)[:, -1].float().softmax(-1) for part in batch.split(rows)])
    return float((last - last.mean(0)).abs().sum(-1).mean() / 2)


class Bigram:
    """Counts of neighbours in the training shards, smoothed by Witten and Bell's rule.

    p(b | a) = (count(a b) + kinds(a) * p(b)) / (count(a) + kinds(a)), kinds(a) the number of
    different tokens seen behind a, and p(b) the share of b with one added to each count.
    Source: Witten and Bell, IEEE Transactions on Information Theory 37(4), 1991, method C
    """

    def __init__(self, shards: list[Tokens], vocab: int) -> None:
        pairs = np.zeros(vocab * vocab, np.int64)
        singles = np.ones(vocab, np.float64)
        for shard in shards:
            for start in range(0, len(shard), _CHUNK):
                part = shard[start : start + _CHUNK + 1].astype(np.int64)
                pairs += np.bincount(part[:-1] * vocab + part[1:], minlength=vocab * vocab)
                singles += np.bincount(part[:_CHUNK], minlength=vocab)
        self.pairs = pairs.reshape(vocab, vocab)
        self.total = self.pairs.sum(1).astype(np.float64)
        self.kinds = np.maximum((self.pairs > 0).sum(1), 1).astype(np.float64)
        self.share = singles / singles.sum()

    def costs(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """-ln p of each token but the first: int64 [T] -> float64 [T - 1]."""
        before, here = ids[:-1], ids[1:]
        kinds = self.kinds[before]
        chance = (self.pairs[before, here] + kinds * self.share[here]) / (
            self.total[before] + kinds
        )
        return -np.log(chance)


def summary(
    costs: NDArray[np.float64],
    ids: NDArray[np.int64],
    lengths: NDArray[np.int64] | None,
    bigram: Bigram | None,
    felt: float,
    shape: tuple[int, int],
) -> HeldOut:
    """Costs of tokens -> figures. `lengths` are bytes of text by id [V]; `shape` window, stride."""
    scored = ~np.isnan(costs)
    nll = float(costs[scored].sum())
    nbytes = None if lengths is None else int(lengths[ids[scored]].sum()) or None
    baseline = None
    if bigram is not None and nbytes:
        baseline = float(bigram.costs(ids)[scored[1:]].sum()) / math.log(2) / nbytes
    return HeldOut(
        loss=nll / int(scored.sum()),
        nll=nll,
        tokens=int(scored.sum()),
        bytes=nbytes,
        bits_per_byte=nll / math.log(2) / nbytes if nbytes else None,
        bigram=baseline,
        sensitivity=felt,
        collapsed=felt < COLLAPSED,
        window=shape[0],
        stride=shape[1],
    )
