"""A control loop at a fixed rate, and beside it a model that answers with deadlines: one process.

    python examples/robot_loop.py bundles/smollm2-135m-instruct --session robot.session

The main thread moves a simulated joint, 100 times a second. A second thread describes what the
joint does, over and over, and drops an answer that is late. The session is saved at the end, on
Ctrl-C and on SIGTERM, and the next start goes on with it. The report says how late ticks came.

Python runs one thread at a time, but a graph call releases the interpreter, and nearly all of a
token's time is spent in one. What is left to do, so that ticks are punctual, is in `steady` and
`keep_running`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robot_report import EDGES_MS, in_words, picture

import edgert

INSTRUCTION = """\
A robot says in a few words what its arm does.
The arm is at 31 degrees and falls. Robot: My arm is high and comes down.
The arm is at -20 degrees and rises. Robot: My arm is low and goes up."""
EARLY_S = 0.0005
"""Wake so much before a tick is due: the sleep may end late, the interpreter may be taken."""

MEMORY = 1024
"""Tokens kept at most: a step stays fast and the session file small. A shorter context counts."""

REST = 0.1
"""Of each token's time, a real-time thread then sleeps so much: other programs have this core, too,
and Linux suspends real-time threads for 50 ms in every second of which they take 95 %."""


@dataclass
class Joint:
    """A motor, a damper and a weight on a lever. Angles in rad, torques in N m."""

    angle: float = 0.0
    speed: float = 0.0
    torque: float = 0.0
    target: float = 0.0
    time: float = 0.0
    error2: float = 0.0  # sum of the squared tracking errors

    def control(self, now: float) -> None:
        """One tick: see where the joint is by now, choose the torque it is driven with from here.

        Between ticks the torque stays, so a late tick is felt as it would be on a real arm.
        """
        self._move(now)
        self.target = 0.6 * math.sin(0.5 * math.pi * now)
        target_speed = 0.3 * math.pi * math.cos(0.5 * math.pi * now)
        error = self.target - self.angle
        weight = math.sin(self.angle)  # known, and held against
        torque = 20.0 * error + 1.8 * (target_speed - self.speed) + weight
        self.torque = max(-10.0, min(10.0, torque))
        self.error2 += error * error

    def _move(self, now: float) -> None:
        steps = max(1, math.ceil((now - self.time) / 0.001))
        dt = (now - self.time) / steps
        for _ in range(steps):
            push = self.torque - math.sin(self.angle) - 0.1 * self.speed
            self.speed += dt * push / 0.05
            self.angle += dt * self.speed
        self.time = now

    def error_degrees(self, ticks: int) -> float:
        """Root of the mean squared tracking error."""
        return math.degrees(math.sqrt(self.error2 / ticks))

    def situation(self) -> str:
        """What the model is told; read by the other thread."""
        way = "rises" if self.speed > 0.05 else "falls" if self.speed < -0.05 else "rests"
        return f"\nThe arm is at {math.degrees(self.angle):.0f} degrees and {way}. Robot:"


@dataclass
class Lateness:
    """How late ticks came, in bins of 10 µs up to 100 ms: a day needs no more memory than a second.

    A tick that comes a whole period late stands for those it has missed: they are only counted.
    """

    bins: list[int] = field(default_factory=lambda: [0] * 10_001)
    ticks: int = 0
    missed: int = 0
    worst_ms: float = 0.0
    late: dict[int, float] = field(default_factory=dict)  # the first thousand: number -> ms

    def add(self, late_s: float, number: int = 0) -> None:
        """A tick, with its number on the machine's clock."""
        if late_s >= 0.001 and len(self.late) < 1000:
            self.late[number] = round(late_s * 1e3, 2)
        self.bins[min(int(late_s * 1e5), 10_000)] += 1
        self.ticks += 1
        self.worst_ms = max(self.worst_ms, late_s * 1e3)

    def between(self, low_ms: float, high_ms: float = math.inf) -> int:
        """Ticks that came low_ms to high_ms late."""
        end = len(self.bins) if math.isinf(high_ms) else round(high_ms * 100)
        return sum(self.bins[round(low_ms * 100) : end])

    def quantile_ms(self, share: float) -> float:
        """So late or less came this share of the ticks, rounded up to 10 µs."""
        seen = 0
        for index, count in enumerate(self.bins):
            seen += count
            if seen >= share * self.ticks:
                return round(min((index + 1) / 100, self.worst_ms), 3)  # as the maximum is
        return self.worst_ms

    def histogram(self) -> list[int]:
        ends = [*EDGES_MS[1:], math.inf]
        return [self.between(low, high) for low, high in zip(EDGES_MS, ends, strict=True)]


