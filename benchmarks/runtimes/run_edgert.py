"""edgert: text pieces of a session. The time of a step includes detokenizing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgert
from edgert.sampler import SamplingParams
from runtimes.interface import Arrived

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Edgert:
    def __init__(self, orders: dict[str, Any]) -> None:
        self.model = edgert.load(
            Path(orders["model"]),
            precision=orders.get("precision"),
            threads=orders["threads"],
            prepack=orders.get("prepack", True),
        )

    def generate(self, ids: list[int], count: int, arrived: Arrived) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, speculate="off")
        with self.model.session() as session:
            for piece in session.stream(ids, params):
                assert piece.token is not None
                arrived(piece.token)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        return self.model.logits([ids])[0]


load = Edgert
