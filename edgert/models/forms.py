"""What a decoder's operations become in each lowering."""

from __future__ import annotations

from edgert.models.layers import Heads, Ort, Portable, Stateful
from edgert.models.modern import Modern
from edgert.spec import Lowering

FORMS: dict[Lowering, type[Stateful]] = {"ort": Ort, "portable": Portable, "modern": Modern}


def refusals(heads: Heads) -> dict[Lowering, str]:
    """The lowerings that have no kernels for this geometry, and why."""
    asked: dict[Lowering, str | None] = {
        "ort": Ort.refusal(heads),
        "modern": Modern.refusal(heads),
    }
    return {lowering: why for lowering, why in asked.items() if why}
