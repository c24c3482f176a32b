"""What a self-check found: a verdict for each check, and one JSON object of all.

docs/jetson.md lists the fields.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgert._version import __version__
from edgert.bench import facts

MARK = "edgert_selfcheck"
FORMAT = 1

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """name: files, parity, halting, session, latency, power or expected. `said` is for people:
    what was compared, or what differs and where; `figures` are for machines."""

    name: str
    status: Status
    said: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def verdict(name: str, wrong: Sequence[str], said: str, figures: Mapping[str, Any]) -> Check:
    """`failed` with everything that is wrong, else `ok` with what was compared."""
    if wrong:
        return Check(name, "failed", "; ".join(wrong), figures)
    return Check(name, "ok", said, figures)


@dataclass(frozen=True)
class Report:
    bundle: Mapping[str, Any]
    device: Mapping[str, Any]
    checks: tuple[Check, ...]
    answers: Mapping[str, Any]  # for `--expect` on another machine

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == "failed"]

    def to_json(self) -> dict[str, Any]:
        return {
            MARK: FORMAT,
            "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": __version__,
            "ok": not self.failed,
            "bundle": dict(self.bundle),
            "device": dict(self.device),
            "checks": [
                {
                    "name": check.name,
                    "status": check.status,
                    "said": check.said,
                    "figures": dict(check.figures),
                }
                for check in self.checks
            ],
            "answers": dict(self.answers),
        }


SHOWN = ("onnxruntime", "CUDA driver", "TensorRT", "Jetson", "JetPack", "power mode")
"""Rows of the doctor that say what ran; others hold paths, which are nobody's business."""


def this_device() -> dict[str, Any]:
    """The machine, without a name or path that is its owner's."""
    from edgert.doctor import examine

    rows = {row.name: row.finding for row in examine().rows if row.name in SHOWN}
    return {
        "name": facts.device_name(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "governor": facts.governor(),
        "clocks": facts.clocks(),
        "temp_c": facts.temperatures(),
        "found": rows,
    }
