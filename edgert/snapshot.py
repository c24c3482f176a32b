"""Between a live session and what a file holds of it: take it, prove that it fits, take it up."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgert._version import __version__
from edgert.errors import BadSession, SessionMismatch
from edgert.sessionfile import SavedSession, checked_data
from edgert.sessionstore import BundleHint
from edgert.speculate import Record
from edgert.state import rows_in

if TYPE_CHECKING:
    from edgert.model import Model
    from edgert.session import Session


def snapshot(session: Session, path: Path | None = None) -> SavedSession:
    """A copy of all that the session is; `path` is where it will be saved.

    Raises UsageError if its data is not JSON.
    """
    model, runner, execution = session.model, session.model.runner, session.execution
    last, held = execution.last, int(execution.lens[0])
    pending = None
    if last is not None and held == len(session.tokens):
        pending = (last.logits[0, last.place].copy(), int(last.token[0, last.place]))
    guess: tuple[int, ...] = ()
    open_ = execution.guessed(session.tokens[-1]) if held == len(session.tokens) - 1 else None
    if open_ is not None:  # a step with guesses still to take: it is repeated where one goes on
        held -= open_.place + 1
        guess = tuple(open_.ids[0, 1:].tolist())
    return SavedSession(
        bundle=hint(model, path),
        tokens=np.asarray(session.tokens, np.int64),
        states=execution.states.export(held),
        capacity=execution.states.capacity,
        pending=pending,
        guess=guess,
        record=tuple(session.record.outcomes),
        request=session.request,
        stream=session.stream_id,
        forks=session.forks,
        place=dict(runner.backend.build),
        data=checked_data(session.data),
        moves=session.moves,
        **mark(),
    )


def mark() -> dict[str, str]:
    """Who writes a file, and when."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"written_by": f"edgert {__version__}", "created": now}


def hint(model: Model, path: Path | None) -> BundleHint:
    """What a file says about the bundle it belongs to; `path` is where the file will be."""
    root = os.path.realpath(model.bundle.root)
    return BundleHint(
        name=model.manifest.name,
        model_id=model.manifest.model_id,
        variant=model.runner.variant_name,
        variant_id=model.runner.variant.variant_id,
        path=_plain(root),
        relative=_plain(os.path.relpath(root, os.path.realpath(path.parent))) if path else None,
    )


def adopt(session: Session, saved: SavedSession) -> None:
    """Make a fresh session what was saved. Raises ValueError if the states are not its own."""
    execution = session.execution
    if execution.states.capacity != saved.capacity:
        raise ValueError(f"it has a capacity of {saved.capacity}")
    execution.restore(saved.states, saved.pending)
    session.tokens = [int(token) for token in saved.tokens]
    session.record = Record(saved.record)
    if saved.guess:
        held = int(execution.lens[0])
        said = len(session.tokens) - held - 1  # of the guesses; the newest is still to be taken
        execution.verify([session.tokens[held], *saved.guess], said - 1)
    session.data = copy.deepcopy(saved.data)
    session.request = saved.request
    session.stream_id, session.forks = saved.stream, saved.forks
    session.moves = saved.moves
    session.notes = differences(saved.place, session.model.runner.backend.build)


def check_fits(model: Model, saved: SavedSession, where: str) -> None:
    """Raise SessionMismatch if the session is another variant's, BadSession if its numbers cannot
    be this model's; before any memory is allocated for it."""
    check_variant(model, saved.bundle, where)
    check_tokens(model, saved, where)
    count = saved.tokens.size
    try:
        rows = rows_in(model.runner.states, saved.states)
    except ValueError as error:
        raise not_of_this_model(str(error), where) from None
    if not 0 <= rows <= min(count, saved.capacity) or saved.capacity > model.manifest.context:
        wrong = f"it has {rows} rows of {count} tokens in a capacity of {saved.capacity}"
    elif saved.pending is not None and rows != count:
        wrong = "it has results of a token that is not its newest"
    elif saved.guess and not _is_guessed(model, saved, rows):
        wrong = f"its {len(saved.guess)} guesses do not belong to its tokens"
    else:
        return
    raise not_of_this_model(wrong, where)


def _is_guessed(model: Model, saved: SavedSession, rows: int) -> bool:
    """Whether a step of the model has read the newest tokens behind so many rows as guesses."""
    guess, right = saved.guess, saved.tokens[rows + 1 :].tolist()
    return (
        bool(right)
        and list(guess[: len(right)]) == right
        and max(guess) < model.manifest.vocab_size
        and rows + 1 + len(guess) <= saved.capacity
        and model.runner.can_speculate()
    )


def check_tokens(model: Model, saved: SavedSession, where: str) -> None:
    """Raise BadSession if the tokens cannot be this model's."""
    count, vocab, context = saved.tokens.size, model.manifest.vocab_size, model.manifest.context
    if count > context:
        wrong = f"{count} tokens are more than the context of {context}"
    elif count and not 0 <= saved.tokens.min() <= saved.tokens.max() < vocab:
        wrong = f"it has token ids outside the vocabulary of {vocab}"
    else:
        return
    raise not_of_this_model(wrong, where)


def check_variant(model: Model, hint: BundleHint, where: str) -> None:
    """Raise SessionMismatch if a file belongs to another variant than the one that is loaded."""
    if hint.variant_id != model.runner.variant.variant_id:
        raise _mismatch(model, hint, where)


def not_of_this_model(wrong: str, where: str) -> BadSession:
    return BadSession(
        f"the session is not one of this model: {wrong}",
        where=where,
        do="take an older copy, or start a new session",
    )


def _plain(path: str) -> str | None:
    """A path that text can carry, or None: the hint is a convenience."""
    return path if path.isprintable() and len(path) <= 4096 else None


def differences(then: dict[str, str], now: dict[str, str]) -> tuple[str, ...]:
    """What decides the bits of a result and is not as it was, in words."""
    return tuple(
        f"{key} {then.get(key, 'unknown')} → {now.get(key, 'unknown')}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    )


def _mismatch(model: Model, hint: BundleHint, where: str) -> SessionMismatch:
    runner = model.runner
    variants = model.manifest.variants
    fits = next((n for n, v in variants.items() if v.variant_id == hint.variant_id), None)
    if fits is not None:
        return SessionMismatch(
            f"the session belongs to variant {fits} of this bundle, and {runner.variant_name} is "
            "loaded",
            where=where,
            do=f"load it with --variant {fits}, or move it:  edgert migrate {where} --to "
            f"{model.bundle.root} --variant {runner.variant_name} -o NEW",
        )
    return SessionMismatch(
        "this session belongs to another bundle",
        where=f"{where} was saved with {hint.name} {hint.variant} ({hint.variant_id[:12]}); "
        f"{model.bundle.root} is {model.manifest.name} {runner.variant_name} "
        f"({runner.variant.variant_id[:12]})",
        do="resume it with the bundle it was saved with, or start a new session",
    )
