"""train: a recipe -> a trained model, on the build side (torch)."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import as_json, common, option
from edgert.cli.show import LABEL, note, print_json

if TYPE_CHECKING:
    from edgert.train.job import Outcome, Watcher

LINES = 20  # of progress where no terminal shows a bar


@click.command(epilog="example: edgert train RECIPE -o runs/first --steps 100")
@click.argument("recipe", type=click.Path(path_type=Path))
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="The run's folder (default: runs/NAME of the recipe).",
)
@option("--resume", is_flag=True, help="Go on from the run's newest sound checkpoint.")
@option(
    "--steps",
    type=click.IntRange(1),
    metavar="N",
    help="Stop behind step N, with a checkpoint; the schedule stays the recipe's.",
)
@option(
    "--from",
    "start",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Begin with the weights, moments and step of this checkpoint, ours or published.",
)
@option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Compute there, whatever the recipe says; auto: CUDA where there is some.",
)
@option("--published", is_flag=True, help="Write checkpoints in the published format, too.")
@as_json
@common
def train(
    recipe: Path,
    output: Path | None,
    resume: bool,
    steps: int | None,
    start: Path | None,
    device: str | None,
    published: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Train the model that RECIPE describes.

    Checkpoints, metrics, the loss as a picture and what is held out go to the run's folder. A run
    that was interrupted or killed goes on with --resume as if nothing had happened: on the same
    machine with the same number of threads the weights are the same, bit for bit.

    The figures at the end are those of what was held out: text, as `edgert eval` measures it, or
    puzzles, solved at full depth and with early exit.
    Several processes: torchrun --nproc-per-node 2 -m edgert train RECIPE.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        from edgert.errors import MissingDependency

        raise MissingDependency("torch", "train", why="models are trained in torch") from error
    from edgert.errors import UsageError
    from edgert.train import job
    from edgert.train.recipe import read_recipe

    if resume and start is not None:
        raise UsageError(
            "--resume goes on where the run stands, --from begins a new one", do="choose one"
        )
    parsed = read_recipe(recipe)
    if device is not None:
        parsed = replace(parsed, train=replace(parsed.train, device=device))
    run = output or Path("runs") / parsed.name
    outcome = job.train(
        parsed,
        run,
        recipe_text=recipe.read_text(encoding="utf-8"),
        resume=resume,
        until=steps,
        start=start,
        write_published=published,
        watcher=_watcher(quiet),
    )
    if not outcome.speaks:
        return
    for text in outcome.notes:
        note(f"{'note':<{LABEL}}{text}", quiet=quiet)
    if outcome.interrupted:
        note(f"{'saved':<{LABEL}}{outcome.checkpoint}; go on with --resume", quiet=quiet)
        raise KeyboardInterrupt
    if as_json:
        print_json(outcome.to_json())
    else:
        click.echo("\n".join(_card(outcome)))


def _card(o: Outcome) -> list[str]:
    speed = f", {o.per_s:,.0f} {_short(o.unit)}/s" if o.per_s else ""
    threads = f"{o.threads} thread{'s' if o.threads > 1 else ''}"
    place = threads if o.device == "cpu" else o.device
    rows = [
        (
            "trained",
            f"{o.model}, {o.parameters:,} parameters, step {o.step:,} of {o.steps:,}"
            f"{speed} on {place}, {o.seconds:.0f} s",
        )
    ]
    if o.first is not None:
        rows.append(("loss", f"{o.first:.4f} at first, {o.last:.4f} at last, {o.per}"))
    if o.heldout is not None:
        rows += o.heldout.card()
    rows.append(("saved", str(o.checkpoint)))
    rows.append(("picture", str(o.plot)))
    if o.step < o.steps:
        rows.append(("next", f"edgert train RECIPE -o {o.run} --resume"))
    rows.append(("next", f"edgert export {o.run} -o bundles/{o.model}"))
    return [f"{label:<{LABEL}}{text}" for label, text in rows]


def _short(unit: str) -> str:
    return {"tokens": "tok"}.get(unit, unit)


def _watcher(quiet: bool) -> Watcher:
    """Draws a bar where someone watches, and else says a line now and then."""
    from edgert.cli.show import TerminalReporter
    from edgert.train.job import Watcher

    class Terminal(TerminalReporter, Watcher):
        bar: Any = None

        def begin(self, done: int, steps: int, per_step: int, unit: str) -> None:
            self.steps, self.per_step, self.unit = steps, per_step, _short(unit)
            self.loss: float | None = None
            self.every = max(1, (steps - done) // LINES)
            self.started, self.done = time.perf_counter(), done
            if quiet or not sys.stderr.isatty():
                return
            from edgert.cli.show import training_bar

            self.bar = training_bar()
            self.task = self.bar.add_task("training", total=steps, completed=done, facts="")
            self.bar.start()

        def step(self, step: Any) -> None:
            # The mean of about the last twenty steps: a single one says little.
            self.loss = step.loss if self.loss is None else 0.95 * self.loss + 0.05 * step.loss
            seconds = time.perf_counter() - self.started
            speed = (step.number - self.done) * self.per_step / seconds
            if self.bar is not None:
                facts = f"loss {self.loss:.3f}  {speed:,.0f} {self.unit}/s"
                self.bar.update(self.task, completed=step.number, facts=facts)
            elif step.number % self.every == 0:
                left = (self.steps - step.number) * seconds / (step.number - self.done)
                self.line(
                    "training",
                    f"step {step.number:,} of {self.steps:,}  loss {self.loss:.4f}  "
                    f"{speed:,.0f} {self.unit}/s  {left:.0f} s left",
                )

        def end(self) -> None:
            if self.bar is not None:
                self.bar.stop()
                self.bar = None

    return Terminal(quiet)
