"""A session from one variant of a model to another: another precision, lowering, or bundle.

A session belongs to one variant, since its state is what that variant's numbers made of its tokens.
Here it is moved to another one, and what that changes is measured: the new variant computes the
state itself, from the tokens, and the two are compared.

    carried     the new session has the old state; where the layouts differ that cannot be
    recomputed  it has the new variant's own
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.bundle import read_manifest
from edgert.errors import ExcessiveDrift, SessionMismatch, UsageError
from edgert.evaluate import divergence
from edgert.model import Model, load
from edgert.runner import Execution, StepIO
from edgert.session import Session
from edgert.sessionfile import MAX_MOVES, Move, SavedSession, read_session, write_session
from edgert.snapshot import check_tokens, hint, mark
from edgert.spec import StateSpec
from edgert.state import check_layout, rows_in
from edgert.tensors import Array
from edgert.vault import key_from

MAX_DRIFT = 0.5
"""Nats of KL at the next token that a carried state may cost, unless the bundle says otherwise
(`max_drift`). docs/session.md has what moves between precisions cost."""


@dataclass(frozen=True)
class Migration:
    """What was moved, and what it changed: `move` is what the new session says of it.

    state   the state that differs most, None where nothing was compared
    bound   nats of KL that were allowed
    nbytes  of the file that was written
    """

    name: str
    variant: str
    variant_id: str
    move: Move
    state: str | None
    bound: float
    nbytes: int


Next = tuple[NDArray[np.float32], int]
"""Logits [V] of the next token, and the best one."""


def migrate(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    replay: bool = False,
    max_drift: float | None = None,
    passphrase: str | None = None,
    key_file: str | os.PathLike[str] | None = None,
    advanced: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Migration:
    """Move a saved session to another variant of its model; the old file stays as it is.

    to        a bundle with that variant; `options` are those of `load`, which choose it
    output    the file of the new session, written whole or not at all
    replay    take the recomputed state, also where the old one could be carried over
    max_drift nats that a carried state may cost, instead of the bundle's bound
    advanced  called with the tokens recomputed so far, and all there are
    An encrypted session stays so, with the same passphrase or key file.
    Raises SessionMismatch (another model's session), ExcessiveDrift (the old state is further from
    the new variant's own than the bundle allows), UsageError (it is that variant's already, or
    `output` is the session itself), and as `edgert.resume` and `Session.save` do.
    """
    where, target = Path(path), Path(output)
    key = key_from(passphrase, key_file)
    saved = read_session(where, key)
    if os.path.exists(target) and os.path.samefile(where, target):
        raise UsageError(
            "the session would be overwritten by its own copy",
            where=str(where),
            do="give another file (-o)",
        )
    _check_model(saved, where, Path(to))
    with load(to, **options) as model:
        runner = model.runner
        if runner.variant.variant_id == saved.bundle.variant_id:
            raise UsageError(
                f"the session belongs to variant {runner.variant_name} already",
                where=str(where),
                do=f"name another one (--variant) of: {', '.join(model.manifest.variants)}",
            )
        bound = bound_of(model) if max_drift is None else max_drift
        moved, state = _moved(model, saved, where, target, None if replay else bound, advanced)
        nbytes = write_session(target, moved, key)
        return Migration(
            name=model.manifest.name,
            variant=runner.variant_name,
            variant_id=runner.variant.variant_id,
            move=moved.moves[-1],
            state=state,
            bound=bound,
            nbytes=nbytes,
        )


def bound_of(model: Model) -> float:
    """Nats of KL that a carried state may cost."""
    bound = model.manifest.max_drift
    return MAX_DRIFT if bound is None else bound


def _check_model(saved: SavedSession, where: Path, to: Path) -> None:
    manifest = read_manifest(to)
    if manifest.model_id != saved.bundle.model_id:
        raise SessionMismatch(
            "the session is another model's: its state means nothing to this one",
            where=f"{where} was saved with {saved.bundle.name} ({saved.bundle.model_id[:12]}); "
            f"{to} is {manifest.name} ({manifest.model_id[:12]})",
            do="give a bundle of the same model, or start a new session",
        )


def _moved(
    model: Model,
    saved: SavedSession,
    where: Path,
    target: Path,
    bound: float | None,
    advanced: Callable[[int, int], None] | None,
) -> tuple[SavedSession, str | None]:
    """The session as the model's own, and the name of the state that differs most. Without a bound
    its state is computed anew."""
    check_tokens(model, saved, str(where))
    there, count, stamp = saved.bundle, int(saved.tokens.size), mark()
    new = replace(
        saved,
        bundle=hint(model, target),
        place=dict(model.runner.backend.build),
        written_by=stamp["written_by"],
        created=stamp["created"],
    )
    execution = model.runner.open(tokens=max(1, count))
    carried = _carried(model, new, where, execution.states.specs) if count else None
    own, following = _recomputed(execution, new, advanced)
    how = "recomputed" if bound is None or carried is None else "carried"
    move = Move(there.variant, there.variant_id, how, count, None, None, None, new.created)
    state = None
    if carried is not None and following is not None:
        state, max_abs = _furthest(new.states, own.states)
        kl = float(divergence(following[0][None], carried[0][None])[0])
        kl = 0.0 if kl < 0.0 else kl  # by rounding; what is no number stays so
        same = carried[1] == following[1]
        move = replace(move, max_abs=_number(max_abs), kl=_number(kl), top1=same)
        if bound is not None and not (kl <= bound and math.isfinite(max_abs)):
            here = model.runner.variant_name
            raise _too_far(move, here, bound, f"{where}: state {state} differs by {max_abs:.3g}")
    kept = new if how == "carried" else own
    return replace(kept, moves=(*saved.moves, move)[-MAX_MOVES:]), state


def _carried(
    model: Model, new: SavedSession, where: Path, specs: Mapping[str, StateSpec]
) -> Next | None:
    """What the model says next, with the state that was computed elsewhere; None where the layouts
    differ. Raises BadSession if the state cannot be that of these tokens."""
    try:
        check_layout(specs, new.states, new.capacity)
    except ValueError:
        return None
    with Session.restore(model, new, str(where)) as session:
        session.append(())  # what resuming it would do first
        last = session.execution.last
        assert last is not None, "something was fed"
        return _next(last)


def _recomputed(
    execution: Execution, new: SavedSession, advanced: Callable[[int, int], None] | None
) -> tuple[SavedSession, Next | None]:
    """The session with the state that the model computes from its tokens, up to where the old state
    was, and what the model says next. All tokens run through all iterations of a loop."""
    rows = _rows(new, execution.states.specs)
    following: Next | None = None
    for io in execution.feed(new.tokens[:rows]):
        following = _next(io)
        if advanced is not None:
            advanced(int(execution.lens[0]), new.tokens.size)
    own = replace(new, states=execution.states.export(), capacity=execution.states.capacity)
    for io in execution.feed(new.tokens[rows:]):
        following = _next(io)
    execution.close()
    return replace(own, pending=None if new.pending is None else following), following


def _next(io: StepIO) -> Next:
    return io.logits[0, -1].copy(), int(io.token[0, -1])


def _rows(new: SavedSession, specs: Mapping[str, StateSpec]) -> int:
    """Tokens that the old state held: usually all but the newest, which the next step reads."""
    total = int(new.tokens.size)
    if new.pending is not None:
        return total
    try:
        return min(max(0, rows_in(specs, new.states)), total)
    except ValueError:
        return max(0, total - 1)


def _furthest(old: Mapping[str, Array], own: Mapping[str, Array]) -> tuple[str, float]:
    """The state with the largest difference, which is infinite where it is no number."""
    found = {}
    for name, array in own.items():
        apart = np.abs(array.astype(np.float64) - old[name].astype(np.float64))
        largest = float(apart.max(initial=0.0))
        found[name] = math.inf if math.isnan(largest) else largest
    name = max(found, key=found.__getitem__)
    return name, found[name]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _too_far(move: Move, here: str, bound: float, where: str) -> ExcessiveDrift:
    cost = "leads to no numbers"
    if move.kl is not None and move.max_abs is not None:
        cost = (
            f"changes the next token's distribution by {move.kl:.3g} nats of KL, "
            f"{bound:g} are allowed"
        )
    return ExcessiveDrift(
        f"the state of {move.variant} is too far from what {here} computes itself: it {cost}",
        where=where,
        do="take the state that it computes itself:  edgert migrate ... --replay",
    )
