"""Whether what was timed is what the model says: figures of a wrong answer are not printed.

Two checks. All timed requests must have said the same tokens. And these must be what the model
says on another path: the whole sequence read at once, by the bundle's other lowering where it has
one, asked after each token for the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.bench.plan import Work, digest
from edgert.errors import EdgertError, GateFailed
from edgert.files import read_regular
from edgert.halting import Halt
from edgert.model import Model
from edgert.runner import SCORE_CHUNK, Execution

MARGIN = 1e-3
"""Lead of the best logit over the second below which two correct paths may differ."""

_LOGITS = 2  # in a lead
_MAX_PARITY_BYTES = 1 << 20


@dataclass(frozen=True)
class Verified:
    """What the check has seen: on which path, at how many places, with how small a lead."""

    path: str
    compared: int
    unclear: int  # places where the reference's own lead is below the margin
    margin: float
    sha256: str


def check_repeats(answers: Sequence[Sequence[int]]) -> str:
    """The SHA-256 that all answers share. Raises GateFailed naming the first difference."""
    first = list(answers[0])
    for repeat, answer in enumerate(answers[1:], 2):
        if list(answer) != first:
            place = next(
                (i for i, (a, b) in enumerate(zip(first, answer, strict=False)) if a != b),
                min(len(first), len(answer)),
            )
            raise GateFailed(
                "the timed requests did not all give the same tokens, so their times mean nothing",
                where=f"request {repeat} of {len(answers)} differs from the first at token {place}",
                do="check the machine and the bundle (edgert verify), then measure again",
            )
    return digest(first)


def check_reference(
    model: Model,
    work: Work,
    answer: Sequence[int],
    iterations: Sequence[int] = (),
    *,
    margin: float = MARGIN,
) -> Verified:
    """Compare an answer with what `model` says when it reads depth, prompt and answer at once.

    iterations  of its tokens after the first: where the loop ended early, the reference reads
                token by token, each to the same depth
    Memory: the logits of SCORE_CHUNK positions. Raises GateFailed for the first token that differs
    where the lead exceeds the margin, and if there is no such place at all; OutOfMemory.
    """
    prompt = [*work.depth, *work.ids]
    compared = unclear = 0
    execution = model.runner.open(tokens=len(prompt) + len(answer))
    try:
        if len(prompt) > 1:
            for _ in execution.feed(np.asarray(prompt[:-1], np.int64), chunk=SCORE_CHUNK):
                pass
        fed = np.asarray([prompt[-1], *answer[:-1]], np.int64)  # what each token was chosen behind
        early = work.plan.halt is not None
        logits = _stepped(execution, fed, iterations) if early else _scored(execution, fed)
        for place, (token, row) in enumerate(zip(answer, logits, strict=True)):
            best, lead = _best(row)
            if not lead > margin:
                unclear += 1
            elif token == best:
                compared += 1
            else:
                raise GateFailed(
                    f"token {place} of the timed answer is {token}, the reference says {best} "
                    f"with a lead of {lead:.3g}: what was timed is not this model",
                    where=f"reference: {_path(model, early)}",
                    do="export the bundle again, or report the backend and its version",
                )
    finally:
        execution.close()
    if not compared:
        raise GateFailed(
            f"none of the {len(answer)} tokens can be verified: the reference's best logit never "
            f"leads by more than {margin:g}",
            where=f"reference: {_path(model, early)}",
            do="measure with a longer answer (-n)",
        )
    return Verified(_path(model, early), compared, unclear, margin, digest(answer))


def _scored(execution: Execution, fed: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """The logits behind each token, read in chunks."""
    for start in range(0, len(fed), SCORE_CHUNK):
        part = fed[start : start + SCORE_CHUNK]
        logits = np.empty((len(part), execution.runner.manifest.vocab_size), np.float32)
        execution.score(part, logits)
        yield from logits


def _stepped(
    execution: Execution, fed: NDArray[np.int64], iterations: Sequence[int]
) -> Iterator[NDArray[np.float32]]:
    """The same token by token; all but the first, which ends the prompt, to a given depth."""
    for token, depth in zip(fed.tolist(), (None, *iterations), strict=True):
        halt = None if depth is None else Halt(least=depth, most=depth)
        yield execution.step(token, halt).logits[0, 0]


def _path(model: Model, early: bool) -> str:
    how = "token by token, each as deep" if early else "whole sequence at once"
    return f"{model.runner.variant_name}, {how}"


def _best(logits: NDArray[np.float32]) -> tuple[int, float]:
    """The best token and its lead over the second; a lead of 0 where a logit is not a number."""
    if logits.size < 2 or np.isnan(logits).any():
        return int(logits.argmax()), 0.0
    second, first = np.partition(logits, -2)[-2:]
    return int(logits.argmax()), float(first) - float(second)


def check_expected(found: str, expected: str, where: str) -> None:
    """Raise GateFailed if the answer's hash is not the one that the user gave."""
    if found != expected:
        raise GateFailed(
            f"the answer's SHA-256 is {found}, the reference's is {expected}",
            where=where,
            do="measure the bundle, prompt and precision that the reference was made with",
        )


def margin_of(model: Model) -> float:
    """The margin for a variant: MARGIN, or more where the bundle's own parity report saw more.

    Graphs that each lie within some error of the truth may differ by twice as much, and a lead
    counts two logits: four times the largest difference of any variant with the same numbers that
    the gate let pass. Or, as rounding falls one way or the other, twice the largest difference that
    it saw between two ways of feeding one. A variant that rounds activations lies far from the
    truth and near itself: there the latter alone counts.
    """
    alike = model.manifest.like(model.runner.variant_name)
    if "parity.json" not in model.manifest.reports:
        return MARGIN
    try:
        report = json.loads(read_regular(model.bundle.root / "parity.json", _MAX_PARITY_BYTES))
        checks = [check for check in report["checks"] if check["variant"] in alike]
        seen = [float(check["paths_max_abs"]) * _LOGITS for check in checks]
        seen += [
            float(check["logits_max_abs"]) * _LOGITS * 2
            for check in checks
            if check.get("activations") != "int8"
        ]
    except (EdgertError, ValueError, TypeError, KeyError, RecursionError):
        return MARGIN
    worst = max((value for value in seen if np.isfinite(value)), default=0.0)
    return max(MARGIN, worst)
