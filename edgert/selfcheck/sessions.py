"""Whether what is saved goes on as if it had not stopped: in a fresh process, on this device."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgert.child import ask
from edgert.sampler import SamplingParams
from edgert.selfcheck.report import Check, verdict
from edgert.selfcheck.subject import Subject

FIRST, REST = 6, 10
"""Tokens before and behind the save; sampled, so that the random draws must go on as well."""
_TIMEOUT_S = 900


def session_round_trip(subject: Subject) -> Check:
    """Raises what loading raises."""
    with tempfile.TemporaryDirectory(prefix="edgert-selfcheck-") as folder:
        file = Path(folder) / "saved"
        with subject.model() as model:
            if subject.solves:
                solving = model.solving(subject.inputs, halt="full")
                whole = [one.values.tolist() for one in solving.run() if one.values is not None]
                solving = model.solving(subject.inputs, halt="full")
                solving.step()
                solving.stop()
                nbytes = solving.save(file)
                begun: list[Any] = []
            else:
                ids = subject.inputs.tolist()
                whole = list(model.generate(ids, params(FIRST + REST)).tokens)
                with model.session() as session:
                    begun = list(session.generate(ids, params(FIRST)).tokens)
                    nbytes = session.save(file)
        went_on = fresh_process(subject, file)
    figures = {"variant": subject.variant, "bytes": nbytes}
    what = f"{len(whole)} puzzles" if subject.solves else f"{FIRST} + {REST} tokens"
    if begun + went_on == whole:
        said = f"{what}, saved and resumed in a fresh process: as uninterrupted"
        return verdict("session", [], said, figures)
    pairs = enumerate(zip(begun + went_on, whole, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(begun + went_on), len(whole)))
    unit = "puzzle" if subject.solves else "token"
    return verdict("session", [f"a resumed session differs from {unit} {at} on"], "", figures)


def params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=1.0, seed=16, ignore_eos=True)


def fresh_process(subject: Subject, file: Path) -> list[Any]:
    """What it makes of the rest. Raises EdgertError with what it said if it failed."""
    job = {
        "file": str(file),
        "bundle": str(subject.path),
        "solves": subject.solves,
        "device": subject.device,
    }
    what = "the process that resumes the session"
    return list(ask("edgert.selfcheck.sessions", json.dumps(job), what, _TIMEOUT_S))


def child() -> None:
    """What runs in the fresh process: a job on stdin, the rest on stdout."""
    from edgert.resuming import resume, resume_solving

    job = json.load(sys.stdin)
    file, options = job["file"], {"bundle": job["bundle"], "device": job["device"]}
    if job["solves"]:
        found = resume_solving(file, **options).run()
        print(json.dumps([one.values.tolist() for one in found if one.values is not None]))
        return
    with resume(file, **options) as session:
        print(json.dumps(session.generate(max_tokens=REST).tokens))


if __name__ == "__main__":
    child()
