"""From a session file to the session: find its bundle, prove that it is the one, take it up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgert.bundle import read_manifest
from edgert.errors import SessionMismatch, UsageError
from edgert.files import MANIFEST
from edgert.model import Model, load
from edgert.pausing import restore
from edgert.session import Session
from edgert.sessionfile import SavedSession, read_session
from edgert.solving import Look, Solving
from edgert.solvingfile import SavedSolving, read_solving
from edgert.vault import key_from

OWN_CHOICE = ("precision", "kv", "lowering", "variant")
"""Arguments of `load` that the session decides: it belongs to one variant."""


def resume(
    path: str | os.PathLike[str],
    model: Model | None = None,
    *,
    bundle: str | os.PathLike[str] | None = None,
    passphrase: str | None = None,
    key_file: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Session:
    """The session that `Session.save` wrote, in this process or another.

    model     the loaded model to resume it on; None loads the bundle it was saved with, and closing
              the session then closes that model
    bundle    where that bundle is now; None looks where it was, absolutely and seen from the file
    options   those of `load`; threads and prepack are by default as they were

    On the same backend version, instruction set, number of threads and lowering it goes on bitwise
    as if it had never stopped; `Session.notes` names what differs, and then it goes on within the
    parity tolerance. docs/session.md has the promise in full.
    Raises BadSession (damaged, or no session), NewerFormat, WrongKey, SessionMismatch (another
    bundle or variant, or its bundle is not found), what `load` raises, OutOfMemory.
    """
    where = Path(path)
    saved = read_session(where, key_from(passphrase, key_file))
    if model is not None:
        _refuse_options(bundle, options)
        return Session.restore(model, saved, str(where))
    with _loaded(where, saved, bundle, options) as loaded:
        session = Session.restore(loaded, saved, str(where))
    session.owns_model = True
    return session


def resume_solving(
    path: str | os.PathLike[str],
    model: Model | None = None,
    *,
    deadline_ms: float | None = None,
    on_step: Callable[[Look], object] | None = None,
    bundle: str | os.PathLike[str] | None = None,
    passphrase: str | None = None,
    key_file: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Solving:
    """What `Solving.save` wrote: the puzzles go on where they were, by the same policy.

    deadline_ms, on_step  as `Model.solving` takes them, from now on
    The rest, and what is raised, as in `resume`; so is the promise that it goes on bitwise.
    """
    where = Path(path)
    saved = read_solving(where, key_from(passphrase, key_file))
    more: dict[str, Any] = {"deadline_ms": deadline_ms, "on_step": on_step}
    if model is not None:
        _refuse_options(bundle, options)
        return restore(model, saved, str(where), **more)
    with _loaded(where, saved, bundle, options) as loaded:
        solving = restore(loaded, saved, str(where), **more)
    solving.owns_model = True
    return solving


def _refuse_options(bundle: str | os.PathLike[str] | None, options: dict[str, Any]) -> None:
    if bundle is not None or options:
        raise UsageError("a model is given, so it is not loaded with other arguments")


@contextmanager
def _loaded(
    where: Path,
    saved: SavedSession | SavedSolving,
    bundle: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> Iterator[Model]:
    """The model that a file belongs to, which is closed if what is done with it fails."""
    refused = [name for name in OWN_CHOICE if options.get(name) is not None]
    if refused:
        raise UsageError(
            f"{refused[0]} cannot be chosen: the session belongs to {saved.bundle.variant}",
            where=str(where),
        )
    root, variant, nbytes = find_bundle(where, saved, bundle)
    loaded = load(root, **_as_it_was(saved, variant, nbytes, options))
    try:
        yield loaded
    except BaseException:
        loaded.close()
        raise


def find_bundle(
    path: Path, saved: SavedSession | SavedSolving, bundle: str | os.PathLike[str] | None = None
) -> tuple[Path, str, int]:
    """The directory of a session's bundle, `bundle` or where the session says it was; the session's
    variant in it, and the bytes of its files.

    Raises SessionMismatch if it is not there, or another one is; BadBundle if it is broken.
    """
    hint = saved.bundle
    tried = [Path(bundle)] if bundle is not None else []
    if bundle is None and hint.path is not None:
        tried.append(Path(hint.path))
    if bundle is None and hint.relative is not None:
        tried.append(path.parent / hint.relative)
    seen = []
    for root in tried:
        if bundle is None and not os.path.isfile(root / MANIFEST):  # any hint is just a hint
            continue
        manifest = read_manifest(root)
        for name, variant in manifest.variants.items():
            if variant.variant_id == hint.variant_id:
                return root, name, manifest.bytes_of(name)
        seen.append(f"{root} is {manifest.name} ({manifest.model_id[:12]})")
    own = f"{path} was saved with {hint.name} {hint.variant} ({hint.model_id[:12]})"
    if seen:
        raise SessionMismatch(
            "this session belongs to another bundle",
            where=f"{own}; {seen[0]}",
            do="resume it with the bundle it was saved with, or start a new session",
        )
    verb = "solve" if isinstance(saved, SavedSolving) else "run"
    raise SessionMismatch(
        "the session's bundle is not where it was",
        where=f"{own} at {hint.path or 'a place that is not recorded'}",
        do=f"say where it is now:  edgert {verb} BUNDLE --session {path}",
    )


def _as_it_was(
    saved: SavedSession | SavedSolving, variant: str, nbytes: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of `load`: what the session needs, and, unless given, what it had."""
    from edgert.backends.ort import default_threads

    had: dict[str, Any] = {"variant": variant}
    threads = saved.place.get("threads", "")
    if threads.isdecimal() and len(threads) < 5 and int(threads) != default_threads(nbytes):
        had["threads"] = int(threads)
    if saved.place.get("prepack") == "false":
        had["prepack"] = False
    given = {name: value for name, value in options.items() if value is not None}
    return had | given
