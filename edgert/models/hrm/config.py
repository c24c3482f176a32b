"""What a published HRM config says: the original (A1, A2) and the bidirectional form (B1, B2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Positions = Literal["rope", "learned"]
LossType = Literal["stablemax_cross_entropy", "softmax_cross_entropy"]

POSITIONS: tuple[Positions, ...] = ("rope", "learned")
LOSSES: tuple[LossType, ...] = ("stablemax_cross_entropy", "softmax_cross_entropy")

_COUNTS = ("cycles", "layers")
_MULTIPLE = 256  # the width of a gated layer is rounded up to it


def gated_width(expansion: float, hidden: int) -> int:
    """m: columns of SwiGLU's gate for d = `hidden`, in the published order of arithmetic."""
    return -(-round(expansion * hidden * 2 / 3) // _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True)
class HRMConfig:
    """The original form. Field names as published, H_ and L_ in lower case.

    forward_dtype  what the published trainer computed in; here it is always float32
    """

    seq_len: int  # S: cells of the grid, without the puzzle prefix
    vocab_size: int
    hidden_size: int  # d
    num_heads: int
    expansion: float
    h_cycles: int  # updates of H in a segment
    l_cycles: int  # updates of L before each of H
    h_layers: int
    l_layers: int
    pos_encodings: Positions
    halt_max_steps: int  # T: segments
    puzzle_emb_ndim: int = 0  # p
    num_puzzle_identifiers: int = 1
    halt_exploration_prob: float = 0.1
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    forward_dtype: str = "bfloat16"
    loss_type: LossType = "stablemax_cross_entropy"

    @property
    def prefix(self) -> int:
        """P: positions of the puzzle embedding in front of the grid."""
        return -(-self.puzzle_emb_ndim // self.hidden_size)

    @property
    def positions(self) -> int:
        """N = P + S."""
        return self.prefix + self.seq_len

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def intermediate_size(self) -> int:
        return gated_width(self.expansion, self.hidden_size)

    @property
    def updates(self) -> str:
        """A segment's updates in order, such as LLHLLH. It ends with LH."""
        return ("L" * self.l_cycles + "H") * self.h_cycles

    @property
    def letter(self) -> str:
        """A1: rotary positions and a puzzle embedding; A2: any other."""
        return "A1" if self.pos_encodings == "rope" and self.prefix else "A2"

    def published(self) -> dict[str, Any]:
        """All fields under their published names: `arch`, and what it takes from the dataset."""
        fields = asdict(self)
        loss = {"loss_type": fields.pop("loss_type")}
        return {_PUBLISHED.get(name, name): v for name, v in fields.items()} | {"loss": loss}


_PUBLISHED = {f"{level}_{what}": f"{level.upper()}_{what}" for level in "hl" for what in _COUNTS}


@dataclass(frozen=True)
class BidirConfig:
    """The bidirectional form. Field names as published, but for the last three, which are ours.

    seq_len          S to make graphs for; the network takes any number up to `positions`
    positions        rows of the table of sinusoids
    cycle_embedding  B2: a learned row is added in each cycle, and halting adds up probabilities
    reinject_input   the embedding is added to both states before each cycle but the first
    """

    vocab_size: int
    hidden_size: int  # d
    num_heads: int
    num_h_layers: int
    num_l_layers: int
    max_cycles: int = 8
    dropout: float = 0.1
    seq_len: int = 900
    positions: int = 5000
    cycle_embedding: bool = False
    reinject_input: bool = False

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def letter(self) -> str:
        return "B2" if self.cycle_embedding else "B1"

    @property
    def least_cycles(self) -> int:
        """Cycles before which nothing stops."""
        return 4 if self.cycle_embedding else 2

    @property
    def threshold(self) -> float:
        """Halting stops above it: B1 the probability of a cycle, B2 the sum over cycles."""
        return 1.0 if self.cycle_embedding else 0.9

    def published(self) -> dict[str, Any]:
        """All fields under their names."""
        return asdict(self)