class Talk:
    """The session, and what becomes of its answers. `run` is the second thread's work."""

    def __init__(self, session: edgert.Session, deadline_ms: float, max_tokens: int) -> None:
        self.session = session
        self.deadline_ms = deadline_ms
        self.max_tokens = max_tokens
        self.answers = self.met = self.tokens = self.rewinds = 0
        self.priority = "ordinary"
        self.saved = False
        self.error: Exception | None = None
        self._stream: edgert.Stream | None = None
        self._stopping = threading.Event()

    def run(self, situation: Callable[[], str], file: Path | None, realtime: bool = False) -> None:
        """Answer until `stop`, then save. An error ends the answers, not the control loop."""
        self.priority = keep_running() if realtime else "ordinary"
        try:
            while not self._stopping.is_set():
                text = self.answer(situation())
                if text:
                    note(text)
            if file is not None:
                self.session.save(file)
                self.saved = True
        except Exception as error:  # whatever it is, the arm must not fall
            self.error = error
            note(f"error: {error}")

    def answer(self, situation: str) -> str | None:
        """Describe the situation in time, or drop question and answer and return None."""
        session = self.session
        prompt = session.model.encode(situation)
        room = min(MEMORY, session.model.manifest.context)
        if len(session.tokens) + len(prompt) + self.max_tokens > room:
            session.rewind(session.data.get("instruction", 0))  # forget all but the instruction
            self.rewinds += 1
        before = len(session.tokens)
        self._stream = stream = session.stream(
            prompt,
            deadline_ms=self.deadline_ms,
            max_tokens=self.max_tokens,
            temperature=0.0,  # greedy: the graph picks the token, and Python never sees logits
            stop=["\n"] if session.model.tokenizer else [],
        )
        if self._stopping.is_set():  # it may have been set before there was a stream to cancel
            stream.cancel()
        start = step = time.perf_counter()
        for _ in stream:
            if self.priority != "ordinary":
                self._stopping.wait(REST * (time.perf_counter() - step))
            step = time.perf_counter()
        late = step - start > self.deadline_ms / 1e3
        result = stream.result()
        self.tokens += len(result.tokens)
        if result.finish_reason == "cancelled":
            session.rewind(before)
            return None
        self.answers += 1
        if result.finish_reason == "deadline" or late:
            session.rewind(before)
            return None
        self.met += 1
        session.data["answers"] = session.data.get("answers", 0) + 1
        return result.text.strip()

    def report(self, seconds: float) -> dict[str, Any]:
        return {
            "deadline_ms": self.deadline_ms,
            "answers": self.answers,
            "met": self.met,
            "dropped": self.answers - self.met,
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens / seconds, 2),
            "priority": self.priority,
        }

    def kept(self, file: Path | None) -> dict[str, Any]:
        return {
            "file": str(file) if self.saved else None,
            "tokens": len(self.session.tokens),
            "rewinds": self.rewinds,
            "answers_in_all": self.session.data.get("answers", 0),
        }

    def stop(self) -> None:
        """End the answer that is being given after its current step. For any thread."""
        self._stopping.set()
        if self._stream is not None:
            self._stream.cancel()


@contextmanager
def steady(realtime: bool) -> Iterator[str]:
    """What this thread can do so that its ticks are punctual; yields the priority it got.

    A thread that wants the interpreter asks for it after the switch interval. Collections look
    at what was allocated since `freeze`, not at the libraries. A real-time thread goes before
    all others of the machine, where the system permits it; threads it starts would do so, too.
    """
    interval, policy, rank = sys.getswitchinterval(), os.sched_getscheduler(0), os.sched_getparam(0)
    sys.setswitchinterval(0.0002)
    gc.collect()
    gc.freeze()
    priority = "ordinary"
    if realtime:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
            priority = "SCHED_FIFO 2"
        except OSError:
            priority = "ordinary (SCHED_FIFO is not permitted)"
    try:
        yield priority
    finally:
        if priority == "SCHED_FIFO 2":
            os.sched_setscheduler(0, policy, rank)
        gc.unfreeze()
        sys.setswitchinterval(interval)


