"""`edgert selfcheck`: does this bundle do on this device what it should? One report of all.

    files    every hash
    parity   all ways to compute the same agree: whole and stepped, lowerings, precisions
    halting  loops end behind the same iteration
    session  saved, resumed in a fresh process, as uninterrupted
    latency  a small bench; what was timed is verified
    power    the board's own sensors, where there are some
    expected what a report from another machine says, if one is given

A check that fails does not stop those behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgert.bundle import Bundle
from edgert.errors import EdgertError
from edgert.model import variant_at_hand
from edgert.progress import Reporter
from edgert.selfcheck.expected import expected, read_report
from edgert.selfcheck.halting import halting
from edgert.selfcheck.parity import parity
from edgert.selfcheck.report import Check, Report, this_device
from edgert.selfcheck.sessions import session_round_trip
from edgert.selfcheck.speed import latency
from edgert.selfcheck.subject import Subject, inputs_of

__all__ = ["Check", "Report", "selfcheck"]


def selfcheck(
    path: Path,
    *,
    device: str = "auto",
    variant: str | None = None,
    precision: str | None = None,
    lowering: str | None = None,
    kv: str | None = None,
    threads: int = 0,
    prepack: bool = True,
    expect: Path | None = None,
    reporter: Reporter | None = None,
    hashed: Callable[[int], None] | None = None,
) -> Report:
    """Run every check on this machine.

    variant, precision, lowering, kv  choose what sessions and times are taken of, as `load` does;
            parity and halting are of all variants that the device runs
    expect  a report of the same model from another machine
    hashed  is called with the bytes of each chunk that was hashed
    Raises BadBundle (not a sound bundle: nothing can be checked), Incompatible (no such variant or
    device; the report is another model's), BadFile (no report).
    """
    reporter = reporter or Reporter()
    bundle = Bundle.open(path, True, hashed)
    manifest = bundle.manifest
    chosen = variant_at_hand(manifest, device, precision, lowering, variant, kv)
    there = read_report(expect, manifest.model_id) if expect else None
    inputs = inputs_of(bundle)
    subject = Subject(path, bundle, device, threads, prepack, chosen, inputs)
    total = sum(entry.bytes for entry in manifest.files.values())
    checks = [Check("files", "ok", f"{len(manifest.files)} files, every hash", {"bytes": total})]

    def run(name: str, text: str, work: Callable[[], Check]) -> Check:
        with reporter.stage(name, text):
            try:
                checks.append(work())
            except EdgertError as error:
                said = "; ".join(filter(None, (error.what, error.where)))
                checks.append(Check(name, "failed", said))
        return checks[-1]

    policies = _policies(there)
    run("parity", f"{len(subject.variants)} variants", lambda: parity(subject))
    run("halting", "every stepped variant", lambda: halting(subject, policies))
    run("session", chosen, lambda: session_round_trip(subject))
    measured: list[Check] = []

    def timed() -> Check:
        measured.extend(latency(subject))
        return measured[0]

    run("latency", chosen, timed)
    checks += measured[1:] or [Check("power", "skipped", "nothing was timed")]
    answers = _answers(checks)
    if there is not None:
        checks.append(expected(there["answers"], answers))
    about = {
        "name": manifest.name,
        "model_id": manifest.model_id,
        "variants": {name: v.variant_id for name, v in manifest.variants.items()},
        "chosen": chosen,
        "parameters": manifest.parameters,
    }
    return Report(about, this_device(), tuple(checks), answers)


def _answers(checks: list[Check]) -> dict[str, Any]:
    """By variant, what another machine should say, too."""
    figures = {check.name: check.figures for check in checks}
    best = figures.get("parity", {}).get("answers", {})
    steps = figures.get("halting", {}).get("steps", {})
    return {
        variant: {
            **best.get(variant, {"best": [], "lead": []}),
            "steps": {
                policy: found["iterations"] for policy, found in steps.get(variant, {}).items()
            },
        }
        for variant in sorted({*best, *steps})
    }


def _policies(there: dict[str, Any] | None) -> list[str] | None:
    """The policies of the other machine's report: a threshold is chosen by what was seen there."""
    if there is None:
        return None
    for answer in there["answers"].values():
        steps = answer.get("steps") if isinstance(answer, dict) else None
        if isinstance(steps, dict) and steps:
            return [str(policy) for policy in steps]
    return None
