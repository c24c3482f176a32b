"""A whole training run: a recipe and a folder -> checkpoints, metrics, held-out figures, a plot.

RUN/
  recipe.toml, run.json, data/, heldout.txt     prepare.py
  step-00000300/                                checkpoint.py; with --published also a .pt
  metrics.jsonl, loss.png                       metrics.py
  result.json                                   the figures of the last session
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgert._version import __version__
from edgert.errors import Diverged, EdgertError, UsageError
from edgert.files import write_atomic
from edgert.progress import Reporter
from edgert.train import beginning, checkpoint, heldout, metrics, prepare, published
from edgert.train.data import Sampler
from edgert.train.heldout import Bigram, HeldOut
from edgert.train.loop import Step, Trainer
from edgert.train.recipe import TrainRecipe, completed, differences
from edgert.train.workers import Workers, workers

METRICS = "metrics.jsonl"
PLOT = "loss.png"
RESULT = "result.json"
LOCK = ".lock"


class Watcher(Reporter):
    """Says nothing; the CLI's draws a bar."""

    def begin(self, done: int, steps: int, tokens_per_step: int) -> None:
        """Training starts behind step `done` and ends behind step `steps`."""

    def step(self, step: Step) -> None:
        """One update has been made."""

    def end(self) -> None:
        """No further step is made in this session."""


