"""What a published HAGI config says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from edgert.models.layers import Heads


@dataclass(frozen=True)
class Grades:
    """How GDR splits the hidden state, in this order, and how it blends. Sizes in channels."""

    scalar: int = 64
    vector: int = 192  # a multiple of 8: whole multivectors
    bivector: int = 192
    trivector: int = 64
    residual: int = 256  # passes unchanged; may be 0
    scalar_momentum: float = 0.9
    vector_momentum: float = 0.5
    geo_interaction: bool = True
    gated: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Channels of the grades that GDR changes: scalar, vector, bivector, trivector."""
        return self.scalar, self.vector, self.bivector, self.trivector

    @property
    def read(self) -> int:
        """Channels that GDR reads: all but the residual."""
        return sum(self.sizes)


@dataclass(frozen=True)
class HAGIConfig:
    """Field names as published; `context` is ours: positions that the rotary tables cover."""

    vocab_size: int
    hidden_size: int
    num_query_heads: int
    num_kv_heads: int
    intermediate_size: int
    perception_layers: int = 4
    reasoning_layers: int = 4
    expression_layers: int = 4
    loop_count: int = 3
    use_loop: bool = True
    use_gdr: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_seq_len: int = 4096
    gradient_checkpointing: bool = False
    ce_chunk_size: int = 0
    grades: Grades = field(default_factory=Grades)
    context: int = 4096

    @property
    def iterations(self) -> int:
        """N: how often the reasoning blocks run."""
        return self.loop_count if self.use_loop else 1

    @property
    def heads(self) -> Heads:
        size = self.hidden_size // self.num_query_heads
        return Heads(self.num_query_heads, self.num_kv_heads, size)

    @property
    def slots(self) -> int:
        """Executed attentions, each with keys and values of its own."""
        looped = self.iterations * self.reasoning_layers
        return self.perception_layers + looped + self.expression_layers

    @property
    def letter(self) -> str:
        """A, B, C or D."""
        return "AC"[self.use_gdr] if self.iterations == 1 else "BD"[self.use_gdr]

    def published(self) -> dict[str, Any]:
        """The nested dict of a published checkpoint."""
        flat = {k: v for k, v in asdict(self).items() if k not in ("grades", "context")}
        inner = {
            "hidden_size": self.hidden_size,
            **{name: flat.pop(name) for name in _TRANSFORMER},
        }
        return {**flat, "transformer": inner, "grades": asdict(self.grades)}


_TRANSFORMER = (
    *("num_query_heads", "num_kv_heads", "intermediate_size"),
    *("rope_theta", "norm_eps", "max_seq_len"),
)
