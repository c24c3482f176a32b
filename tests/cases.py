"""Cases from data: folders of arrays and metadata with what a published implementation computes.

A case is tests/cases/<family>/<case>/ with `meta.json` (upstream repository and commit, config,
tolerance, shape legend) and mostly `io.npz`. Folders of the same layout below $EDGERT_EXTRA_CASES
are used too; a case of this repository wins over one of the same family and name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent / "cases"


@dataclass(frozen=True)
class Case:
    """One folder. `case["logits"]` is an array of its `io.npz`."""

    family: str
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    @cached_property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        with np.load(self.folder / "io.npz", allow_pickle=False) as archive:
            return dict(archive)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.arrays[name]

    @property
    def checkpoint(self) -> Path:
        """The published-format file that the arrays were computed with."""
        return self.folder / self.meta["checkpoint"]

    @property
    def tolerance(self) -> dict[str, float]:
        """atol and rtol for `assert_close`; both 0 where the case says "exact"."""
        stated = self.meta["tolerance"]
        if stated == "exact":
            return {"atol": 0.0, "rtol": 0.0}
        return {key: float(stated[key]) for key in ("atol", "rtol")}


def cases(family: str, wanted: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """The cases of a family for which `wanted` is true, by name; never an empty list."""
    roots = [HERE]
    if extra := os.environ.get("EDGERT_EXTRA_CASES"):
        roots.append(Path(extra))
    found: dict[str, Case] = {}
    for root in roots:
        for meta in sorted((root / family).glob("*/meta.json")):
            found.setdefault(meta.parent.name, Case(family, meta.parent))
    chosen = [case for _, case in sorted(found.items()) if wanted(case)]
    if not chosen:  # a parametrised test without cases would pass unseen
        raise LookupError(f"no case of the family {family!r} below {', '.join(map(str, roots))}")
    return chosen


def assert_close(
    got: Any, want: Any, *, atol: float = 0.0, rtol: float = 0.0, where: str = "array"
) -> None:
    """Equal shapes, and |got - want| <= atol + rtol * |want| everywhere; NaN equals nothing.

    Takes whatever numpy can read, torch tensors included.
    """
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{where}: shape {got.shape}, expected {want.shape}"
    if not want.size:
        return
    wide = np.result_type(got, want, np.float64)
    a, b = got.astype(wide), want.astype(wide)
    with np.errstate(invalid="ignore"):  # the same infinity on both sides is equal
        error = np.where(a == b, 0.0, np.abs(a - b))
    excess = np.where(np.isnan(error), np.inf, error - (atol + rtol * np.abs(b)))
    if (excess <= 0).all():
        return
    worst = tuple(map(int, np.unravel_index(np.argmax(excess), excess.shape)))
    raise AssertionError(
        f"{where} {got.shape}: got {got[worst]!r}, expected {want[worst]!r} at {list(worst)}; "
        f"{int((excess > 0).sum())} of {excess.size} differ, max abs difference "
        f"{float(np.nanmax(error)) if not np.isnan(error).all() else float('nan'):.3g} "
        f"(atol {atol:g}, rtol {rtol:g})"
    )
