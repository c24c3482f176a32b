"""The parity gate: a bundle's graphs, run by the runtime itself, against eager torch.

    prefill   a whole sequence in one step: every state, then every logit
    steps     half a sequence, then one token at a time
    chunks    uneven chunks
    batch     rows of different lengths, prefilled row by row, then stepped together (a context
              of at least two tokens)

Everything is compared with eager torch over whole sequences. States come first and in slot order,
so that the first difference names the culprit: what a block computes shows in the next block's
keys before it shows anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgert.backends import open_backend
from edgert.bundle import Bundle
from edgert.errors import GateFailed
from edgert.models.program import Program, Reference
from edgert.progress import Reporter
from edgert.runner import Execution, Runner

TOLERANCE = {"fp32": 3e-5}
"""Largest difference, as a share of the largest magnitude in the compared tensor (at least 1).

fp32: two correct implementations that sum in different orders part by about 1e-6 of the magnitude
per block, a few 1e-5 after thirty; a wrong weight or position moves whole per cents.
"""

SEED = 20240917
TOKENS = 24  # long enough for uneven chunks, short enough for a gate that runs at every export
CHUNKS = (5, 1, 7)  # then the rest


@dataclass
class Check:
    """One way of running one variant. `worst` is the largest difference as a share of the limit."""

    variant: str
    name: str
    logits_max_abs: float = 0.0
    states_max_abs: float = 0.0
    worst_share: float = 0.0
    worst_name: str = ""
    top1_agree: int = 0
    top1_total: int = 0


@dataclass
class Verdict:
    """What the gate proved. `to_json` is the content of a bundle's parity.json."""

    precision: str
    checks: list[Check] = field(default_factory=list)

    def to_json(self, bundle: Bundle) -> dict[str, Any]:
        import onnxruntime

        return {
            "format_version": 1,
            "verdict": "pass",
            "model_id": bundle.manifest.model_id,
            "variants": {n: v.variant_id for n, v in bundle.manifest.variants.items()},
            "tolerance": {self.precision: TOLERANCE[self.precision]},
            "sequence": {"seed": SEED, "batch": 2, "tokens": TOKENS},
            "truth": f"eager torch {torch.__version__.split('+')[0]}",
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "checks": [vars(check) for check in self.checks],
        }


class _Comparison:
    """Collects one check's differences; raises at the first tensor beyond its limit."""

    def __init__(self, check: Check, tolerance: float) -> None:
        self.check, self.tolerance = check, tolerance

    def compare(self, kind: str, name: str, got: NDArray[Any], want: NDArray[Any], at: str) -> None:
        limit = self.tolerance * max(1.0, float(np.abs(want).max()))
        with np.errstate(invalid="ignore"):
            delta = np.abs(got.astype(np.float64) - want)
        delta = np.where(np.isnan(delta), np.inf, delta)
        index = np.unravel_index(int(delta.argmax()), delta.shape)
        worst = float(delta[index])
        check = self.check
        if worst > limit:
            raise self._failure(
                f"{kind} '{name}' differs from eager torch: {got[index]:.6g} instead of "
                f"{want[index]:.6g} (difference {worst:.3g}, limit {limit:.3g})",
                f"{at}, index {tuple(int(i) for i in index)}",
            )
        if worst / limit > check.worst_share:
            check.worst_share, check.worst_name = worst / limit, name
        if kind == "state":
            check.states_max_abs = max(check.states_max_abs, worst)
        else:
            check.logits_max_abs = max(check.logits_max_abs, worst)

    def require_tokens(
        self, got: NDArray[np.int64], want: NDArray[np.int64], fine: NDArray[np.bool_], at: str
    ) -> None:
        """Ids are right or wrong: no tolerance applies."""
        if not fine.all():
            index = int(fine.argmin())
            raise self._failure(
                f"result 'token' differs from eager torch: {got[index]} instead of {want[index]}",
                f"{at}, index ({index},)",
            )

    def _failure(self, what: str, at: str) -> GateFailed:
        return GateFailed(
            what,
            where=f"variant {self.check.variant}, check '{self.check.name}', {at}",
            do="the exported graph does not compute what the model computes: "
            "do not use it, and report how it was made",
        )