@dataclass
class Outcome:
    """What a session did. Losses are nats a token.

    first, last  training loss of the run's first logged step; mean of the last ten
    tokens_per_s of training steps in this session; evaluation and checkpoints not counted
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
    heldout: HeldOut | None
    tokens_per_s: float | None
    seconds: float
    threads: int
    interrupted: bool
    speaks: bool
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        del value["speaks"]
        return value | {k: None if v is None else str(v) for k, v in value.items() if k in _PATHS}


_PATHS = ("run", "checkpoint", "plot")


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
    Raises UsageError (the folder, a changed recipe), BadFile, BadCheckpoint, Diverged, EdgertError
    if the disk refuses.
    """
    with workers() as group:
        heard = watcher if watcher is not None and group.first else Watcher()
        with _locked(run, resume, group):
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
            tokens_per_s=made * trainer.tokens_per_step / spent if made else None,
            seconds=0.0,
            threads=torch.get_num_threads(),
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
        c = self.recipe.train
        self.data = prepare.open_data(self.recipe, self.run)
        sampler = Sampler(self.data.shards, c.window, c.seed, str(self.run))
        self.trainer = Trainer(self.recipe, sampler, self.group)
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
            prepare.prepare(self.recipe, self.run, self.watcher)
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
        self.watcher.begin(t.step, end, t.tokens_per_step)
        log = metrics.Metrics(self.run / METRICS) if self.group.first else None
        stopped = False
        t.model.train()
        try:
            with _stop_requests() as requested:
                while t.step < end and not stopped:
                    start = time.perf_counter()
                    step = t.advance()
                    seconds = time.perf_counter() - start
                    made, spent = made + 1, spent + seconds
                    self.watcher.step(step)
                    stopped = self._agreed(requested())
                    last = t.step == end or stopped
                    if log is not None and (step.number % c.log_interval == 0 or last):
                        log.write(
                            step=step.number,
                            loss=step.loss,
                            lr=step.lr,
                            grad_norm=step.norm,
                            tokens=step.number * t.tokens_per_step,
                            tokens_per_s=round(t.tokens_per_step / seconds, 1),
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
        if self.group.first:
            self.saved = checkpoint.write_checkpoint(self.run, self._snapshot())
            if self.write_published:
                t = self.trainer
                path = self.run / f"step-{t.step:08d}.pt"
                published.write_published(path, t.model, t.step, t.optimizer)
            checkpoint.prune(self.run, self.recipe.train.keep)
        self.group.wait()

    def _snapshot(self) -> checkpoint.Snapshot:
        t, d = self.trainer, self.data
        return checkpoint.Snapshot(
            name=self.recipe.name,
            step=t.step,
            family=self.recipe.family,
            config=self.recipe.model,
            byte_offset=d.byte_offset,
            tokenizer_json=d.tokenizer_json,
            eos=d.eos,
            weights=t.weights(),
            tensors=t.tensors(),
            training=t.state()
            | {
                "recipe": self.recipe.to_json(),
                "data": {key: d.record[key] for key in ("corpus", "shards", "heldout")},
                "evaluation": {"window": self._window[0], "stride": self._window[1]},
                "threads": torch.get_num_threads(),
                "processes": self.group.count,
                "versions": {
                    "edgert": __version__,
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                    "python": platform.python_version(),
                },
            },
        )

    @property
    def _window(self) -> tuple[int, int]:
        """Window and stride of evaluation: those of training, and half of it."""
        window = self.recipe.train.window
        return window, max(1, window // 2)

    def _evaluate_some(self, log: metrics.Metrics | None) -> None:
        if self.group.first and log is not None and len(self.data.heldout) > 1:
            found = self._evaluate(self.data.heldout[: self.recipe.train.eval_tokens], None)
            log.write(step=self.trainer.step, heldout=found.loss, sensitivity=found.sensitivity)
            bits = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.3f} bits/byte"
            self.watcher.line("held out", f"step {self.trainer.step}: {found.loss:.4f}{bits}")
        self.group.wait()

    def _evaluate(self, ids: Any, bigram: Bigram | None) -> HeldOut:
        """With the weights to use: the average, if there is one."""
        model, average = self.trainer.model, self.trainer.average
        if average is not None:
            average.swap()
        model.eval()
        try:
            costs = heldout.score(model, ids, *self._window)
            felt = heldout.sensitivity(model, ids, self._window[0])
        finally:
            model.train()
            if average is not None:
                average.swap()
        return heldout.summary(costs, ids, self.data.lengths, bigram, felt, self._window)

    def _report(self, outcome: Outcome, began: float) -> None:
        """Final figures and the plot. An interrupted session skips the evaluation."""
        vocab = self.recipe.model.vocab_size
        if len(self.data.heldout) > 1 and self.trainer.step and not outcome.interrupted:
            with self.watcher.stage("held out", f"{len(self.data.heldout):,} tokens"):
                small = vocab <= heldout.MAX_BIGRAM_VOCAB
                bigram = Bigram(self.data.shards, vocab) if small else None
                found = self._evaluate(self.data.heldout, bigram)
            outcome.heldout = found
            if found.collapsed:
                outcome.notes.append(
                    f"collapsed: predictions hardly depend on the input (sensitivity "
                    f"{found.sensitivity:.1e}, at least {heldout.COLLAPSED:g} is expected)"
                )
        lines = metrics.read_metrics(self.run / METRICS)
        losses = [line["loss"] for line in lines if line.get("loss") is not None]
        if losses:
            outcome.first = losses[0]
            outcome.last = sum(losses[-10:]) / len(losses[-10:])
        if outcome.heldout is not None:
            lines.append({"step": outcome.step, "heldout": outcome.heldout.loss})
        metrics.plot(lines, outcome.plot, f"{self.recipe.name}: loss", self._nats(outcome.heldout))
        outcome.seconds = time.perf_counter() - began
        text = json.dumps(outcome.to_json(), indent=1) + "\n"
        write_atomic(self.run / RESULT, text.encode())

    @staticmethod
    def _nats(found: HeldOut | None) -> float | None:
        """The bigram's bits per byte as nats a token."""
        if found is None or found.bigram is None or found.bits_per_byte is None:
            return None
        return found.bigram / found.bits_per_byte * found.loss


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come. The second SIGINT interrupts at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, old[signal.Signals(number)])

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever owns that one decides
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _locked(run: Path, resume: bool, group: Workers) -> Iterator[None]:
    """The run's folder, made or found as `resume` says, for this session alone."""
    if not group.first:
        group.wait()
        yield
        return
    taken = os.path.lexists(run)
    if resume and not run.is_dir():
        raise UsageError(
            "there is no run to resume", where=str(run), do="leave out --resume, or correct -o"
        )
    if taken and not resume:
        raise UsageError(
            "the run's folder exists",
            where=str(run),
            do="train on with --resume, or choose another folder with -o",
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        with (run / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    "another process trains in this folder",
                    where=str(run),
                    do="wait until it is done, or choose another folder with -o",
                ) from error
            group.wait()
            yield
    except OSError as error:
        raise EdgertError(
            f"cannot write: {error.strerror or error}",
            where=str(error.filename or run),
            do="check free space and permissions, then train on with --resume",
        ) from error
