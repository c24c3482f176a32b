"""HRM as a program: an embedding, one segment repeated, the head.

Two forms of it are traced. Stepped: a graph for each part; the runtime repeats the segment until
each puzzle is done with. Unrolled: all T segments in one graph. In both, a weight is stored once,
however often a segment uses it.

Values   original: e, z_h, z_l [B, N, d]; bidirectional: high, low [B, S, d], and x where it is
         added again
Signals  original: halt, the score of halting less that of continuing; bidirectional: p
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgert.models.hrm.bidir import Bidir
from edgert.models.hrm.model import HRM
from edgert.models.hrm.step import Step
from edgert.models.program import Program, TracedGraph, Turn, counted
from edgert.spec import HaltSpec, LoopSpec, Lowering, ProgramSpec, TensorSpec, Wire

TABLE = "puzzle"


class Fused(Step):
    """ONNX Runtime's fused operators. Source: onnxruntime docs/ContribOperators.md."""

    def __init__(self, heads: int, cos: Tensor | None = None, sin: Tensor | None = None) -> None:
        super().__init__(heads, cos, sin)
        self.cos, self.sin = cos, sin

    def add_norm(self, x: Tensor, delta: Tensor, eps: float) -> Tensor:
        statistics = (*x.shape[:-1], 1)
        normed, _, _, _ = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::SkipSimplifiedLayerNormalization",
            (x, delta, torch.ones(x.shape[-1])),
            {"epsilon": eps},
            dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
            shapes=(x.shape, statistics, statistics, x.shape),
            version=1,
        )
        return normed

    def attend(self, qkv: Tensor, dropout: float = 0.0) -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        if self.cos is not None:
            q, k = self._rotate(q), self._rotate(k)
        out = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (q, k, v),
            {"num_heads": self.heads},
            dtype=q.dtype,
            shape=q.shape,
            version=1,
        )
        return out

    def _rotate(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "com.microsoft::RotaryEmbedding",
            (x, torch.zeros(1, dtype=torch.int64), self.cos, self.sin),
            {"interleaved": 0, "num_heads": self.heads},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


FORMS: dict[Lowering, type[Step]] = {"ort": Fused, "portable": Step}
NO_STATE: dict[Lowering, str] = {
    "modern": "it keeps no keys and values, so newer TensorRT takes its portable graphs"
}


class Embedding(nn.Module):
    """ids int32 [B, S], puzzle [B, p] -> e, and the state before the first segment [B, N, d]."""

    def __init__(self, model: HRM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *puzzle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e = self.model.embed(ids, *puzzle)
        return e, self.model.h_init.expand_as(e), self.model.l_init.expand_as(e)


class Turning(nn.Module):
    """One segment: e, z_h, z_l [B, N, d] -> the new state, and how much halting leads [B]."""

    def __init__(self, model: HRM, form: type[Step]) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, e: Tensor, z_h: Tensor, z_l: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        step = self.form(model.config.num_heads, model.cos, model.sin)
        z_h, z_l = model.refine(step, z_h, z_l, e, model.config.updates)
        return z_h, z_l, _lead(model.heads(z_h)[1])


class Head(nn.Module):
    """z_h [B, N, d] -> logits [B, S, V], their argmax int32 [B, S], q [B, 2]."""

    def __init__(self, model: HRM) -> None:
        super().__init__()
        self.model = model

    def forward(self, z_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, q = self.model.heads(z_h)
        return logits, logits.argmax(-1).int(), q


class Whole(nn.Module):
    """All T segments: ids int32 [B, S], puzzle [B, p] -> logits, argmax, q."""

    def __init__(self, model: HRM, form: type[Step]) -> None:
        super().__init__()
        self.first, self.turn, self.head = Embedding(model), Turning(model, form), Head(model)
        self.times = model.config.halt_max_steps

    def forward(self, ids: Tensor, *puzzle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e, z_h, z_l = self.first(ids, *puzzle)
        for _ in range(self.times):
            z_h, z_l, _ = self.turn(e, z_h, z_l)
        found: tuple[Tensor, Tensor, Tensor] = self.head(z_h)
        return found


class BidirEmbedding(nn.Module):
    """ids int32 [B, S] -> high, low, and x where it is added again: all the same [B, S, d]."""

    def __init__(self, model: Bidir) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.model.embed(ids)
        # An output of its own for each: one tensor given twice is one output.
        return tuple(x + 0 for _ in range(3 if self.model.config.reinject_input else 2))


class BidirTurning(nn.Module):
    """One cycle: high, low [B, S, d], how many are done int64 [B], x -> the new state, p [B]."""

    def __init__(self, model: Bidir, form: type[Step]) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, high: Tensor, low: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rest: the count, if the cycle depends on it; x, if it is added again."""
        model = self.model
        row = again = None
        if model.cycles is not None:
            row = F.embedding(rest[0], model.cycles)[:, None]
        if model.config.reinject_input:
            again = torch.where((rest[0] > 0)[:, None, None], rest[1], 0.0)
        found = model.turn(self.form(model.config.num_heads), high, low, row, again)
        return found.high, found.low, found.halt.sigmoid()


class BidirHead(nn.Module):
    """low [B, S, d] -> logits [B, S, V], their argmax int32 [B, S]."""

    def __init__(self, model: Bidir) -> None:
        super().__init__()
        self.model = model

    def forward(self, low: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.output(low)
        return logits, logits.argmax(-1).int()


class BidirWhole(nn.Module):
    """All cycles: ids int32 [B, S] -> logits, argmax."""

    def __init__(self, model: Bidir, form: type[Step]) -> None:
        super().__init__()
        self.model = model
        self.first, self.turn = BidirEmbedding(model), BidirTurning(model, form)
        self.head = BidirHead(model)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        high, low, *x = self.first(ids)
        for c in range(self.model.config.max_cycles):
            done = torch.full(ids.shape[:1], c, dtype=torch.int64)
            rest = (done, *x) if _counts(self.model) else ()
            high, low, _ = self.turn(high, low, *rest)
        found: tuple[Tensor, Tensor] = self.head(low)
        return found


def _lead(q: Tensor) -> Tensor:
    """Above 0 exactly where q_halt > q_continue: subtraction is exact around equality."""
    return q[:, 0] - q[:, 1]


def graphs(model: HRM) -> Program:
    """The program of the original form."""
    c = model.config
    cells, vocab = c.seq_len, c.vocab_size
    state = TensorSpec("float32", ("batch", c.positions, c.hidden_size))
    loop = LoopSpec(
        c.halt_max_steps,
        {"e": state, "z_h": state, "z_l": state},
        {"halt": TensorSpec("float32", ("batch",))},
        fill="none",
        halt=HaltSpec("halt", 0.0, 1, cumulative=False),
    )
    inputs = {"ids": TensorSpec("int32", ("batch", cells))}
    tables = {}
    if model.puzzle_table is not None:
        inputs[TABLE] = TensorSpec("float32", ("batch", c.puzzle_emb_ndim))
        tables[TABLE] = model.puzzle_table
    read: dict[str, Wire] = {name: f"input.{name}" for name in inputs}
    results = _results(cells, vocab) | {"q": TensorSpec("float32", ("batch", 2))}
    written: dict[str, Wire] = {name: f"result.{name}" for name in results}
    around: dict[str, Wire] = {"z_h": "value.z_h", "z_l": "value.z_l"}
    constant: dict[str, Wire] = {"e": "value.e"}
    parameters = sum(p.numel() for p in model.parameters())
    return Program(
        summary=f"HRM {c.letter}, {cells} cells, up to {c.halt_max_steps} segments of {c.updates}, "
        f"{counted(parameters)} parameters",
        parts=ProgramSpec("head", "embed", "segment", loop),
        inputs=inputs,
        results=results,
        states={},
        graphs=(
            TracedGraph("embed", lambda _: Embedding(model), read, constant | around),
            TracedGraph(
                "segment",
                lambda lowering: Turning(model, FORMS[lowering]),
                constant | around,
                {"z_h.next": "value.z_h", "z_l.next": "value.z_l", "halt": "signal.halt"},
            ),
            TracedGraph("head", lambda _: Head(model), {"z_h": "value.z_h"}, written),
        ),
        unrolled=TracedGraph("head", lambda low: Whole(model, FORMS[low]), read, written),
        vocab_size=vocab,
        context=cells,
        turns=lambda given: _turns(model, given),
        parameters=parameters,
        weights=model,
        refusals=NO_STATE,
        tables=tables,
    )


def _turns(model: HRM, inputs: Mapping[str, Tensor]) -> Iterator[Turn]:
    """Eager torch, segment by segment, from the initial state."""
    with torch.no_grad():
        e = model.embed(inputs["ids"], inputs.get(TABLE))
        z_h, z_l = model.initial(len(e))
        yield Turn({"e": e, "z_h": z_h, "z_l": z_l}, {}, {})
        for _ in range(model.config.halt_max_steps):
            z_h, z_l, logits, q = model.segment(z_h, z_l, e)
            values = {"e": e, "z_h": z_h, "z_l": z_l}
            yield Turn(values, {"halt": _lead(q)}, {"logits": logits, "q": q})


def bidir_graphs(model: Bidir) -> Program:
    """The program of the bidirectional form."""
    c = model.config
    cells, vocab = c.seq_len, c.vocab_size
    names = ("high", "low", "x") if c.reinject_input else ("high", "low")
    state = TensorSpec("float32", ("batch", cells, c.hidden_size))
    loop = LoopSpec(
        c.max_cycles,
        dict.fromkeys(names, state),
        {"p": TensorSpec("float32", ("batch",))},
        fill="none",
        halt=HaltSpec("p", c.threshold, c.least_cycles, cumulative=c.cycle_embedding),
    )
    values: dict[str, Wire] = {name: f"value.{name}" for name in names}
    counts: dict[str, Wire] = {"steps": "loop.steps"} if _counts(model) else {}
    around: dict[str, Wire] = {"high": "value.high", "low": "value.low"}
    again: dict[str, Wire] = {"x": "value.x"} if c.reinject_input else {}
    written: dict[str, Wire] = {"logits": "result.logits", "token": "result.token"}
    read: dict[str, Wire] = {"ids": "input.ids"}
    parameters = sum(p.numel() for p in model.parameters())
    return Program(
        summary=f"HRM {c.letter}, {cells} cells, up to {c.max_cycles} cycles, "
        f"{counted(parameters)} parameters",
        parts=ProgramSpec("head", "embed", "cycle", loop),
        inputs={"ids": TensorSpec("int32", ("batch", cells))},
        results=_results(cells, vocab),
        states={},
        graphs=(
            TracedGraph("embed", lambda _: BidirEmbedding(model), read, values),
            TracedGraph(
                "cycle",
                lambda lowering: BidirTurning(model, FORMS[lowering]),
                around | counts | again,
                {"high.next": "value.high", "low.next": "value.low", "p": "signal.p"},
            ),
            TracedGraph("head", lambda _: BidirHead(model), {"low": "value.low"}, written),
        ),
        unrolled=TracedGraph("head", lambda low: BidirWhole(model, FORMS[low]), read, written),
        vocab_size=vocab,
        context=cells,
        turns=lambda given: _bidir_turns(model, given),
        parameters=parameters,
        weights=model,
        refusals=NO_STATE,
    )


def _bidir_turns(model: Bidir, inputs: Mapping[str, Tensor]) -> Iterator[Turn]:
    """Eager torch, cycle by cycle."""
    with torch.no_grad():
        x = model.embed(inputs["ids"])
        again = {"x": x} if model.config.reinject_input else {}
        yield Turn({"high": x, "low": x} | again, {}, {})
        for found in model.unroll(inputs["ids"]):
            values = {"high": found.high, "low": found.low} | again
            yield Turn(values, {"p": found.halt.sigmoid()}, {"logits": found.logits})


def _counts(model: Bidir) -> bool:
    """Whether a cycle depends on how many there were."""
    return model.cycles is not None or model.config.reinject_input


def _results(cells: int, vocab: int) -> dict[str, TensorSpec]:
    return {
        "logits": TensorSpec("float32", ("batch", cells, vocab)),
        "token": TensorSpec("int32", ("batch", cells)),
    }
