"""Puzzles on their way, and what a file holds of them: take it, prove that it fits, go on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.backends.base import Array
from edgert.errors import BadSession, UsageError
from edgert.exits import Exit
from edgert.puzzles import checked_ids, checked_rows
from edgert.snapshot import check_variant, differences, hint, mark
from edgert.solving import Solution, Solving
from edgert.solvingfile import Answers, SavedSolving
from edgert.spec import resolve

if TYPE_CHECKING:
    from edgert.model import Model


def pause(solving: Solving, path: Path | None = None) -> SavedSolving:
    """A copy of all that is needed to go on; `path` is where it will be saved.

    Raises UsageError if the model is closed, Poisoned if an iteration failed.
    """
    solving.check()
    runner = solving.model.runner
    return SavedSolving(
        bundle=hint(solving.model, path),
        ids=solving.ids,
        rows=solving.rows,
        seats=solving.seats(),
        answers=_answers(solving),
        waiting=solving.waiting,
        policy=str(solving.exit),
        batch=solving.batch,
        logits=solving.logits,
        iterations=solving.iterations,
        ns=solving.spent_ns,
        graph_ns=solving.graph_ns,
        place=dict(runner.backend.build),
        **mark(),
    )


def _answers(solving: Solving) -> Answers:
    """What has ended; the best so far of the rest is found again."""
    open_ = solving.in_loop()
    done = {
        i: answer
        for i, answer in sorted(solving.answers.items())
        if i < solving.waiting and i not in open_
    }
    names = _results(solving.model, solving.logits)
    results: dict[str, Array] = {}
    for name, (dtype, shape) in names.items():
        given = [a.values if name == "token" else a.results[name] for a in done.values()]
        results[name] = np.array(given, dtype).reshape(len(done), *shape)
    return Answers(
        index=np.array(list(done), np.int64),
        steps=np.array([a.steps for a in done.values()], np.int64),
        halted=np.array([a.halted for a in done.values()], np.bool_),
        ns=np.array([round(a.seconds * 1e9) for a in done.values()], np.int64),
        results=results,
    )


def _results(model: Model, logits: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What is kept of an answer: dtype and shape by name."""
    return {
        name: (spec.dtype, resolve(spec.shape[1:], {}))
        for name, spec in model.manifest.results.items()
        if logits or name != "logits"
    }


def restore(
    model: Model, saved: SavedSolving, where: str = "the session", **options: Any
) -> Solving:
    """Saved puzzles on a model, as they were. `where` names them in messages.

    options  deadline_ms and on_step, of `Solving`
    Raises SessionMismatch if they were saved with another bundle or variant, BadSession if the
    content cannot be that of this model, OutOfMemory, UsageError if the model is closed.
    """
    check_variant(model, saved.bundle, where)
    model.runner.check_open()
    exit = _checked(model, saved, where)
    solving = Solving(
        model,
        np.array(saved.ids, np.int32),
        np.array(saved.rows, np.int64),
        exit,
        batch=saved.batch,
        logits=saved.logits,
        **options,
    )
    answers, results = saved.answers, dict(saved.answers.results)
    tokens = results.pop("token")
    for at, index in enumerate(answers.index.tolist()):
        solving.answers[index] = Solution(
            tokens[at].astype(np.int32),
            int(answers.steps[at]),
            "halted" if answers.halted[at] else "limit",
            int(answers.ns[at]) / 1e9,
            {name: array[at].copy() for name, array in results.items()},
        )
    solving.adopt(saved.seats, saved.waiting, saved.iterations, saved.ns, saved.graph_ns)
    solving.notes = differences(saved.place, model.runner.backend.build)
    return solving


def _checked(model: Model, saved: SavedSolving, where: str) -> Exit:
    """The policy. Raises BadSession for what cannot be this model's, before memory is allocated."""
    loop, seats, answers = model.runner.loop, saved.seats, saved.answers
    if not model.manifest.solves or loop is None:
        raise _refused("it has puzzles", where)
    try:
        checked_ids(model, saved.ids)
        checked_rows(model, saved.rows, len(saved.ids))
        exit = model.runner.exit(saved.policy)
    except UsageError as error:
        raise _refused(error.what, where) from None
    if str(exit) != saved.policy:
        raise _refused("its policy is not spelled as it is written", where)
    taken = int((seats.index >= 0).sum())
    tensors = {f"carry.{name}": (array, taken) for name, array in seats.carry.items()}
    tensors |= {f"result.{n}": (array, len(answers.index)) for n, array in answers.results.items()}
    wanted = {
        f"carry.{name}": (spec.dtype, resolve(spec.shape[1:], {}))
        for name, spec in loop.values.items()
        if len(seats.index)  # before the first iteration there are no rows
    }
    wanted |= {f"result.{n}": kind for n, kind in _results(model, saved.logits).items()}
    if tensors.keys() != wanted.keys():
        raise _refused(f"it has {', '.join(sorted(tensors))}", where)
    for name, (dtype, shape) in wanted.items():
        array, rows = tensors[name]
        if (array.dtype, array.shape) != (np.dtype(dtype), (rows, *shape)):
            raise _refused(f"{name} is {array.dtype} of shape {array.shape}", where)
    if len(seats.index) > saved.batch or (not len(seats.index) and saved.waiting > 0):
        raise _refused(f"{len(seats.index)} rows of {saved.batch}", where)
    steps = seats.steps[seats.index >= 0]
    if not ((steps >= 1) & (steps < exit.most)).all():
        raise _refused("a row has taken more iterations than it may", where)
    if not ((answers.steps >= 1) & (answers.steps <= exit.most)).all():
        raise _refused("an answer took more iterations than it may", where)
    return exit


def _refused(wrong: str, where: str) -> BadSession:
    return BadSession(
        f"the saved puzzles are not this model's: {wrong}",
        where=where,
        do="take an older copy, or solve the puzzles anew",
    )