def keep_running() -> str:
    """Put this thread before ordinary programs, behind control; yields the priority it got.

    Were it sent away while it holds the interpreter, the control thread would wait for a program
    that neither of them knows: up to 30 ms beside two busy processes on two cores.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        return "ordinary"
    return "SCHED_RR 1"


def control_loop(
    joint: Joint, hz: float, lateness: Lateness, go_on: Callable[[float], bool]
) -> float:
    """Tick while `go_on(seconds)`. Returns how long that was, in seconds.

    Ticks are due where the machine's clock is a multiple of 1 / hz, in every process alike: what
    stops the machine is seen by the baseline, too.
    """
    number = math.ceil(time.perf_counter() * hz)
    start = number / hz
    while True:
        number += 1
        due = number / hz
        if (left := due - time.perf_counter() - EARLY_S) > 0:
            time.sleep(left)
        while (now := time.perf_counter()) < due:
            time.sleep(0)  # lets the other thread at the interpreter
        lateness.add(now - due, number)
        joint.control(now - start)
        if not go_on(now - start):
            return now - start
        behind = int((time.perf_counter() - due) * hz)
        lateness.missed += behind
        number += behind


def open_session(model: edgert.Model, given: argparse.Namespace) -> tuple[edgert.Session, bool]:
    """The saved session if there is one, else a new one that has read the instruction."""
    if given.session is not None and given.session.exists():
        session = edgert.resume(given.session, model=model)
        for text in session.notes:
            note(text)
        return session, True
    session = model.session()
    session.append(given.prompt)
    session.data["instruction"] = len(session.tokens)
    return session, False


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    given = options(arguments)
    try:
        report = run(given)
        if given.plot is not None:
            given.plot.write_text(picture(report), encoding="utf-8")
    except (edgert.EdgertError, OSError) as error:
        note(f"error: {error}")
        return exit_code(error)
    print(json.dumps(report) if given.json else "\n".join(in_words(report)))
    return int(report["exit_code"])


def exit_code(error: Exception | None) -> int:
    return 0 if error is None else getattr(error, "exit_code", 1)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Load, move and talk until the time is over or a signal says so, save. The report."""
    signals: list[str] = []

    def on_signal(number: int, _: object) -> None:
        signals.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        if not given.generate:
            return move(given, None, signals) | {"session": None, "placement": None}
        with edgert.load(given.bundle, threads=given.threads) as model:
            session, resumed = open_session(model, given)
            with session:
                talk = Talk(session, given.deadline_ms, given.max_tokens)
                known = {"resumed": resumed, "tokens_at_start": len(session.tokens)}
                report = move(given, talk, signals)
                report["session"] = known | talk.kept(given.session)
                return report | {"placement": model.placement}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def move(given: argparse.Namespace, talk: Talk | None, signals: list[str]) -> dict[str, Any]:
    """The control loop, and the talk beside it. It ends with saving: control goes on meanwhile."""
    joint, lateness = Joint(), Lateness()
    ends: list[float] = []  # when the talk was told to end

    def go_on(seconds: float) -> bool:
        if not ends and (signals or 0 < given.seconds <= seconds):
            ends.append(seconds)
            if talk is not None:
                talk.stop()
        return not ends or (thread is not None and thread.is_alive())

    thread = None
    if talk is not None:
        thread = threading.Thread(
            target=talk.run, args=(joint.situation, given.session, given.realtime)
        )
    baseline = alone(given) if given.baseline else None
    note(f"the control loop runs{'' if talk else ' without a model'}")
    stolen = stolen_s()
    try:
        if thread is not None:
            thread.start()
        with steady(given.realtime) as priority:
            seconds = control_loop(joint, given.hz, lateness, go_on)
    finally:
        if talk is not None and thread is not None:
            talk.stop()
            thread.join()
    other = ended(baseline) if baseline else None
    return {
        "ended_by": signals[0] if signals else "time",
        "exit_code": exit_code(talk.error) if talk else 0,
        "seconds": round(seconds, 3),
        "shutdown_seconds": round(seconds - ends[0], 3),
        "hz": given.hz,
        "priority": priority,
        "ticks": lateness.ticks,
        "missed_ticks": lateness.missed,
        "late_1_ms": lateness.between(1.0),
        "late_5_ms": lateness.between(5.0),
        "late_5_ms_like_baseline": like(lateness.late, other["late"]) if other else None,
        "late": list(lateness.late.items()),
        "lateness_ms": {
            "p50": lateness.quantile_ms(0.5),
            "p99": lateness.quantile_ms(0.99),
            "max": round(lateness.worst_ms, 3),
        },
        "histogram": {"from_ms": list(EDGES_MS), "ticks": lateness.histogram()},
        "tracking_error_degrees": round(joint.error_degrees(lateness.ticks), 3),
        "stolen_ms": round((stolen_s() - stolen) * 1e3),
        "generation": talk.report(ends[0]) if talk else None,
        "baseline": other,
    }


