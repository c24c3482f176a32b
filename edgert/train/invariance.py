"""Whether a model answers what it is asked: the published collapse was to one and the same answer.

Shapes  B puzzles, S cells, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.tasks.puzzleset import IGNORED

Logits = Callable[[NDArray[np.int32], NDArray[np.int32]], NDArray[np.float32]]
"""Inputs int [B, S] and puzzle identifiers int [B] -> logits [B, S, V] of the last turn."""

LEAST = {
    "variance_share": 0.02,
    "diversity": 0.25,
    "shuffle_gap": 0.02,
    "baseline_gap": 0.02,
    "response": 1e-2,
    "probes": 2.0,
}
WORDS = {
    "variance_share": "share of the logits' variance that is between puzzles",
    "diversity": "differences between answers, beside those between labels",
    "shuffle_gap": "right cells beyond those of the answer to another puzzle",
    "baseline_gap": "right cells beyond those of the best constant answer",
    "classes": "different tokens in the answers",
    "response": "change of a logit when one given cell changes",
    "probes": "different answers to five senseless inputs",
}


@dataclass(frozen=True)
class Sensitivity:
    """What the check measures; `failed` names what is below its least value.

    variance_share  of logits: mean over cells of the variance between puzzles, by that of all
    diversity       mean share of cells in which two answers differ, by that of two labels; None
                    where the labels do not differ
    shuffle_gap     cell accuracy less that beside the next puzzle's labels: 0 of a constant answer
    baseline_gap    cell accuracy less that of each cell's most frequent label
    classes         different tokens that are predicted, of `classes_in_labels`
    response        median over puzzles of the largest change of a logit when a cell changes
    probes          different answers to padding, blanks, a ramp and two random grids
    """

    variance_share: float
    diversity: float | None
    shuffle_gap: float
    baseline_gap: float
    classes: int
    classes_in_labels: int
    response: float
    probes: int
    failed: tuple[str, ...] = ()

    def said(self) -> str:
        return (
            f"{self.shuffle_gap:+.1%} of cells beside the answers to other puzzles, "
            f"{self.baseline_gap:+.1%} beside the constant one"
        )

    def why(self) -> str:
        return ", ".join(f"{WORDS[name]}: {getattr(self, name):.2g}" for name in self.failed)


def sensitivity(
    logits: Logits,
    out: NDArray[np.float32],
    inputs: NDArray[np.int32],
    labels: NDArray[np.int64],
    ids: NDArray[np.int32],
    vocab: int,
) -> Sensitivity:
    """The check on at least two different puzzles, to which `out` is what the model said. What is
    drawn at random always is the same."""
    rng = np.random.default_rng(0)
    answers, known = out.argmax(-1), labels != IGNORED
    centred = out.astype(np.float64) - out.mean()
    whole = float((centred**2).mean())
    share = float(centred.var(axis=0).mean()) / whole if whole else 0.0
    between = _distance(labels, known)

    def right(shift: int) -> float:
        return float((np.roll(answers, shift, axis=0) == labels)[known].mean())

    constant = (constant_answer(labels, vocab) == labels)[known].mean()
    changed = inputs.copy()
    for row in changed:
        cell = int(rng.integers(row.size))
        row[cell] = (row[cell] + int(rng.integers(1, vocab))) % vocab
    moved = np.abs(logits(changed, ids) - out).reshape(len(out), -1).max(1)
    values: dict[str, Any] = {
        "variance_share": share,
        "diversity": _distance(answers, known) / between if between else None,
        "shuffle_gap": right(0) - right(1),
        "baseline_gap": right(0) - float(constant),
        "classes": len(np.unique(answers[known])),
        "classes_in_labels": len(np.unique(labels[known])),
        "response": float(np.median(moved)),
        "probes": _probes(logits, inputs.shape[1], ids, vocab, rng),
    }
    least = LEAST | {"classes": min(3, values["classes_in_labels"])}
    failed = [name for name in WORDS if values[name] is not None and values[name] < least[name]]
    return Sensitivity(**values, failed=tuple(failed))


def constant_answer(labels: NDArray[np.int64], vocab: int) -> NDArray[np.int64]:
    """Each cell's most frequent label: int [B, S] -> [S]."""
    counts = np.stack([(labels == token).sum(0) for token in range(vocab)])
    return counts.argmax(0)


def _distance(grids: NDArray[Any], known: NDArray[np.bool_]) -> float:
    """Mean share of valid cells in which a grid differs from the others of the batch."""
    shares = [
        float(((grids != np.roll(grids, shift, axis=0)) & known)[known].mean())
        for shift in range(1, min(len(grids), 9))
    ]
    return float(np.mean(shares)) if shares else 0.0


def _probes(
    logits: Logits, cells: int, ids: NDArray[np.int32], vocab: int, rng: np.random.Generator
) -> int:
    ramp = np.arange(cells) % vocab
    probes = np.stack(
        [np.zeros(cells), np.ones(cells), ramp, *rng.integers(0, vocab, (2, cells))]
    ).astype(np.int32)
    answers = logits(probes, np.resize(ids, len(probes))).argmax(-1)
    return len({answer.tobytes() for answer in answers})
