"""What was saved, taken up again with the options of `placement` where they were given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import load_options
from edgert.cli.show import hashing, note

if TYPE_CHECKING:
    from edgert.session import Session
    from edgert.solving import Solving


def resumed(
    file: Path, bundle: Path | None, given: dict[str, Any], keys: dict[str, Any]
) -> Session:
    """The saved session."""
    from edgert.resuming import resume

    with hashing(None, quiet=given["quiet"]) as advance:
        session = resume(file, bundle=bundle, progress=advance, **_placed(given), **keys)
    _tell(session.notes, given)
    return session


def resumed_solving(
    file: Path, bundle: Path | None, given: dict[str, Any], keys: dict[str, Any]
) -> Solving:
    """The saved puzzles."""
    from edgert.resuming import resume_solving

    with hashing(None, quiet=given["quiet"]) as advance:
        solving = resume_solving(
            file,
            bundle=bundle,
            deadline_ms=given["deadline_ms"],
            progress=advance,
            **_placed(given),
            **keys,
        )
    _tell(solving.notes, given)
    return solving


def _placed(given: dict[str, Any]) -> dict[str, Any]:
    """The options of `placement` for what goes on: unset ones stay as they were."""
    chosen = load_options(given)
    prepack = None if chosen["prepack"] else False
    return chosen | {"threads": chosen["threads"] or None, "prepack": prepack}


def _tell(notes: tuple[str, ...], given: dict[str, Any]) -> None:
    if notes:
        text = "── goes on within tolerance, not bit for bit: " + ", ".join(notes)
        note(text, quiet=given["quiet"])
