"""Weights of few bits in an export: which are made, by what they are calibrated, what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from edgert.bundle import Bundle
from edgert.errors import UnsupportedModel
from edgert.export import accuracy
from edgert.export.calibration import Run, moments
from edgert.export.methods import Moments
from edgert.export.mixed import widen
from edgert.export.nbits import CALIBRATED, Scheme
from edgert.export.quantize import Quantizer
from edgert.export.rewriter import Rewriter
from edgert.export.tuning import tune
from edgert.models.importers import Imported
from edgert.models.program import Program, Scorer
from edgert.progress import Reporter

CALIBRATION = 24
"""Windows of what the model said that moments are taken of; tuning reads all of them."""


def quantizers_of(
    program: Program,
    source: Imported,
    schemes: Mapping[str, Scheme],
    lowerings: Sequence[str],
    said: Callable[[], list[accuracy.Ids]],
    reporter: Reporter,
) -> dict[str, Quantizer]:
    """By precision. `said` gives windows of ids that the model says.

    Raises UnsupportedModel where no operator takes such weights.
    """
    if not schemes:
        return {}
    wanted = ", ".join(schemes)
    if program.reference is None:
        raise UnsupportedModel(
            f"{wanted}: weights of few bits are for models that decode tokens",
            do="export with --precision fp32",
        )
    if "ort" not in lowerings:
        why = program.refusals.get("ort", "it was not asked for")
        raise UnsupportedModel(
            f"{wanted} needs the lowering ort: {why}", do="export with --precision fp32"
        )
    texts = _Texts(program, source, said, reporter)
    made = {
        precision: Quantizer(
            program.weights,
            scheme,
            texts.moments(fine=scheme.bits == 8) if scheme.method in CALIBRATED else None,
        )
        for precision, scheme in schemes.items()
    }
    for precision, quantizer in made.items():
        if quantizer.scheme.tuned:
            _tune(precision, quantizer, program, texts.spoken, reporter)
        if quantizer.scheme.mixed:
            _mix(precision, quantizer, program, source, reporter)
    return made


class _Texts:
    """What weights are calibrated by, made when it is asked for.

    Few bits go by what the model says itself, since what they lose differs from text to text.
    8 bits lose little anywhere, and least by a text that somebody wrote: so by that, where there
    is a tokenizer to read it.
    """

    def __init__(
        self,
        program: Program,
        source: Imported,
        said: Callable[[], list[accuracy.Ids]],
        reporter: Reporter,
    ) -> None:
        self._program, self._said, self._reporter = program, said, reporter
        self._tokenizer = accuracy.tokenizer_of(source)
        self._moments: dict[bool, dict[str, Moments]] = {}

    @cached_property
    def spoken(self) -> list[accuracy.Ids]:
        return self._said()

    def moments(self, *, fine: bool) -> dict[str, Moments]:
        """For 8 bits, or for fewer."""
        written = fine and self._tokenizer is not None
        if written not in self._moments:
            self._moments[written] = self._read(self._written() if written else self.spoken)
        return self._moments[written]

    def _written(self) -> list[accuracy.Ids]:
        """None that anything is judged or measured on."""
        assert self._tokenizer is not None
        return accuracy.sample(self._tokenizer, self._program.context, offset=0.0).windows

    def _read(self, windows: Sequence[accuracy.Ids]) -> dict[str, Moments]:
        windows = windows[:CALIBRATION]
        reference = self._program.reference
        assert reference is not None
        with self._reporter.stage("reading", "calibration text", len(windows)) as advance:

            def read(ids: accuracy.Ids) -> None:
                reference(torch.from_numpy(ids[None]))
                advance(1)

            return moments(self._program.weights, read, windows)


def _eager(program: Program) -> Run:
    model = cast(Scorer, program.weights)
    return lambda ids: model(torch.from_numpy(ids[None]), model.eager(len(ids)))[0]


def _tune(
    precision: str,
    quantizer: Quantizer,
    program: Program,
    windows: Sequence[accuracy.Ids],
    reporter: Reporter,
) -> None:
    run = _eager(program)
    with reporter.stage("rounding", f"{precision}, matrix by matrix"):
        quantizer.prepare_for(run, windows[0])
    with reporter.stage("tuning", f"{precision}, all scales together", len(windows)) as advance:
        tune(quantizer, run, windows, advance)


def _mix(
    precision: str,
    quantizer: Quantizer,
    program: Program,
    source: Imported,
    reporter: Reporter,
) -> None:
    """Let the matrices that cost most have 8 bits, until the precision's budget holds, on text
    that is not what the result is measured on."""
    tokenizer = accuracy.tokenizer_of(source)
    if tokenizer is None:
        reporter.line("note", f"{precision} is not held to a budget: no tokenizer to read a text")
        return
    windows = accuracy.sample(tokenizer, program.context, offset=0.25).windows
    with reporter.stage("mixing", f"{precision}, within its budget"):
        found = widen(quantizer, _eager(program), windows, accuracy.BUDGET[precision])
    quantizer.mixed = found
    if found["names"]:
        reporter.line(
            "mixed",
            f"{precision}: {len(found['names'])} of {found['matrices']} matrices keep 8 bits, "
            f"perplexity ratio {found['narrow_ratio']:.4f} to {found['ratio']:.4f}",
        )


def accuracy_of(
    work: Path,
    program: Program,
    source: Imported,
    rewriters: Mapping[str, Rewriter],
    reporter: Reporter,
) -> dict[str, Any] | None:
    """The accuracy report of an unpublished bundle, or None where there is nothing to compare."""
    bundle = Bundle.open(work, verify=False)
    if program.reference is None or not accuracy.inexact(bundle.manifest):
        return None
    tokenizer = accuracy.tokenizer_of(source)
    if tokenizer is None:
        reporter.line("note", "accuracy not measured: the model has no tokenizer to read a text")
        return None
    sample = accuracy.sample(tokenizer, program.context)
    found = accuracy.measure(bundle, program, rewriters, sample.windows, reporter)
    report = accuracy.report(bundle, rewriters, found, sample.origin)
    for name, one in report["variants"].items():
        if not one["within_budget"]:
            reporter.line(
                "note",
                f"{name} costs more than its budget: perplexity ratio {one['ratio']:.4f}, "
                f"{one['budget']} allowed",
            )
    return report
