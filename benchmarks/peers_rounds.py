"""Rounds: every side once at every thread count, each in a fresh process, in turning order.

Whatever a worker answers is stored at once, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peers_report import QUIET, Answer, Round, Work, disturbance
from runtimes.measure import Window, await_quiet
from runtimes.setups import Side
from runtimes.workshop import BENCHMARKS, own_environment

from edgert.errors import EdgertError
from edgert.files import write_atomic

TIMEOUT = 1800
MEMORY_SIZE = 2**30
"""Bytes that no cache holds: how fast memory itself is read."""

Say = Callable[[str], None]


def ask(
    command: Sequence[str], log: Path, env: Mapping[str, str], timeout: float = TIMEOUT
) -> list[tuple[float, dict[str, Any]]]:
    """Run one worker -> its lines of JSON, with the seconds behind the start at which each came.

    Its stderr goes to `log`, which is quoted in the EdgertError when it fails.
    """
    name = " ".join(command[1:-1])
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with (
        log.open("ab") as err,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=err, env=dict(env), cwd=BENCHMARKS, text=True
        ) as process,
    ):
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            lines = [(time.perf_counter() - begun, line) for line in process.stdout]
            code = process.wait()
        finally:
            expired = not timer.is_alive()
            timer.cancel()
            process.kill()
    if expired:
        raise EdgertError(f"{name} did not finish within {timeout:g} s", where=str(log))
    if code or not lines:
        tail = log.read_text(errors="replace").strip().splitlines()[-5:]
        raise EdgertError(
            f"{name} failed with code {code}:\n  " + "\n  ".join(tail), where=str(log)
        )
    return [(at, json.loads(line)) for at, line in lines]


def undisturbed(attempt: Callable[[], Answer], attempts: int, patience: float) -> Answer:
    """The first answer that others did not disturb, or the least disturbed of `attempts`.

    Sides are disturbed apart from each other, so a busy machine falsifies ratios too. What was
    measured plays no part in the choice.
    """
    best: Answer | None = None
    for _ in range(attempts):
        await_quiet(QUIET, patience)
        answer = attempt()
        if best is None or disturbance(answer) < disturbance(best):
            best = answer
        if disturbance(best) <= QUIET:
            break
    assert best is not None
    return best


class Results:
    """What is known of a run, in a file: nothing of it is measured twice.

    scores   side -> what each token of the text costs it
    rounds   '<round>/<threads>' -> side -> its answer
    reading  '<round>/<threads>' -> size -> GB/s
    """

    def __init__(self, path: Path, about: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.scores: dict[str, list[list[float]]] = {}
        self.rounds: dict[str, dict[str, Answer]] = {}
        self.reading: dict[str, dict[str, float]] = {}
        about = json.loads(json.dumps(about))  # as it reads in the file: tuples are lists there
        if resume and path.is_file():
            known = json.loads(path.read_text())
            if known["about"] == about:
                self.scores, self.rounds = known["scores"], known["rounds"]
                self.reading = known["reading"]
        self.about = about

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(vars(self) | {"path": None}).encode())

    def at(self, threads: int) -> list[Round]:
        return [r for key, r in self.rounds.items() if key.endswith(f"/{threads}")]

    def speeds(self, threads: int) -> dict[int, list[float]]:
        """Size -> GB/s of every round."""
        found: dict[int, list[float]] = {}
        for key, sizes in self.reading.items():
            if key.endswith(f"/{threads}"):
                for size, speed in sizes.items():
                    found.setdefault(int(size), []).append(speed)
        return found


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    ids: Sequence[int]  # of the text
    work: Work
    window: int  # tokens of the text scored at once
    threads: tuple[int, ...]
    rounds: int
    repeats: int
    attempts: int
    patience: float

    def windows(self) -> list[Sequence[int]]:
        """Whole windows, each behind nothing."""
        ends = range(self.window, len(self.ids) + 1, self.window)
        return [self.ids[end - self.window : end] for end in ends]


class Rounds:
    """Runs a plan. A side that fails is left out from then on: `failed` says why.

    timed  names of sides; the others are scored alone
    """

    def __init__(
        self, plan: Plan, sides: Mapping[str, Side], timed: Sequence[str], log: Path, say: Say
    ) -> None:
        self.plan, self.sides, self.log, self.say = plan, dict(sides), log, say
        self.timed = [name for name in timed if name in sides]
        self.failed: dict[str, str] = {}

    def run(self, results: Results) -> None:
        self.score(results)
        for number in range(self.plan.rounds):
            for threads in self.plan.threads:
                self.round(results, number, threads)

    def score(self, results: Results) -> None:
        """Perplexity of every side, once; it also brings all files into memory."""
        orders = {"score": self.plan.windows()}
        for name in self._missing(self.sides, results.scores):
            answer = self._try(name, partial(self._ask, name, orders, max(self.plan.threads)))
            if answer is not None:
                results.scores[name] = answer[-1][1]["costs"]
                results.save()
                self.say(f"{name}: scored {sum(map(len, results.scores[name]))} tokens")

    def round(self, results: Results, number: int, threads: int) -> None:
        key, plan = f"{number}/{threads}", self.plan
        known = results.rounds.setdefault(key, {})
        if key not in results.reading:
            await_quiet(QUIET, plan.patience)
            results.reading[key] = self._read_speed(threads)
        names = self._missing(self.timed, known)
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            begun = Window()
            attempt = partial(self._measure, name, threads)
            answer = self._try(name, partial(undisturbed, attempt, plan.attempts, plan.patience))
            if answer is not None:
                known[name] = answer
                results.save()
                busy = disturbance(answer)
                note = f", BUSY: others used {busy:.1f} CPUs" if busy > QUIET else ""
                where = f"round {number + 1} of {plan.rounds}, {threads} threads"
                done = f"{len(known)} of {len(self.timed)}"
                self.say(f"{where}: {name} ({done}), {begun.elapsed():.0f} s{note}")

    def _missing(self, names: Iterable[str], known: Mapping[str, Any]) -> list[str]:
        return [name for name in names if name not in known and name not in self.failed]

    def _try(self, name: str, attempt: Callable[[], Any]) -> Any:
        try:
            return attempt()
        except EdgertError as error:
            self.failed[name] = error.what
            self.say(f"{name} is left out: {error}")
            return None

    def _ask(
        self, name: str, orders: dict[str, Any], threads: int
    ) -> list[tuple[float, dict[str, Any]]]:
        side = self.sides[name]
        capacity = max(self.plan.work.capacity(), self.plan.window)
        full = side.orders | orders | {"threads": threads, "capacity": capacity}
        command = [side.python, "-m", "runtimes.worker", json.dumps(full)]
        return ask(command, self.log, side.env)

    def _measure(self, name: str, threads: int) -> Answer:
        work, ids = self.plan.work, list(self.plan.ids)
        orders = {
            "cold": ids[: work.cold],
            "ids": ids[: work.capacity()],
            "requests": work.requests(),
            "repeats": self.plan.repeats,
        }
        (cold_s, first), (_, answer) = self._ask(name, orders, threads)
        return answer | {"cold_s": cold_s, "cold_others": first["others"]}

    def _read_speed(self, threads: int) -> dict[str, float]:
        sizes = sorted({side.weight_bytes for side in self.sides.values()} | {MEMORY_SIZE})
        orders = json.dumps({"threads": threads, "sizes": sizes})
        python = next(iter(self.sides.values())).python
        command = [python, "-m", "runtimes.read_speed", orders]
        return ask(command, self.log, own_environment())[-1][1]
