"""Scales that make up for what their codes cost, together: the divergence from the unrounded
model, descended.

Codes and scales are chosen map by map, as if all others were exact. Then the codes stay, and
u = ln(scale) follows, by Adam, the gradient of the KL divergence between what the unrounded and
the rounded model predict at every position of a text. It is the model's own, so there is no text to
fit but what it would say. (As the second phase of EfficientQAT, arXiv 2407.11062, which trains
step sizes end to end.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from edgert.export.calibration import Ids, Run, frozen
from edgert.export.quantize import Quantizer

RATE = 2e-3
"""Of Adam, in nats of a scale: it rises over the first `WARM` windows, and falls to 0."""
WARM = 8
BETAS = (0.9, 0.99)


class _Tuned:
    """One matrix: its codes without their zero points, and the logarithm of what multiplies its
    scales."""

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        self.parameter = quantizer.module.get_parameter(name)
        self.truth = self.parameter.data
        self.transposed, quantized = quantizer.made[name]
        self.codes = torch.from_numpy(quantized.signed())  # [N, blocks, block]
        self.scales = torch.from_numpy(quantized.scales)
        self.u = torch.zeros_like(self.scales, requires_grad=True)

    def put(self) -> None:
        values = (self.codes * self.now()[..., None]).flatten(1)
        self.parameter.data = (values.T if self.transposed else values).contiguous()

    def now(self) -> torch.Tensor:
        return self.scales * self.u.detach().exp()

    def pull(self) -> None:
        """The gradient of the weight becomes that of u, and is let go."""
        assert self.parameter.grad is not None
        gradient = self.parameter.grad.T if self.transposed else self.parameter.grad
        self.parameter.grad = None
        self.u.grad = (gradient.reshape(self.codes.shape) * self.codes).sum(-1) * self.now()


def tune(
    quantizer: Quantizer,
    run: Run,
    windows: Sequence[Ids],
    advance: Callable[[int], None] = lambda steps: None,
) -> None:
    """Move the scales of all matrices that the quantizer has made: a step for each window."""
    tuned = {name: _Tuned(quantizer, name) for name in quantizer.made}
    optimizer = torch.optim.Adam([one.u for one in tuned.values()], betas=BETAS)
    with frozen(quantizer.module):
        try:
            for rate, ids in zip(_rates(len(windows)), windows, strict=True):
                for one in tuned.values():
                    one.parameter.data = one.truth
                with torch.no_grad():
                    wanted = run(ids).log_softmax(-1)
                for one in tuned.values():
                    one.put()
                    one.parameter.requires_grad_(True)
                with torch.enable_grad():
                    said = run(ids).log_softmax(-1)
                    (wanted.exp() * (wanted - said)).sum(-1).mean().backward()
                for one in tuned.values():
                    one.parameter.requires_grad_(False)
                    one.pull()
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
                advance(1)
        finally:
            for one in tuned.values():
                one.parameter.requires_grad_(False)
                one.parameter.data = one.truth
    for name, one in tuned.items():
        quantizer.rescale(name, one.now().numpy())


def _rates(steps: int) -> Iterator[float]:
    for step in range(steps):
        yield RATE * min(1.0, (step + 1) / WARM) * (1 - step / steps)
