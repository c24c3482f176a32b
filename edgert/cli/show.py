"""What the terminal shows: progress on stderr, quantities in units people read."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from edgert.progress import Advance, Reporter

if TYPE_CHECKING:
    from rich.progress import Progress

LABEL = 10


def size(nbytes: float) -> str:
    """1536 -> '1.5 kB'. Decimal units, as file managers and drives use."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def note(text: str, *, quiet: bool = False) -> None:
    """A line for people, on stderr."""
    if not quiet:
        click.echo(text, err=True)


def print_json(value: dict[str, Any]) -> None:
    """One object on stdout."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    indent = 2 if sys.stdout.isatty() else None
    click.echo(json.dumps(value, ensure_ascii=not utf8, indent=indent))


def accuracy_lines(report: dict[str, Any] | None) -> list[str]:
    """What each variant with weights of few bits costs, from the bundle's accuracy report."""
    found = report["variants"] if report else {}
    width = max(map(len, found), default=0) + 2
    return [
        f"{name:<{width}}perplexity {one['perplexity']:.3f} (fp32 {one['perplexity_fp32']:.3f}, "
        f"ratio {one['ratio']:.4f} ± {one['ratio_error']:.4f})  KL {one['kl']:.4f}  "
        f"top-1 {one['top1']:.1%}" + "  beyond its budget" * (not one["within_budget"])
        for name, one in found.items()
    ]


def progress_bar(total: int | None, unit_bytes: bool = False) -> Progress:
    """A bar on stderr that is drawn only where someone watches, and erased when done.

    Without a total it moves to show that work goes on, and counts nothing.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    count = DownloadColumn() if unit_bytes else MofNCompleteColumn()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        *([] if total is None else [count]),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def training_bar() -> Progress:
    """A bar on stderr with a task's `facts` and the time left, erased when done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
        transient=True,
    )


class TerminalReporter(Reporter):
    """Lines 'label  text' on stderr; a bar while a stage runs, its duration when it is done."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def line(self, label: str, text: str) -> None:
        note(f"{label:<{LABEL}}{text}", quiet=self.quiet)

    @contextmanager
    def stage(self, label: str, text: str, total: int | None = None) -> Iterator[Advance]:
        if self.quiet:
            yield lambda amount: None
            return
        start = time.perf_counter()
        with progress_bar(total) as bar:
            task = bar.add_task(f"{label:<{LABEL}}{text}", total=total)
            yield lambda amount: bar.advance(task, amount)
        self.line(label, f"{text}  {time.perf_counter() - start:.1f} s")


@contextmanager
def hashing(total: int | None, *, quiet: bool) -> Iterator[Advance]:
    """The bar of a bundle's first verification; it appears only if there is something to hash."""
    if quiet or not sys.stderr.isatty():
        yield lambda amount: None
        return
    bar = progress_bar(total, unit_bytes=True)
    task = bar.add_task("verifying ", total=total)

    def advance(amount: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.advance(task, amount)

    try:
        yield advance
    finally:
        bar.stop()
