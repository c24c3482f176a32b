"""Whether this machine says what another one said: a report of it, read and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgert.bench.verify import MARGIN
from edgert.errors import BadFile, Incompatible
from edgert.files import read_regular
from edgert.selfcheck.report import FORMAT, MARK, Check, verdict

MAX_BYTES = 16 << 20


def read_report(path: Path, model_id: str) -> dict[str, Any]:
    """An earlier report of the same model. Raises BadFile, Incompatible (another model's)."""
    try:
        value = json.loads(read_regular(path, MAX_BYTES))
        known = value[MARK] == FORMAT and isinstance(value["answers"], dict)
        other = str(value["bundle"]["model_id"])
    except (ValueError, TypeError, KeyError, RecursionError):
        known, other = False, ""
    if not known:
        raise BadFile(
            "this is not a report of edgert selfcheck",
            where=str(path),
            do="give a file that edgert selfcheck -o wrote, of this version",
        )
    if other != model_id:
        raise Incompatible(
            f"the report is another model's: {other[:12]}, this one is {model_id[:12]}",
            where=str(path),
            do="give a report of the same model",
        )
    return dict(value)


def expected(there: Mapping[str, Any], here: Mapping[str, Any]) -> Check:
    """Best tokens wherever both lead clearly, and iterations. Variants that one of both lacks are
    passed over."""
    wrong: list[str] = []
    compared = unclear = 0
    for variant, mine in here.items():
        theirs = there.get(variant)
        if theirs is None:
            continue
        try:
            pairs = list(
                zip(mine["best"], theirs["best"], mine["lead"], theirs["lead"], strict=True)
            )
            steps = [
                (policy, list(mine["steps"][policy]), list(theirs["steps"][policy]))
                for policy in mine["steps"]
                if policy in theirs["steps"]
            ]
        except (KeyError, TypeError, ValueError):
            wrong.append(f"{variant}: the report's answers are of other inputs")
            continue
        for at, (a, b, lead, other) in enumerate(pairs):
            if not min(lead, other) > MARGIN:
                unclear += 1
                continue
            compared += 1
            if a != b:
                wrong.append(f"{variant}: best token {a} at {at}, there it was {b}")
                break
        wrong += [f"{variant}, {policy}: iterations differ" for policy, a, b in steps if a != b]
        compared += sum(len(a) for _, a, _ in steps)
    if not compared and not wrong:
        return Check("expected", "skipped", "the report has nothing in common with this one")
    said = f"{compared} best tokens and iterations as in the report, {unclear} unclear"
    return verdict("expected", wrong, said, {"compared": compared, "unclear": unclear})
