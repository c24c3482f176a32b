"""What few bits cost: a quantized model against the same model in float32, on a text.

    kl          the mean divergence of its next-token distribution from float32's, in nats
    top1        share of positions at which both have the same best token
    perplexity  of the text in both, and their ratio, with the standard error of that

Windows are spread over the text; each starts with an empty state, and all its positions but the
first are scored. The text is the standard library's documentation topics (the model may have been
trained on them: the ratio asks for no unseen text), unless another is given.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.evaluate import cross_entropy
from edgert.models.importers import Imported
from edgert.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer

REPORT = "accuracy.json"
TOKENS, WINDOW = 4096, 512
CHARACTERS = 200_000
"""Of the text: what is beyond is not read."""

BUDGET = {"int8": 1.005, "int4": 1.03}
"""Largest perplexity ratio of a precision that is meant to be used."""

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Accuracy:
    """One variant against float32 on `tokens` scored tokens."""

    tokens: int
    kl: float
    top1: float
    perplexity: float
    perplexity_fp32: float
    ratio: float
    ratio_error: float

    def within(self, precision: str) -> bool:
        return self.ratio <= BUDGET[precision]


class Sample:
    """Windows of token ids [T] of a text, and where they come from."""

    def __init__(self, windows: list[NDArray[np.int64]], origin: dict[str, Any]) -> None:
        self.windows, self.origin = windows, origin


def tokenizer_of(source: Imported) -> Tokenizer | None:
    if source.tokenizer_json is not None:
        return HFTokenizer(source.tokenizer_json.encode())
    return None if source.byte_offset is None else ByteTokenizer(source.byte_offset)


def topics() -> str:
    """The standard library's documentation topics: English of about half a megabyte."""
    found: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(text for _, text in sorted(found.items()))


def sample(
    tokenizer: Tokenizer,
    context: int,
    text: str | None = None,
    tokens: int = TOKENS,
    offset: float = 0.5,
) -> Sample:
    """Windows of together `tokens` tokens, evenly over the text (default: `topics`).

    offset  where in its stretch of the text a window lies: different ones do not overlap
    """
    chosen = (topics() if text is None else text)[:CHARACTERS]
    ids = np.asarray(tokenizer.encode(chosen, special=False), np.int64)
    window = min(WINDOW, context, len(ids))
    count = max(1, min(tokens, len(ids)) // window)
    stretch = len(ids) // count
    starts = [i * stretch + int((stretch - window) * offset) for i in range(count)]
    origin = {
        "text": "pydoc topics" if text is None else "given",
        "sha256": hashlib.sha256(chosen.encode()).hexdigest(),
        "python": platform.python_version(),
        "window": window,
        "windows": count,
    }
    return Sample([ids[start : start + window] for start in starts], origin)


def compare(pairs: Iterator[tuple[NDArray[np.int64], Logits, Logits]]) -> Accuracy:
    """Windows of ids [T] with the logits [T, V] of float32 and of the quantized model."""
    kl: list[NDArray[np.float64]] = []
    costs: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    agree: list[NDArray[np.bool_]] = []
    for ids, want, got in pairs:
        want, got, following = want[:-1], got[:-1], ids[1:]
        costs.append((cross_entropy(want, following), cross_entropy(got, following)))
        kl.append(divergence(want, got))
        agree.append(want.argmax(-1) == got.argmax(-1))
    truth, found = (np.concatenate(part) for part in zip(*costs, strict=True))
    difference = found - truth
    ratio = math.exp(difference.mean())
    return Accuracy(
        tokens=len(truth),
        kl=float(np.concatenate(kl).mean()),
        top1=float(np.concatenate(agree).mean()),
        perplexity=math.exp(found.mean()),
        perplexity_fp32=math.exp(truth.mean()),
        ratio=ratio,
        ratio_error=float(ratio * difference.std() / math.sqrt(len(difference))),
    )


def divergence(want: Logits, got: Logits) -> NDArray[np.float64]:
    """KL(softmax(want) || softmax(got)) per row of [T, V], in nats."""
    p, q = _log_softmax(want), _log_softmax(got)
    found: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return found


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


Scorer = Callable[[NDArray[np.int64]], Logits]
"""ids [T] -> logits [T, V]."""


def measure(windows: Sample, truth: Scorer, found: Scorer) -> Accuracy:
    return compare((ids, truth(ids), found(ids)) for ids in windows.windows)


def to_json(accuracy: Accuracy) -> dict[str, Any]:
    return asdict(accuracy)
