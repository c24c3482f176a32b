"""Whether all ways to compute the same thing agree on this device.

Within a variant: the whole sequence at once against token by token, or all puzzles together against
each alone. Between variants of the same numbers: another lowering, an unrolled loop. Between
precisions: how far the output distributions are apart. What is wrong in all variants alike is not
seen: the bundle's identity in the report says which bundle it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.bench.verify import margin_of
from edgert.evaluate import divergence
from edgert.migrating import bound_of
from edgert.model import Model
from edgert.selfcheck.report import Check, verdict
from edgert.selfcheck.subject import Subject

EXACT = ("fp32", "fp16")
"""Precisions whose variants agree but for the order of sums."""

Logits = NDArray[np.float32]  # [T, V]; of puzzles [iterations * n * S, V]


def parity(subject: Subject) -> Check:
    """Raises what loading raises."""
    manifest = subject.bundle.manifest
    seen: dict[str, Logits] = {}
    wrong: list[str] = []
    rows: list[dict[str, Any]] = []
    answers: dict[str, Any] = {}
    for variant in subject.variants:
        if subject.solves and subject.unrolled(variant):
            continue
        with subject.model(variant) as model:
            whole, parts = _both_ways(model, subject)
            margin, bound = margin_of(model), bound_of(model)
        if not subject.solves:
            answers[variant] = _best(whole)
        # Weights of few bits are multiplied by rounded activations, by other kernels for one token
        # than for many: their logits are apart by more than a rounding, and compared in nats.
        exact = manifest.variants[variant].precision in EXACT
        pairs = [(f"{variant}, {_apart(subject)}", parts, exact)]
        alike = next((name for name in seen if name in manifest.like(variant)), None)
        other = alike or next(iter(seen), None)
        if other is not None:
            pairs.append((other, seen[other], exact and alike is not None))
        for name, logits, same_numbers in pairs:
            row = _compare(whole, logits)
            limit = {"margin": margin} if same_numbers else {"max_kl": bound}
            rows.append({"variant": variant, "against": name, **row, **limit})
            key = "max_abs" if same_numbers else "kl"
            if row[key] is None or not row[key] <= (margin if same_numbers else bound):
                wrong.append(_differs(rows[-1], key))
        seen.setdefault(variant, whole)
        if alike is not None:
            del seen[variant]  # one of each kind is kept
    if not rows:
        return Check("parity", "skipped", "no variant that this device runs has a stepped loop")
    found = [r["max_abs"] for r in rows if "margin" in r and r["max_abs"] is not None]
    worst = max(found, default=math.nan)
    said = f"{len(rows)} comparisons, max |Δlogit| {worst:.1e}"
    drifts = [r["kl"] for r in rows if "max_kl" in r and r["kl"] is not None]
    if drifts:
        said += f", between precisions {max(drifts):.2g} nats"
    names = {row["variant"] for row in rows}
    if len(names) == 1:
        said += f"; {next(iter(names))} only: no other variant runs here"
    return verdict("parity", wrong, said, {"comparisons": rows, "answers": answers})


def _best(logits: Logits) -> dict[str, list[Any]]:
    """Each row's best token, and its lead over the second, in logits; 0 without a number."""
    second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
    lead = np.nan_to_num(first - second, nan=0.0, posinf=0.0, neginf=0.0)
    return {"best": logits.argmax(-1).tolist(), "lead": [round(float(x), 6) for x in lead]}


def _apart(subject: Subject) -> str:
    return "one by one" if subject.solves else "token by token"


def _both_ways(model: Model, subject: Subject) -> tuple[Logits, Logits]:
    """All at once, and one by one."""
    inputs = subject.inputs
    if subject.solves:
        alone = [_steps(model, inputs[i : i + 1]) for i in range(len(inputs))]
        return _flat(_steps(model, inputs)), _flat(np.concatenate(alone, axis=1))
    return model.logits(inputs[None])[0], np.stack(list(_stepped(model, inputs)))


def _steps(model: Model, puzzles: NDArray[np.int64]) -> NDArray[np.float32]:
    """The logits behind each iteration, [iterations, n, S, V]."""
    return np.stack([step.outputs["logits"] for step in model.trace(puzzles)])


def _flat(logits: NDArray[np.float32]) -> Logits:
    return logits.reshape(-1, logits.shape[-1])


def _stepped(model: Model, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    execution = model.runner.open(tokens=len(ids))
    try:
        for token in ids.tolist():
            yield execution.step(token).logits[0, 0].copy()
    finally:
        execution.close()


def _compare(a: Logits, b: Logits) -> dict[str, Any]:
    """Largest difference and where; mean KL of b from a in nats; share of equal best tokens.
    Figures that are no numbers are None."""
    if a.shape != b.shape:
        return {"max_abs": None, "at": None, "kl": None, "top1": 0.0}
    apart = np.abs(a - b).max(axis=-1)
    at = int(np.argmax(np.where(np.isnan(apart), np.inf, apart)))
    with np.errstate(all="ignore"):
        kl = float(divergence(b, a).mean())
    return {
        "max_abs": float(apart[at]) if np.isfinite(apart[at]) else None,
        "at": at,
        "kl": max(0.0, kl) if np.isfinite(kl) else None,
        "top1": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


def _differs(row: dict[str, Any], key: str) -> str:
    value, limit = row[key], row["margin" if key == "max_abs" else "max_kl"]
    what = "max |Δlogit|" if key == "max_abs" else "drift in nats"
    number = "not a number" if value is None else f"{value:.3g}"
    where = f" at row {row['at']}" if key == "max_abs" else ""
    return f"{row['variant']} against {row['against']}: {what} {number}{where}, bound {limit:.3g}"
