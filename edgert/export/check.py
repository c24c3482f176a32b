"""The parity gate: a bundle's graphs, run by the runtime itself, against eager torch.

    prefill   a whole sequence in one step: every state, then every logit
    steps     half a sequence, then one token at a time
    chunks    uneven chunks
    batch     rows of different lengths, prefilled row by row, then stepped together (a context
              of at least two tokens)

Everything is compared with eager torch over whole sequences. States come first and in slot order,
so that the first difference names the culprit: what a block computes shows in the next block's
keys before it shows anywhere else.

Where states hold codes, rounding falls one way in the graph and another way in torch now and then,
however close the numbers are, and everything behind is away by what a code is worth. So torch's
attention reads the codes that the graph has left. Each of them must be that of a number within the
tolerance of torch's own, and the logits, which are then of the same codes, within it as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from edgert.backends import open_backend
from edgert.bundle import Bundle
from edgert.export.check_solving import solving
from edgert.export.comparison import ROUNDED, TOLERANCE, Check, Checks, Comparison, Verdict
from edgert.export.kv_int8 import Int8KV
from edgert.export.rewriter import Rewriter
from edgert.export.twin import twin
from edgert.models.program import Program, Referee, Reference, Scorer, references
from edgert.progress import Reporter
from edgert.runner import Execution, Runner
from edgert.spec import Lowering

SEED = 20240917
TOKENS = 24  # long enough for uneven chunks, short enough for a gate that runs at every export
CHUNKS = (5, 1, 7)  # then the rest

LEAST: dict[Lowering, tuple[int, int]] = {"modern": (1, 27)}
"""The first ONNX Runtime whose CPU kernels run a lowering, where that is later than what edgert
asks for."""


class _Gate:
    """One variant against eager torch, on B rows of T tokens. `kv` is of one that keeps codes."""

    def __init__(
        self,
        runner: Runner,
        ids: NDArray[np.int64],
        reference: Referee,
        truth: Reference,
        kv: Int8KV | None = None,
    ) -> None:
        self.runner, self.ids, self.reference, self.kv = runner, ids, reference, kv
        self.exact = truth
        self.prefill: NDArray[np.float32] | None = None

    def checks(self) -> Checks:
        total = self.ids.shape[1]
        yield "prefill", lambda c: self._sequence(c, (total,))
        yield "steps", lambda c: self._sequence(c, (total // 2, *[1] * (total - total // 2)))
        yield "chunks", lambda c: self._sequence(c, (*CHUNKS, total))
        if total > 1:
            yield "batch", self._batch

    def _sequence(self, c: Comparison, parts: tuple[int, ...]) -> None:
        """Row 0 in the given parts, cut off at its end; all positions selected."""
        execution = self.runner.open(tokens=self.ids.shape[1])
        done = 0
        logits = []
        for wanted in parts:
            part = min(wanted, self.ids.shape[1] - done)
            if not part:
                continue
            io = execution.io(part, part)
            io.ids[0] = self.ids[0, done : done + part]
            io.select[0] = np.arange(part)
            io.run()
            logits.append((io.logits[0].copy(), io.token[0].copy()))
            done += part
        truth = self._truth(execution)
        self._compare_states(c, truth, execution, [done])
        start = 0
        for step, (rows, tokens) in enumerate(logits):
            at = f"step {step}, position {start}"
            _compare_logits(c, truth, rows, tokens, 0, start, at)
            start += len(rows)
        whole = np.concatenate([rows for rows, _ in logits])
        if self.prefill is None:
            self.prefill = whole
        c.check.paths_max_abs = float(np.abs(whole - self.prefill).max())

    def _batch(self, c: Comparison) -> None:
        """Two rows that end at different positions, then up to three steps of both."""
        total = self.ids.shape[1]
        steps = min(3, total - 1)
        execution = self.runner.open(batch=2, tokens=total)
        lengths = [total - steps, max(1, total // 3)]
        for row, length in enumerate(lengths):
            for _ in execution.row(row).feed(self.ids[row, :length]):
                pass
        found = []
        for step in range(steps):
            io = execution.io()
            for row, length in enumerate(lengths):
                io.ids[row, 0] = self.ids[row, length + step]
            io.select[:] = 0
            io.run()
            found.append((io.logits.copy(), io.token.copy()))
        truth = self._truth(execution)
        for step, (logits, tokens) in enumerate(found):
            for row, length in enumerate(lengths):
                at = f"step {step}, row {row}, position {length + step}"
                _compare_logits(c, truth, logits[row], tokens[row], row, length + step, at)
        self._compare_states(c, truth, execution, [length + steps for length in lengths])

    def _truth(self, execution: Execution) -> Reference:
        """What eager torch says; where states hold codes, over those that this execution left."""
        if self.kv is None:
            return self.exact
        states = execution.states
        codes: Any = {name: states.buffers[name].host for name in self.kv.scales}
        return self.reference(torch.from_numpy(self.ids[: states.batch]), self.kv.holding(codes))

    def _compare_states(
        self, c: Comparison, truth: Reference, execution: Execution, lengths: list[int]
    ) -> None:
        for name, tensor in truth.states.items():
            spec, whole = self.runner.states[name], tensor.numpy()
            axis = spec.shape.index(spec.axis or "")
            for row, length in enumerate(lengths):
                rows = (slice(row, row + 1), *[slice(None)] * (axis - 1), slice(length))
                got: Any = execution.states.buffers[name].host[rows]
                want = whole[rows]
                if self.kv is not None and name in self.kv.scales:
                    got = self.kv.nearest(name, got, want)
                c.compare("state", name, got, want, f"row {row}, {length} tokens")


def _compare_logits(
    c: Comparison,
    truth: Reference,
    got: NDArray[np.float32],
    tokens: NDArray[np.int64],
    row: int,
    start: int,
    at: str,
) -> None:
    want = truth.logits[row, start : start + len(got)].numpy()
    c.compare("result", "logits", got, want, at)
    c.best(tokens, want, at)


def too_old(lowering: Lowering) -> str | None:
    """What would run this lowering's graphs here, if the ONNX Runtime that is here does not."""
    import onnxruntime

    least = LEAST.get(lowering)
    found = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    return f"onnxruntime {least[0]}.{least[1]} or newer" if least and found < least else None


