"""What the puzzles of an exported model are: as its user says, as its source says, or as its size
leaves no doubt of."""

from __future__ import annotations

from edgert.errors import UsageError
from edgert.models.program import Program
from edgert.progress import Reporter
from edgert.tasks import find, of_size

_DO = "leave --task out: the model is then given token ids instead of text"


def task_of(
    program: Program, asked: str | None, stated: str | None, reporter: Reporter
) -> str | None:
    """The name of a program's task, or None if nobody can tell; what cannot be told is noted.

    asked   by the user
    stated  by the source
    Raises UsageError for a task that there is not, or that the model has not the size for.
    """
    name = asked or stated
    solves = program.turns is not None
    if not solves:
        if asked:
            raise UsageError(
                f"a task {ascii(asked)} was given, and this model decodes text", do="leave it out"
            )
        return None
    cells, vocab = program.context, program.vocab_size
    if name is None:
        fitting = of_size(cells, vocab)
        if len(fitting) == 1:
            reporter.line("note", f"its puzzles are {fitting[0]}, by {cells} cells of {vocab}")
            return fitting[0]
        known = f"--task is one of {', '.join(fitting)}" if fitting else "no task has that size"
        reporter.line("note", f"its puzzles are not known ({cells} cells of {vocab}): {known}")
        return None
    task = find(name)
    if (task.seq_len, task.vocab_size) != (cells, vocab):
        raise UsageError(
            f"the puzzles of {task.name} have {task.seq_len} cells of {task.vocab_size} tokens, "
            f"the model has {cells} of {vocab}",
            do=_DO,
        )
    return task.name