def alone(given: argparse.Namespace) -> subprocess.Popen[str]:
    """The same loop at the same time, in a process without a model: what the machine itself does.

    Where ticks are late in both, the machine was busy or its host had taken the processor away.
    """
    line = [sys.executable, __file__, "--no-generate", "--json", f"--hz={given.hz}"]
    line += [f"--seconds={given.seconds + 30}", *([] if given.realtime else ["--no-realtime"])]
    child = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stderr is not None
    child.stderr.readline()  # it says when it begins
    return child


def ended(child: subprocess.Popen[str]) -> dict[str, Any]:
    child.terminate()
    out, problem = child.communicate()
    if child.returncode:
        raise OSError(f"the baseline's process failed: {problem}")
    return dict(json.loads(out))


def like(late: dict[int, float], others: list[tuple[int, float]]) -> int:
    """How many ticks over 5 ms came when the baseline was late as well, by 1 ms or more."""
    numbers = {number + step for number, _ in others for step in (-1, 0, 1)}
    return sum(ms >= 5.0 and number in numbers for number, ms in late.items())


def stolen_s() -> float:
    """CPU seconds that the host of a virtual machine has given to others, since boot, all CPUs."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A control loop at a fixed rate beside a model that answers with deadlines.",
        epilog="Ctrl-C and SIGTERM save the session and exit with 0; a second one ends at once.",
    )
    add = parser.add_argument
    add("bundle", type=Path, nargs="?", help="bundle directory (holds manifest.json)")
    add("--seconds", type=number(0), default=60.0, metavar="S", help="0: until a signal (60)")
    add("--hz", type=number(1), default=100.0, metavar="N", help="control ticks per second (100)")
    add("--deadline-ms", type=number(1), default=1000.0, metavar="MS", help="of an answer (1000)")
    add("--max-tokens", type=int, default=12, metavar="N", help="longest answer (12)")
    add("--threads", type=int, default=1, metavar="N", help="of the model (1)")
    add("--session", type=Path, metavar="FILE", help="resumed if it exists, saved at the end")
    add("--prompt", default=INSTRUCTION, metavar="TEXT", help="what a new session reads first")
    add("--no-generate", dest="generate", action="store_false", help="the loop alone: the baseline")
    add(
        "--no-realtime",
        dest="realtime",
        action="store_false",
        help="do not ask for priority over other programs",
    )
    add("--json", action="store_true", help="print the report as one JSON object")
    add("--plot", type=Path, metavar="FILE", help="draw the histogram as SVG")
    add(
        "--baseline",
        action="store_true",
        help="beside it, run the loop alone in a process of its own, and report both",
    )
    given = parser.parse_args(arguments)
    if given.generate and given.bundle is None:
        parser.error("give a bundle, or --no-generate")
    if given.baseline and not (given.generate and given.seconds):
        parser.error("--baseline goes with a bundle and a number of --seconds")
    return given


def number(least: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = float(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g}")
        return value

    return convert


if __name__ == "__main__":
    sys.exit(main())
