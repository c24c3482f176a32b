"""A whole training run: a recipe and a folder -> checkpoints, metrics, held-out figures, a plot.

RUN/
  recipe.toml, run.json, data/, heldout.txt     prepare.py, puzzle_data.py
  step-00000300/                                checkpoint.py; with --published also a .pt
  metrics.jsonl, loss.png                       metrics.py
  result.json                                   the figures of the last session
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgert._version import __version__
from edgert.errors import Diverged, UsageError
from edgert.files import write_atomic
from edgert.models.trainable import TextModel
from edgert.progress import Reporter
from edgert.train import beginning, checkpoint, metrics, prepare, published
from edgert.train.device import choose, gpus, local_rank
from edgert.train.kinds import MATERIALS, PREPARE
from edgert.train.loop import Step, Trainer
from edgert.train.objective import Figures
from edgert.train.optim import Optimizer
from edgert.train.recipe import TrainRecipe, completed, differences
from edgert.train.session import locked, stop_requests
from edgert.train.workers import Workers, workers

METRICS = "metrics.jsonl"
PLOT = "loss.png"
RESULT = "result.json"


class Watcher(Reporter):
    """Says nothing; the CLI's draws a bar."""

    def begin(self, done: int, steps: int, per_step: int, unit: str) -> None:
        """Training starts behind step `done` and ends behind step `steps`. A step takes so many
        of `unit`, such as "tokens"."""

    def step(self, step: Step) -> None:
        """One update has been made."""

    def end(self) -> None:
        """No further step is made in this session."""


@dataclass
class Outcome:
    """What a session did.

    unit         what is trained on, such as "tokens"; `per`: what the losses are of
    first, last  training loss of the run's first logged step; mean of the last ten
    per_s        units a second of training steps in this session; evaluation and checkpoints not
                 counted
    device       of this process, such as "cpu" or "cuda:0"
    speaks       of several processes, the one whose figures are complete
    """

    run: Path
    checkpoint: Path | None
    plot: Path
    model: str
    parameters: int
    step: int
    steps: int
    first: float | None
    last: float | None
    heldout: Any  # objective.Figures of the family's kind, or None
    unit: str
    per: str
    per_s: float | None
    seconds: float
    threads: int
    device: str
    interrupted: bool
    speaks: bool
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        value = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _UNSAID}
        value |= {k: None if value[k] is None else str(value[k]) for k in _PATHS}
        heldout = None if self.heldout is None else self.heldout.to_json()
        return value | {"heldout": heldout, f"{self.unit}_per_s": self.per_s}


_PATHS = ("run", "checkpoint", "plot")
_UNSAID = ("speaks", "unit", "per", "per_s")


def train(
    recipe: TrainRecipe,
    run: Path,
    *,
    recipe_text: str = "",
    resume: bool = False,
    until: int | None = None,
    start: Path | None = None,
    write_published: bool = False,
    watcher: Watcher | None = None,
) -> Outcome:
    """Train into the folder `run`, or train on there.

    resume           from the newest sound checkpoint, with the same recipe
    until            stop behind this step, with a checkpoint; the schedule stays the recipe's
    start            a checkpoint to begin a new run from: ours, or published; its step, weights and
                     moments are taken, the sampler is seeded anew
    write_published  write each checkpoint in the published format, too

    SIGINT and SIGTERM end the session behind the current step, with a checkpoint. Under torchrun
    each process calls this.
    Raises Incompatible (a device that is not there) before anything else; UsageError (the folder, a
    changed recipe), BadFile, BadCheckpoint, Diverged, EdgertError if the disk refuses.
    """
    with workers(choose(recipe.train, gpus(), local_rank())) as group:
        heard = watcher if watcher is not None and group.first else Watcher()
        with locked(run, resume, group):
            job = _Job(recipe, run, group, heard, write_published)
            return job.run_all(recipe_text, resume, until, start)