class _Gate:
    """One variant against one reference of B rows and T tokens."""

    def __init__(
        self, runner: Runner, ids: NDArray[np.int64], truth: Reference, precision: str
    ) -> None:
        self.runner, self.ids = runner, ids
        self.tolerance = TOLERANCE[precision]
        self.states = {name: tensor.numpy() for name, tensor in truth.states.items()}
        self.logits = truth.logits.numpy()

    def run(self, name: str, body: Callable[[_Comparison], None]) -> Check:
        check = Check(self.runner.variant_name, name)
        body(_Comparison(check, self.tolerance))
        return check

    def checks(self) -> Iterator[tuple[str, Callable[[_Comparison], None]]]:
        total = self.ids.shape[1]
        yield "prefill", lambda c: self._sequence(c, (total,))
        yield "steps", lambda c: self._sequence(c, (total // 2, *[1] * (total - total // 2)))
        yield "chunks", lambda c: self._sequence(c, (*CHUNKS, total))
        if total > 1:
            yield "batch", self._batch

    def _sequence(self, c: _Comparison, parts: tuple[int, ...]) -> None:
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
        self._compare_states(c, execution, [done])
        start = 0
        for step, (rows, tokens) in enumerate(logits):
            at = f"step {step}, position {start}"
            self._compare_logits(c, rows, tokens, 0, start, at)
            start += len(rows)

    def _batch(self, c: _Comparison) -> None:
        """Two rows that end at different positions, then up to three steps of both."""
        total = self.ids.shape[1]
        steps = min(3, total - 1)
        execution = self.runner.open(batch=2, tokens=total)
        lengths = [total - steps, max(1, total // 3)]
        for row, length in enumerate(lengths):
            for _ in execution.row(row).feed(self.ids[row, :length]):
                pass
        for step in range(steps):
            io = execution.io()
            for row, length in enumerate(lengths):
                io.ids[row, 0] = self.ids[row, length + step]
            io.select[:] = 0
            io.run()
            for row, length in enumerate(lengths):
                at = f"step {step}, row {row}, position {length + step}"
                self._compare_logits(c, io.logits[row], io.token[row], row, length + step, at)
        self._compare_states(c, execution, [length + steps for length in lengths])

    def _compare_states(self, c: _Comparison, execution: Execution, lengths: list[int]) -> None:
        for name, want in self.states.items():
            spec = self.runner.manifest.states[name]
            axis = spec.shape.index(spec.axis or "")
            got = execution.states.buffers[name].host
            for row, length in enumerate(lengths):
                rows = (slice(row, row + 1), *[slice(None)] * (axis - 1), slice(length))
                c.compare("state", name, got[rows], want[rows], f"row {row}, {length} tokens")

    def _compare_logits(
        self,
        c: _Comparison,
        got: NDArray[np.float32],
        tokens: NDArray[np.int64],
        row: int,
        start: int,
        at: str,
    ) -> None:
        want = self.logits[row, start : start + len(got)]
        c.compare("result", "logits", got, want, at)
        limit = self.tolerance * max(1.0, float(np.abs(want).max()))
        best = np.sort(want, axis=-1)
        clear = best[:, -1] - best[:, -2] > 2 * limit
        agree = tokens == want.argmax(-1)
        c.check.top1_agree += int(agree.sum())
        c.check.top1_total += len(agree)
        c.require_tokens(tokens, want.argmax(-1), agree | ~clear, at)


def check_bundle(
    root: Path, program: Program, precision: str, reporter: Reporter | None = None
) -> Verdict:
    """Run every check on every variant of a bundle.

    Raises GateFailed at the first difference beyond the tolerance: the state or result, the
    variant, the check, the step, the index and both values.
    """
    reporter = reporter or Reporter()
    tokens = min(TOKENS, program.context)
    ids = torch.randint(
        program.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(SEED)
    )
    bundle = Bundle.open(root, verify=False)
    truth = program.reference(ids)
    verdict = Verdict(precision)
    backend = open_backend("cpu")
    for variant in bundle.manifest.variants:
        runner = Runner(bundle, variant, backend)
        gate = _Gate(runner, ids.numpy(), truth, precision)
        checks = dict(gate.checks())
        with reporter.stage("parity", f"eager = {variant}", len(checks)) as advance:
            for name, body in checks.items():
                verdict.checks.append(gate.run(name, body))
                advance(1)
        for graph in runner.graphs.values():
            graph.close()
    backend.close()
    return verdict
