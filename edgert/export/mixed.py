"""Which matrices keep 8 bits, where 4 bits for all of them cost more than a precision may.

harm    of rounding a matrix W to W': the mean over tokens of (g^T (W' - W) x)^2 / 2, where x is its
        input and g the gradient, at its output, of the loss of a token drawn from the model's
        own prediction. That is the second-order growth of the divergence from the unrounded
        model, since the Fisher information is the Hessian of it (as in arXiv 1911.03852).
order   by harm for each byte that 8 bits would add: the worst first
how many  as few as hold the budget on text apart from what accuracy is measured on, by halving
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgert.evaluate import cross_entropy
from edgert.export.calibration import Ids, Run, Watch, frozen
from edgert.export.quantize import Quantizer

MARGIN = 0.8
"""Of what the budget allows: the text it is held on is another one, and activations are rounded
besides."""

WINDOWS = 2
"""Windows of text whose tokens' gradients rank the maps: order needs less than size."""


class _Products(Watch):
    """Keeps inputs and outputs of every linear map and head, by parameter, in the order of the
    calls."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def called(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        if outputs.requires_grad:
            outputs.retain_grad()
        else:
            outputs.requires_grad_()  # the first one: parameters ask for no gradients meanwhile
        self.seen.setdefault(name, []).append((inputs.detach(), outputs))


def harms(quantizer: Quantizer, run: Run, windows: Iterable[Ids]) -> dict[str, float]:
    """Harm of each linear map and head that the quantizer rounds to few bits, by parameter."""
    totals: dict[str, float] = {}
    tokens = 0
    generator = torch.Generator().manual_seed(0)
    with frozen(quantizer.module):
        for ids in windows:
            watch = _Products(quantizer.module)
            with torch.enable_grad(), watch:
                logits = run(ids)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            tokens += len(ids)
            for name in watch.seen:
                if name in quantizer.made and quantizer.made[name][1].bits < 8:
                    change = torch.from_numpy(quantizer.change(name))  # [N, K]
                    moved = torch.stack([_moved(change, *call) for call in watch.seen[name]]).sum(0)
                    totals[name] = totals.get(name, 0.0) + float((moved * moved).sum()) / 2
    return {name: total / tokens for name, total in totals.items()}


def _moved(change: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """What a change of a map moves each token's loss by, to first order: [tokens]."""
    assert outputs.grad is not None
    return ((inputs.flatten(0, -2) @ change.T) * outputs.grad.flatten(0, -2)).sum(-1)


def widen(
    quantizer: Quantizer,
    run: Run,
    windows: Sequence[Ids],
    budget: float,
) -> dict[str, Any]:
    """Give 8 bits to as few matrices as hold the budget, a perplexity ratio, on the windows.

    Returns what was found: the ratio with none and with those that were chosen, and their names.
    All get them if even that does not hold it.
    """

    def losses() -> NDArray[np.float64]:
        with torch.no_grad():
            found = [cross_entropy(run(ids).numpy()[:-1], ids[1:]) for ids in windows]
        return np.concatenate(found)

    with Watch(quantizer.module) as watch:
        truth = losses()
    quantizer.prepare(watch.maps, watch.heads)

    def ratio() -> float:
        with quantizer.applied():
            return math.exp((losses() - truth).mean())

    goal = 1 + MARGIN * (budget - 1)
    narrow = ratio()
    if narrow <= goal:
        count = sum(quantized.bits < 8 for _, quantized in quantizer.made.values())
        return {"narrow_ratio": narrow, "ratio": narrow, "matrices": count, "names": []}
    order = _worst_first(harms(quantizer, run, windows[:WINDOWS]), quantizer)
    few, many, reached = 0, len(order), math.nan
    while few < many:
        middle = (few + many) // 2
        quantizer.widen(order[:middle])
        if (found := ratio()) <= goal:
            many, reached = middle, found
        else:
            few = middle + 1
    quantizer.widen(order[:many])
    return {
        "narrow_ratio": narrow,
        "ratio": reached if math.isfinite(reached) else ratio(),
        "matrices": len(order),
        "names": order[:many],
    }


def _worst_first(harm: Mapping[str, float], quantizer: Quantizer) -> list[str]:
    """By harm for each weight, which 8 bits would double."""
    return sorted(harm, key=lambda name: -harm[name] / quantizer.made[name][1].codes.size)