def check_bundle(
    root: Path,
    program: Program,
    rewriters: Mapping[str, Rewriter] | None = None,
    reporter: Reporter | None = None,
    kv: Int8KV | None = None,
) -> Verdict:
    """Run every check on every variant of a bundle.

    rewriters  by precision, of the variants that store other weights than the model's: eager torch
               computes with theirs. A variant that rounds activations is run twice: as a twin that
               does not, against the tight tolerance, and as it is, against `ROUNDED`; if the CPU
               leaves the rounding out, as a twin that does it, too.
    kv         the scales of the variants that keep keys and values in int8
    Raises GateFailed at the first difference beyond the tolerance: the state or result, the
    variant, the check, the step, the index and both values.
    """
    reporter = reporter or Reporter()
    bundle = Bundle.open(root, verify=False)
    checks: list[Check] = []
    inputs: dict[str, int] = {}
    variants = bundle.manifest.variants
    for precision in dict.fromkeys(v.precision for v in variants.values()):
        rewriter = (rewriters or {}).get(precision)
        with rewriter.applied() if rewriter else contextlib.nullcontext():
            decodes = program.reference is not None
            gate, inputs = _decoding(program, rewriter, kv) if decodes else solving(program, SEED)
            for name in [n for n, v in variants.items() if v.precision == precision]:
                tight = TOLERANCE[precision]
                if rewriter and rewriter.rounds:
                    kept = rewriter.state_dtypes
                    with twin(bundle, name, rewriter.exact, kept) as exact:
                        checks += _check(exact, name, gate, tight, "float32", reporter)
                    loose = ROUNDED[rewriter.rounds]
                    if rewriter.emulated:
                        with twin(bundle, name, rewriter.emulate, kept) as rounds:
                            checks += _check(rounds, name, gate, loose, rewriter.rounds, reporter)
                    stored = "cpu" if rewriter.emulated else rewriter.rounds
                    checks += _check(bundle, name, gate, loose, stored, reporter)
                else:
                    checks += _check(bundle, name, gate, tight, "float32", reporter)
    return Verdict(inputs, checks)


def _check(
    bundle: Bundle,
    variant: str,
    gate: Callable[[Runner, str], Checks],
    tolerance: float,
    activations: str,
    reporter: Reporter,
) -> list[Check]:
    backend = open_backend("cpu")
    runner = Runner(bundle, variant, backend)
    todo = dict(gate(runner, activations))
    done = []
    what = f"eager = {variant}" + ", rounding activations" * (activations != "float32")
    with reporter.stage("parity", what, len(todo)) as advance:
        for name, body in todo.items():
            check = Check(variant, name, activations)
            body(Comparison(check, tolerance))
            done.append(check)
            advance(1)
    runner.close()
    return done


def _decoding(
    program: Program, rewriter: Rewriter | None, kv: Int8KV | None
) -> tuple[Callable[[Runner, str], Checks], dict[str, int]]:
    """The gate of a decoder: random sequences.

    Where a rewriter is applied, the truth is the module whose weights the graphs store: the same
    model, with factors folded into its matrices.
    """
    tokens = min(TOKENS, program.context)
    drawn = torch.Generator().manual_seed(SEED)
    ids = torch.randint(program.vocab_size, (2, tokens), generator=drawn)
    reference = program.reference
    assert reference is not None
    if rewriter:
        reference = partial(references, cast(Scorer, program.weights), program.slots)
    truth = reference(ids)

    def gate(runner: Runner, activations: str) -> Checks:
        keeps = runner.manifest.kv_of(runner.variant_name)
        own = kv if keeps == "int8" else None
        return _Gate(runner, ids.numpy(), reference, truth, own).checks()

    return gate, {"seed": SEED, "batch": 2, "tokens": tokens}
