"""Grade-Decomposed Recurrence: what a looped HAGI model does to its state before each iteration.

Sources  ShmidtS/HAGI @ 38d26f2 and, gated, @ b7853c6, prototype/model/gdr.py
Shapes   c channels that are read (scalar, vector, bivector, trivector), m multivectors of 8
Weights  the first layers of the four maps are one matrix; linear maps are kept [in, out]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgert.models.block import Pick, values
from edgert.models.clifford import BLADES, PAIRS, SQUARE_SIGNS, square
from edgert.models.hagi.config import Grades

NAMES = ("scalar", "vector", "bivector", "trivector")


class GDR(nn.Module):
    """As published, the geometric product in closed form: what training uses, and the truth."""

    def __init__(self, grades: Grades) -> None:
        super().__init__()
        self.grades = g = grades
        c = g.read
        self.gates = nn.ParameterDict({n: torch.zeros(1) for n in ("scalar", "bivector")})
        self.alphas = nn.ParameterDict({n: torch.zeros(1) for n in NAMES} if g.gated else {})
        self.w_in = nn.Parameter(torch.empty(c, 4 * c))
        self.b_in = nn.Parameter(torch.zeros(4 * c))
        outs = dict(zip(NAMES, g.sizes, strict=True))
        self.w_out = nn.ParameterDict({n: torch.empty(c, size) for n, size in outs.items()})
        self.b_out = nn.ParameterDict({n: torch.zeros(size) for n, size in outs.items()})
        self.w_square = nn.Parameter(torch.empty(g.vector, g.scalar))
        self.w_turn = nn.Parameter(torch.empty(g.vector, g.bivector))

    def forward(self, x: Tensor) -> Tensor:
        """The raw residual stream [..., H] -> the same; position by position."""
        g = self.grades
        *old, rest = x.split((*g.sizes, g.residual), dim=-1)
        hidden = F.silu(x[..., : g.read] @ self.w_in + self.b_in).chunk(4, dim=-1)
        maps = [h @ self.w_out[n] + self.b_out[n] for n, h in zip(NAMES, hidden, strict=True)]
        if g.gated:
            s, v, b, t = (o + self.alphas[n] * m for n, o, m in zip(NAMES, old, maps, strict=True))
        else:
            s = g.scalar_momentum * old[0] + (1 - g.scalar_momentum) * maps[0]
            v = g.vector_momentum * old[1] + (1 - g.vector_momentum) * maps[1]
            b, t = maps[2:]
        if g.geo_interaction:
            squared, turned = square(v.unflatten(-1, (-1, BLADES)))
            # The other rows meet zeros only.
            rows = torch.arange(g.vector, device=x.device).view(-1, BLADES)
            to_s, to_b = self.strengths()
            s = s + to_s * (squared @ self.w_square[rows[:, 0]])
            b = b + to_b * (turned.flatten(-2) @ self.w_turn[rows[:, tuple(PAIRS)].flatten()])
        return torch.cat((s, v, b, t, rest), dim=-1)

    def strengths(self) -> tuple[Tensor, Tensor]:
        """Factors of the geometric terms, each [1]."""
        scalar, bivector = self.gates["scalar"], self.gates["bivector"]
        return (scalar, bivector) if self.grades.gated else (scalar.sigmoid(), bivector.sigmoid())


class FoldedGDR(nn.Module):
    """GDR for a graph: momenta, gates and signs folded into the weights, the products gathered.

    The square of a multivector becomes two products of channels, each before one matrix.
    """

    first: Tensor
    second: Tensor

    @torch.no_grad()
    def __init__(self, source: GDR) -> None:
        super().__init__()
        self.grades = g = source.grades
        if g.gated:
            self.keep: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
            scale = [source.alphas[n] for n in NAMES]
        else:
            self.keep = (g.scalar_momentum, g.vector_momentum, 0.0, 0.0)
            scale = [torch.tensor(1.0 - keep) for keep in self.keep]
        self.w_in, self.b_in = source.w_in, source.b_in
        self.w_out = nn.ParameterDict(
            {n: source.w_out[n] * a for n, a in zip(NAMES, scale, strict=True)}
        )
        self.b_out = nn.ParameterDict(
            {n: source.b_out[n] * a for n, a in zip(NAMES, scale, strict=True)}
        )
        if g.geo_interaction:
            self._fold_square(source)
        self.requires_grad_(False)

    def _fold_square(self, source: GDR) -> None:
        to_s, to_b = source.strengths()
        rows = torch.arange(self.grades.vector).view(-1, BLADES)
        signs = torch.tensor(SQUARE_SIGNS, dtype=torch.float32)
        squares = to_s * source.w_square[rows[:, 0]]  # [m, S]
        self.w_square = nn.Parameter((signs[None, :, None] * squares[:, None]).flatten(0, 1))
        terms = [(blade, *term) for blade, two in PAIRS.items() for term in two]
        self.register_buffer("first", torch.cat([rows[:, a] for _, a, _, _ in terms]))
        self.register_buffer("second", torch.cat([rows[:, b] for _, _, b, _ in terms]))
        turns = [2 * s * to_b * source.w_turn[rows[:, blade]] for blade, _, _, s in terms]
        self.w_turn = nn.Parameter(torch.cat(turns))

    def forward(self, x: Tensor) -> Tensor:
        g = self.grades
        parts = x.split([size for size in (*g.sizes, g.residual) if size], dim=-1)
        hidden = F.silu(x[..., : g.read] @ self.w_in + self.b_in).chunk(4, dim=-1)
        new = []
        for name, keep, old, h in zip(NAMES, self.keep, parts, hidden, strict=False):
            y = h @ self.w_out[name] + self.b_out[name]
            new.append(y if keep == 0 else y + (old if keep == 1 else keep * old))
        if g.geo_interaction:
            v = new[1]
            new[0] = new[0] + (v * v) @ self.w_square
            new[2] = new[2] + (v[..., self.first] * v[..., self.second]) @ self.w_turn
        return torch.cat((*new, *parts[4:]), dim=-1)


def gdr_tensors(gdr: GDR, pick: Pick = values) -> dict[str, Tensor]:
    """Published names -> views [out, in] of the module's own tensors, in registration order."""
    out = {f"gate_{n}": pick(p) for n, p in gdr.gates.items()}
    out |= {f"alpha_{n}": pick(p) for n, p in gdr.alphas.items()}
    w_in, b_in = pick(gdr.w_in).T.chunk(4), pick(gdr.b_in).chunk(4)
    for i, name in enumerate(NAMES):
        out[f"mlp_{name}.0.weight"], out[f"mlp_{name}.0.bias"] = w_in[i], b_in[i]
        out[f"mlp_{name}.2.weight"] = pick(gdr.w_out[name]).T
        out[f"mlp_{name}.2.bias"] = pick(gdr.b_out[name])
    out["geo_to_scalar.weight"] = pick(gdr.w_square).T
    out["geo_to_bivector.weight"] = pick(gdr.w_turn).T
    return out
