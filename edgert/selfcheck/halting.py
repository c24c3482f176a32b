"""Whether loops end behind the same iteration, whoever runs them.

A decoder's loop is run by every lowering with the same policies, token by token; an early end
changes what later tokens find, so one that differs shows in those behind it, too. Puzzles are
solved together and one at a time: when one ends must not depend on the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.halting import SIGNAL, Halt, parse_halt
from edgert.model import Model
from edgert.selfcheck.report import Check, verdict
from edgert.selfcheck.subject import Subject


def halting(subject: Subject, policies: list[str] | None = None) -> Check:
    """`policies`: those of another machine's report, else chosen here. Raises what loading raises,
    UsageError for a policy that this model cannot follow."""
    manifest = subject.bundle.manifest
    if manifest.program.loop is None:
        return Check("halting", "skipped", "the model has no loop")
    stepped = [name for name in subject.variants if not subject.unrolled(name)]
    if not stepped:
        return Check("halting", "skipped", "no variant that this device runs has a stepped loop")
    wrong: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    for variant in stepped:
        with subject.model(variant) as model:
            if policies is None:
                policies = _policies(model, subject)
            found[variant] = {policy: _steps(model, subject, policy) for policy in policies}
            if subject.solves:
                alone = {policy: _steps(model, subject, policy, batch=1) for policy in policies}
                wrong += _different(alone, found[variant], variant, "solved one at a time")
    if not policies:
        return Check("halting", "skipped", "the loop has no signal to end by")
    pairs = 0
    for variant in stepped[1:]:
        other = next((n for n in stepped if n in manifest.like(variant) and n != variant), None)
        if other is not None and stepped.index(other) < stepped.index(variant):
            pairs += 1
            wrong += _different(found[variant], found[other], variant, other)
    if not pairs and not subject.solves:
        said = f"one stepped variant of each precision ({', '.join(stepped)}): nothing to compare"
        return Check("halting", "skipped", said, {"policies": policies, "steps": found})
    kind = "puzzles" if subject.solves else "tokens"
    said = f"same iterations of {len(subject.inputs)} {kind} by {', '.join(policies)}"
    said += f" in {', '.join(stepped)}"
    figures = {"policies": policies, "steps": found}
    return verdict("halting", wrong, said, figures)


def _policies(model: Model, subject: Subject) -> list[str]:
    """Thresholds that lie within what the signal really is here, and far from any of its values, so
    that rounding does not decide."""
    if subject.solves:
        return ["full", "trained"] if model.runner.loop and model.runner.loop.halt else ["full"]
    if not model.runner.can_halt:
        return []
    seen = [step.signals[SIGNAL] for step in model.trace(subject.inputs[None])][1:]
    if not seen:
        return []
    values = np.unique(np.concatenate([array.ravel() for array in seen]))
    middle = values[len(values) // 5 : max(2, len(values) * 4 // 5)]
    if len(middle) < 2:
        return []
    at = int(np.argmax(np.diff(middle)))
    chosen = f"settle:{float(middle[at] + middle[at + 1]) / 2:.4g}"
    return [chosen, "fixed:1"]


def _steps(model: Model, subject: Subject, policy: str, batch: int = 32) -> dict[str, list[int]]:
    """Iterations of each token or puzzle, and the best tokens behind it."""
    if subject.solves:
        answers = model.solve(subject.inputs, halt=policy, batch=batch)
        cells = [int(value) for one in answers for value in one.values]
        return {"iterations": [one.steps for one in answers], "answers": cells}
    halt: Halt = parse_halt(policy)
    execution = model.runner.open(tokens=len(subject.inputs))
    iterations, best = [], []
    try:
        for token in subject.inputs.tolist():
            io = execution.step(token, halt)
            iterations.append(int(io.iterations[0]))
            best.append(int(io.logits[0, 0].argmax()))
    finally:
        execution.close()
    return {"iterations": iterations, "answers": best}


def _different(mine: dict[str, Any], theirs: dict[str, Any], variant: str, other: str) -> list[str]:
    """By policy, the first place where iterations differ."""
    found = []
    for policy, steps in mine.items():
        for index, (a, b) in enumerate(
            zip(steps["iterations"], theirs[policy]["iterations"], strict=True)
        ):
            if a != b:
                found.append(
                    f"{variant} against {other}, {policy}: {a} iterations at {index}, not {b}"
                )
                break
    return found
