"""Comparing what graphs compute with eager torch, and what a gate found: the parity report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from edgert.bundle import Bundle
from edgert.errors import GateFailed

TOLERANCE = {"fp32": 3e-5, "fp16": 3e-5, "int8": 3e-5, "int4": 3e-5}
"""Largest difference, as a share of the largest magnitude in the compared tensor (at least 1).

fp32: two correct implementations that sum in different orders part by about 1e-6 of the magnitude
per block, a few 1e-5 after thirty; a wrong weight or position moves whole per cents.
fp16, int8, int4: the same, since eager torch then computes with the values that are stored, and the
graphs with activations in float32.
"""

ROUNDED = {"float16": 0.01, "int8": 0.25}
"""The same where the graphs round activations to fewer bits, as they are shipped.

Not what proves them: the same graphs have passed the tolerance above with float32 activations. It
catches kernels that are wrong on this processor, and values that overflow. Rounding to int8 moves
each product by some tenths of a per cent of the largest, and a chain of thirty blocks by several
per cent; to float16 by a twentieth of a per cent, and thirty blocks by three tenths of one. What
that costs is measured on a text (accuracy.json).
"""


@dataclass
class Check:
    """One way of running one variant. `worst` is the largest difference as a share of the limit.

    activations    float32, or int8 or float16 where the variant rounds them and its exact twin has
                   passed; "cpu": what becomes of float16 in the CPU's kernels
    paths_max_abs  how far these logits are from those of the same graph's `prefill`
    """

    variant: str
    name: str
    activations: str = "float32"
    logits_max_abs: float = 0.0
    states_max_abs: float | None = None  # None: no states were compared
    paths_max_abs: float = 0.0
    worst_share: float = 0.0
    worst_name: str = ""
    top1_agree: int = 0
    top1_total: int = 0
    free_running: dict[str, Any] | None = None  # what its limits grow with, and by how much


@dataclass
class Verdict:
    """What the gate proved. `to_json` is the content of a bundle's parity.json."""

    inputs: dict[str, int]  # what was run: how it was drawn, and its sizes
    checks: list[Check] = field(default_factory=list)

    def to_json(self, bundle: Bundle) -> dict[str, Any]:
        import onnxruntime

        precisions = {v.precision for v in bundle.manifest.variants.values()}
        tolerance = {name: limit for name, limit in TOLERANCE.items() if name in precisions}
        for kind in ROUNDED:
            if any(check.activations == kind for check in self.checks):
                tolerance[f"activations in {kind}"] = ROUNDED[kind]
        return {
            "format_version": 1,
            "verdict": "pass",
            "model_id": bundle.manifest.model_id,
            "variants": {n: v.variant_id for n, v in bundle.manifest.variants.items()},
            "tolerance": tolerance,
            "inputs": self.inputs,
            "truth": f"eager torch {torch.__version__.split('+')[0]}",
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "checks": [vars(check) for check in self.checks],
        }


class Comparison:
    """Collects one check's differences; raises at the first tensor beyond its limit."""

    def __init__(self, check: Check, tolerance: float) -> None:
        self.check, self.tolerance = check, tolerance

    def compare(
        self,
        kind: str,
        name: str,
        got: NDArray[Any],
        want: NDArray[Any],
        at: str,
        slack: float = 1.0,
    ) -> None:
        """Raise GateFailed beyond the tolerance, `slack` times it."""
        limit = slack * self.tolerance * max(1.0, float(np.abs(want).max()))
        with np.errstate(invalid="ignore"):
            delta = np.abs(got.astype(np.float64) - want)
        delta = np.where(np.isnan(delta), np.inf, delta)
        index = np.unravel_index(int(delta.argmax()), delta.shape)
        worst = float(delta[index])
        check = self.check
        if worst > limit:
            raise self._failure(
                f"{kind} '{name}' differs from eager torch: {got[index]:.6g} instead of "
                f"{want[index]:.6g} (difference {worst:.3g}, limit {limit:.3g})",
                f"{at}, index {tuple(int(i) for i in index)}",
            )
        if worst / limit > check.worst_share:
            check.worst_share, check.worst_name = worst / limit, name
        if kind == "state":
            check.states_max_abs = max(check.states_max_abs or 0.0, worst)
        else:
            check.logits_max_abs = max(check.logits_max_abs, worst)

    def best(
        self, tokens: NDArray[Any], logits: NDArray[np.float32], at: str, slack: float = 1.0
    ) -> None:
        """Ids [n] are right or wrong: no tolerance applies, but where the best of `logits` [n, V]
        leads by less than two limits."""
        want = logits.argmax(-1)
        limit = slack * self.tolerance * max(1.0, float(np.abs(logits).max()))
        top = np.sort(logits, axis=-1)
        agree = tokens == want
        fine = agree | (top[:, -1] - top[:, -2] <= 2 * limit)
        self.check.top1_agree += int(agree.sum())
        self.check.top1_total += len(agree)
        if not fine.all():
            index = int(fine.argmin())
            raise self._failure(
                f"result 'token' differs from eager torch: {tokens[index]} instead of "
                f"{want[index]}",
                f"{at}, index ({index},)",
            )

    def _failure(self, what: str, at: str) -> GateFailed:
        return GateFailed(
            what,
            where=f"variant {self.check.variant}, check '{self.check.name}', {at}",
            do="the exported graph does not compute what the model computes: "
            "do not use it, and report how it was made",
        )


Checks: TypeAlias = Iterator[tuple[str, Callable[[Comparison], None]]]
"""The checks of one variant, by name."""