class _Job:
    def __init__(
        self,
        recipe: TrainRecipe,
        run: Path,
        group: Workers,
        watcher: Watcher,
        write_published: bool,
    ) -> None:
        self.recipe, self.run, self.group = recipe, run, group
        self.watcher, self.write_published = watcher, write_published
        self.notes: list[str] = []
        self.saved: Path | None = None

    def run_all(
        self, recipe_text: str, resume: bool, until: int | None, start: Path | None
    ) -> Outcome:
        began = time.perf_counter()
        c = self.recipe.train
        try:
            trainer = self._begin(recipe_text, resume, start)
        except BaseException:
            if not resume and self.group.first:  # nothing to go on with: the next try starts afresh
                shutil.rmtree(self.run, ignore_errors=True)
            raise
        end = min(c.steps, until or c.steps)
        stopped, spent, made = self._loop(end)
        outcome = Outcome(
            run=self.run,
            checkpoint=self.saved,
            plot=self.run / PLOT,
            model=self.recipe.name,
            parameters=sum(p.numel() for p in trainer.model.parameters()),
            step=trainer.step,
            steps=c.steps,
            first=None,
            last=None,
            heldout=None,
            unit=trainer.objective.unit,
            per=self.material.per,
            per_s=made * trainer.objective.per_step / spent if made else None,
            seconds=0.0,
            threads=torch.get_num_threads(),
            device=str(self.group.device),
            interrupted=stopped,
            speaks=self.group.first,
            notes=self.notes,
        )
        if self.group.first:
            self._report(outcome, began)
        self.group.wait()
        return outcome

    def _begin(self, recipe_text: str, resume: bool, start: Path | None) -> Trainer:
        """The trainer at the step where this session begins, the run's files to match."""
        if self.group.first:
            self._prepare(recipe_text, resume)
        self.group.wait()
        self.material = MATERIALS[self.recipe.family.kind](self.recipe, self.run)
        self.trainer = Trainer(self.recipe, self.material.source(), self.group)
        if self.write_published and not isinstance(self.trainer.model, TextModel):
            raise UsageError(
                "models of this family are not written in their published format",
                do="leave out --published: a checkpoint has the published names",
            )
        if resume:
            self.saved, notes = beginning.resume(self.trainer, self.run)
            self.notes += notes
        elif start is not None:
            self.notes += beginning.start(self.trainer, start)
        self.group.wait()
        if self.group.first:
            metrics.cut(self.run / METRICS, self.trainer.step)
        return self.trainer

    def _prepare(self, recipe_text: str, resume: bool) -> None:
        done = (self.run / prepare.RUN).is_file()
        if done:
            self._same_recipe()
        else:
            PREPARE[self.recipe.family.kind](self.recipe, self.run, self.watcher)
        if recipe_text and not done:
            write_atomic(self.run / "recipe.toml", recipe_text.encode())
        checkpoint.sweep(self.run)

    def _same_recipe(self) -> None:
        old = prepare.read_run(self.run)["recipe"]
        changed = differences(completed(old), self.recipe.to_json())
        if changed:
            raise UsageError(
                "the recipe is not the one this run was started with:\n  - "
                + "\n  - ".join(changed),
                where=str(self.run),
                do="put the old values back, or start a new run with -o",
            )

    def _loop(self, end: int) -> tuple[bool, float, int]:
        """Steps up to `end`: whether it was told to stop, seconds in steps, steps made."""
        t, c, made, spent = self.trainer, self.recipe.train, 0, 0.0
        unit, per_step = t.objective.unit, t.objective.per_step
        self.watcher.begin(t.step, end, per_step, unit)
        log = metrics.Metrics(self.run / METRICS) if self.group.first else None
        stopped = False
        t.model.train()
        try:
            with stop_requests() as requested:
                while t.step < end and not stopped:
                    start = time.perf_counter()
                    step = t.advance()
                    seconds = time.perf_counter() - start
                    made, spent = made + 1, spent + seconds
                    self.watcher.step(step)
                    stopped = self._agreed(requested())
                    last = t.step == end or stopped
                    if log is not None and (step.number % c.log_interval == 0 or last):
                        counted = {
                            unit: step.number * per_step,
                            f"{unit}_per_s": round(per_step / seconds, 1),
                        }
                        log.write(
                            step=step.number,
                            loss=step.loss,
                            lr=step.lr,
                            grad_norm=step.norm,
                            **counted,
                            **t.objective.figures(),
                        )
                    if c.ckpt_interval and t.step % c.ckpt_interval == 0 and not last:
                        self._save()
                    if c.eval_interval and t.step % c.eval_interval == 0 and not last:
                        self._evaluate_some(log)
                if t.step and (self.saved is None or made):
                    self._save()
        except Diverged as error:
            error.where = error.where or str(self.run)
            kept = f"the last good checkpoint is {self.saved}" if self.saved else "none was written"
            error.do = f"{kept}; {error.do}"
            raise
        finally:
            self.watcher.end()
            if log is not None:
                log.close()
        return stopped, spent, made

    def _agreed(self, mine: bool) -> bool:
        """Whether any process was told to stop: all of them stop behind the same step."""
        return self.group.mean([float(mine)])[0] > 0

    def _save(self) -> None:
        snapshot = self._snapshot()  # all processes: each has a part of what is carried on
        if self.group.first:
            self.saved = checkpoint.write_checkpoint(self.run, snapshot)
            t = self.trainer
            if self.write_published and isinstance(t.model, TextModel):
                assert isinstance(t.optimizer, Optimizer), "of text"
                path = self.run / f"step-{t.step:08d}.pt"
                published.write_published(path, t.model, t.step, t.optimizer)
            checkpoint.prune(self.run, self.recipe.train.keep)
        self.group.wait()

    def _snapshot(self) -> checkpoint.Snapshot:
        t = self.trainer
        return checkpoint.Snapshot(
            name=self.recipe.name,
            step=t.step,
            family=self.recipe.family,
            config=self.recipe.model,
            weights=t.weights(),
            tensors=t.tensors(),
            training=t.state()
            | {
                "recipe": self.recipe.to_json(),
                "data": self.material.record,
                "evaluation": self.material.evaluation,
                "threads": torch.get_num_threads(),
                "device": self.group.device.type,
                "processes": self.group.count,
                "versions": {
                    "edgert": __version__,
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                    "python": platform.python_version(),
                },
            },
            **self.material.identity(),
        )

    def _evaluate_some(self, log: metrics.Metrics | None) -> None:
        if self.group.first and log is not None:
            found = self._evaluate(whole=False)
            if found is not None:
                log.write(step=self.trainer.step, **found.logged())
                self.watcher.line("held out", f"step {self.trainer.step}: {found.said()}")
        self.group.wait()

    def _evaluate(self, whole: bool) -> Figures | None:
        """With the weights to use: the average, if there is one."""
        model, average = self.trainer.model, self.trainer.average
        if average is not None:
            average.swap()
        model.eval()
        try:
            return self.material.evaluate(model, whole)
        finally:
            model.train()
            if average is not None:
                average.swap()

    def _report(self, outcome: Outcome, began: float) -> None:
        """Final figures and the plot. An interrupted session skips the evaluation."""
        if self.trainer.step and not outcome.interrupted:
            with self.watcher.stage("held out", self.material.held_out):
                outcome.heldout = self._evaluate(whole=True)
            if outcome.heldout is not None:
                outcome.notes += outcome.heldout.warnings()
        lines = metrics.read_metrics(self.run / METRICS)
        losses = [line["loss"] for line in lines if line.get("loss") is not None]
        if losses:
            outcome.first = losses[0]
            outcome.last = sum(losses[-10:]) / len(losses[-10:])
        baseline = None
        if outcome.heldout is not None:
            lines.append({"step": outcome.step} | outcome.heldout.logged())
            baseline = self.material.baseline(outcome.heldout)
        title = f"{self.recipe.name}: loss"
        metrics.plot(lines, outcome.plot, title, baseline, per=self.material.per)
        outcome.seconds = time.perf_counter() - began
        text = json.dumps(outcome.to_json(), indent=1) + "\n"
        write_atomic(self.run / RESULT, text.encode())
