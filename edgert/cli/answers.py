"""What `edgert solve` says of its answers: drawn with a few words beside them, or as one object."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgert.solving import Look, Solution, Solving
    from edgert.tasks import Row, Task
    from edgert.tasks.puzzle import Integers
    from edgert.tasks.puzzlefile import Question

DRAWN = 8
"""Puzzles that are drawn; of more, each is a line."""

GAUGE = 32
"""Iterations that are shown as a bar."""

STYLES = {
    "frame": "dim",
    "given": "bold",
    "found": "cyan",
    "wrong": "bold red",
    "blank": "dim",
}


@dataclass(frozen=True)
class Checked:
    """What a checker makes of an answer. known: whether it is the known one, if one is known."""

    solved: bool
    reason: str
    known: bool | None = None

    def __str__(self) -> str:
        return f"{'solved' if self.solved else 'unverified'}: {self.reason}"


def checked(task: Task | None, question: Question, values: Integers | None) -> Checked:
    """Solved only if the task's rules say so, or, where they cannot tell, the known answer."""
    if values is None:
        return Checked(False, "no answer yet", None if question.known is None else False)
    if task is None:
        return Checked(False, "the bundle does not say what its puzzles are")
    verdict = task.check(question.tokens, values)
    if question.known is None:
        return Checked(verdict.ok, verdict.reason)
    same = task.text(values) == task.text(question.known)
    if verdict.decided:
        return Checked(verdict.ok, verdict.reason, same)
    return Checked(same, "the known answer" if same else "not the known answer", same)


class Answers:
    """Puzzles and what has become of them. full: seconds that full depth took, if measured."""

    def __init__(self, questions: list[Question], solving: Solving, full: float | None) -> None:
        self.questions, self.solving, self.full = questions, solving, full
        self.model = solving.model
        self.task = self.model.task if self.model.manifest.task else None
        self.word = f"{self.model.manifest.program.body}s"  # what an iteration is called

    @property
    def solutions(self) -> list[Solution]:
        return [self.solving.answers[i] for i in range(len(self.questions))]

    def checks(self) -> list[Checked]:
        pairs = zip(self.questions, self.solutions, strict=True)
        return [checked(self.task, question, found.values) for question, found in pairs]

    def as_json(self) -> dict[str, Any]:
        solving, manifest = self.solving, self.model.manifest
        return {
            "bundle": manifest.name,
            "model_id": manifest.model_id,
            "variant": self.model.runner.variant_name,
            "placement": self.model.placement,
            "task": manifest.task,
            "halt": str(solving.exit),
            "iterations": solving.iterations,
            "seconds": solving.spent_ns / 1e9,
            "graph_seconds": solving.graph_ns / 1e9,
            "full_depth_seconds": self.full,
            "stopped": solving.stopped,
            "notes": list(solving.notes),
            "solutions": [
                {
                    "puzzle": question.text,
                    "answer": self._text(found.values),
                    "solved": check.solved,
                    "checked": check.reason,
                    "known_answer": check.known,
                    "steps": found.steps,
                    "finish_reason": found.reason,
                    "seconds": found.seconds,
                }
                for question, found, check in zip(
                    self.questions, self.solutions, self.checks(), strict=True
                )
            ],
        }

    def show(self) -> None:
        """A few puzzles drawn, many as a line each."""
        checks = self.checks()
        several = len(self.questions) > DRAWN
        for question, found, check in zip(self.questions, self.solutions, checks, strict=True):
            if several:
                steps = f"{found.steps} of {self.solving.exit.most} {self.word} ({found.reason})"
                click.echo(f"{self._text(found.values) or '-'}  {steps}  {check}")
            else:
                self._draw(question, found.values, self._beside(found, check))
        if len(checks) > 1:
            mean = sum(found.steps for found in self.solutions) / len(checks)
            solved = sum(check.solved for check in checks)
            known = [check.known for check in checks if check.known is not None]
            same = f" · {sum(known)} of {len(known)} the known answer" if known else ""
            click.echo(f"{solved} of {len(checks)} solved · {mean:.2f} {self.word} a puzzle{same}")

    def closing(self) -> str:
        spent = self.solving.spent_ns / 1e9
        parts = [self.model.placement, f"{spent * 1e3:.1f} ms in all"]
        if self.full is not None:
            parts.append(f"{self.full * 1e3:.1f} ms at full depth")
        if self.solving.stopped is not None:
            parts.append(f"left off: {self.solving.stopped}")
        return "── " + " · ".join(parts)

    def show_look(self, look: Look) -> None:
        """The answer behind an iteration, while it is found."""
        beside = [f"puzzle {look.index + 1}", f"{self.model.manifest.program.body} {look.steps}"]
        self._draw(self.questions[look.index], look.values, beside)

    def _beside(self, found: Solution, check: Checked) -> list[str]:
        most = self.solving.exit.most
        bar = "" if most > GAUGE else "█" * found.steps + "░" * (most - found.steps) + " "
        time = f"{found.seconds * 1e3:.1f} ms"
        if self.full is not None and len(self.questions) == 1:
            time += f" ({self.full * 1e3:.1f} ms at full depth)"
        return [
            f"{self.word:<10}{bar}{found.steps} of {most} ({found.reason})",
            f"{'checked':<10}{check}",
            f"{'time':<10}{time}",
        ]

    def _text(self, values: Integers | None) -> str | None:
        if values is None:
            return None
        return self.task.text(values) if self.task else ",".join(map(str, values.tolist()))

    def _draw(self, question: Question, values: Integers | None, beside: Sequence[str]) -> None:
        if self.task is None:
            click.echo("\n".join([self._text(values) or "-", *(f"  {line}" for line in beside)]))
        else:
            _side_by_side(self.task.draw(question.tokens, values), beside)


def _side_by_side(rows: Sequence[Row], notes: Sequence[str]) -> None:
    """A drawing, and lines to its right in the middle of it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    top = max(0, (len(rows) - len(notes)) // 2)
    width = max(sum(len(segment.text) for segment in row) for row in rows)
    for i in range(max(len(rows), top + len(notes))):
        line = Text()
        for segment in rows[i] if i < len(rows) else ():
            line.append(segment.text, STYLES[segment.kind])
        if top <= i < top + len(notes):
            line.pad_right(width - len(line) + 4)
            line.append(notes[i - top])
        line.rstrip()
        console.print(line)
