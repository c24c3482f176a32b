"""edgert against ONNX Runtime GenAI: the same fp32 weights, prompt, threads and ONNX Runtime.

    python benchmarks/peer.py --bundle bundles/smollm2-135m-instruct

Each round runs every side once, each in a process of its own, in turning order; the first round is
discarded. Tokens are verified before anything is reported. See benchmarks/README.md.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from peer_measure import Window, await_quiet
from peer_report import (
    CLEAR_MARGIN,
    DEFAULT,
    LOW_MEMORY,
    PEER,
    QUIET,
    SIDES,
    Answer,
    Goal,
    Summary,
    as_json,
    goals,
    markdown,
    quiet,
    rich_table,
    summarise,
    verify,
)
from peer_setup import GENAI, Peer, peer_environment, set_up

from edgert.bundle import Bundle
from edgert.errors import EdgertError, UsageError
from edgert.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORKER_TIMEOUT = 1800
ATTEMPTS = 3


def note(text: str) -> None:
    click.echo(text, err=True)


def thread_counts(text: str) -> tuple[int, ...]:
    """'1,2' -> (1, 2). Raises UsageError."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1 or len(set(counts)) != len(counts):
        raise UsageError(f"--threads {text!r} is not a list of different numbers", do="such as 1,2")
    return counts


def prompt_ids(bundle: Bundle, text: str, tokens: int) -> list[int]:
    """The first `tokens` ids of a text. Raises UsageError if it is shorter."""
    spec = bundle.manifest.tokenizer
    if spec is None:
        raise UsageError("this bundle has no tokenizer", where=str(bundle.root))
    ids = load_tokenizer(spec, bundle.path(spec.file) if spec.file else None).encode(text)
    if len(ids) < tokens:
        raise UsageError(
            f"the text has {len(ids)} tokens, not {tokens}", do="give a longer one: --text FILE"
        )
    return ids[:tokens]


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    cpu = "not known"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith(("model name", "hardware")):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "edgert": version("edgert"),
        "onnxruntime": version("onnxruntime"),
        "onnxruntime_genai": GENAI,
        "numpy": version("numpy"),
    }


def ask(command: list[str], orders: dict[str, Any], log: Path, env: dict[str, str]) -> Answer:
    """Run one worker. Its stderr goes to `log`, which is quoted when it fails."""
    name = Path(command[-1]).name
    with log.open("ab") as err:
        try:
            done = subprocess.run(
                [*command, json.dumps(orders)],
                stdout=subprocess.PIPE,
                stderr=err,
                env=env,
                timeout=WORKER_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise EdgertError(
                f"{name} did not finish within {WORKER_TIMEOUT} s", where=str(log)
            ) from error
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode or not lines:
        tail = log.read_text(errors="replace").strip().splitlines()[-5:]
        raise EdgertError(
            f"{name} failed with code {done.returncode}:\n  " + "\n  ".join(tail), where=str(log)
        )
    return json.loads(lines[-1])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    bundle: Path
    ids: list[int]
    tokens: int
    threads: tuple[int, ...]
    rounds: int
    repeats: int
    patience: float


def play(plan: Plan, peer: Peer, threads: int, number: int, log: Path) -> dict[str, Answer]:
    """One round: every side once, starting with another side each time."""
    common = {
        "ids": plan.ids,
        "tokens": plan.tokens,
        "repeats": plan.repeats,
        "threads": threads,
    }
    first = number % len(SIDES)
    answers = {}
    for side in SIDES[first:] + SIDES[:first]:
        if side == PEER:
            command = [str(peer.python), str(HERE / "peer_genai.py")]
            orders, env = common | {"model": str(peer.model)}, peer_environment()
        else:
            command = [sys.executable, str(HERE / "peer_edgert.py")]
            low_memory = side == LOW_MEMORY
            orders = common | {"bundle": str(plan.bundle), "low_memory": low_memory}
            env = dict(os.environ)
        answers[side] = undisturbed(partial(ask, command, orders, log, env), plan.patience)
    return answers


def undisturbed(attempt: Callable[[], Answer], patience: float) -> Answer:
    """The first answer that others did not disturb, or the least disturbed of ATTEMPTS.

    Sides are disturbed apart from each other, so a busy machine falsifies ratios too. What was
    measured plays no part in the choice.
    """
    best: Answer | None = None
    for _ in range(ATTEMPTS):
        await_quiet(QUIET, patience)
        answer = attempt()
        if best is None or answer["others"] < best["others"]:
            best = answer
        if best["others"] <= QUIET:
            break
    assert best is not None
    return best


def measure(plan: Plan, peer: Peer, facts: dict[str, Any], log: Path) -> dict[str, Any]:
    """All rounds -> everything known, as one JSON object. Invalid rounds are left out."""
    kept: dict[int, list[dict[str, Answer]]] = {threads: [] for threads in plan.threads}
    history = []
    for number in range(plan.rounds + 1):
        for threads in plan.threads:
            load, window = os.getloadavg()[0], Window()
            answers = play(plan, peer, threads, number, log)
            check = verify(answers, plan.tokens)
            others = max(answer["others"] for answer in answers.values())
            cold = " (cold, discarded)" if number == 0 else ""
            busy = f" BUSY: others used {others:.1f} CPUs" if others > QUIET else ""
            note(
                f"round {number}{cold}, {threads} threads: load {load:.1f}, "
                f"{window.elapsed():.0f} s, {check.compared} tokens equal{busy}"
            )
            if check.reason:
                note(f"  INVALID: {check.reason}")
            about = {"round": number, "threads": threads, "load": load, "others": others}
            history.append(about | vars(check))
            if number and not check.reason:
                kept[threads].append(answers)
    table, used = {}, {}
    for threads, rounds in kept.items():
        if rounds:
            chosen, enough = quiet(rounds)
            used[threads] = {"rounds": len(chosen), "of": len(rounds), "quiet": enough}
            table[threads] = {side: summarise(chosen, side, len(plan.ids)) for side in SIDES}
    reached = []
    if table:
        mine = kept[next(iter(table))][0][DEFAULT]
        trusted = {threads for threads, use in used.items() if use["quiet"]}
        reached = goals(table, mine["weights_mb"], mine["runs"][0]["state_mb"], trusted)
        show(table, facts, used, reached, f"prefill of {len(plan.ids)}, then {plan.tokens} tokens")
    return {
        "machine": facts,
        "settings": vars(plan) | {"bundle": plan.bundle.name},
        "history": history,
        "used": used,
        "results": as_json(table),
        "goals": [vars(goal) for goal in reached],
        "rounds": kept,
    }


def show(
    table: dict[int, dict[str, Summary]],
    facts: dict[str, Any],
    used: dict[int, dict[str, Any]],
    reached: list[Goal],
    work: str,
) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(
        f"{facts['date']}  {facts['cpu']}, {facts['cpus']} CPUs, {facts['machine']}\n"
        f"edgert {facts['edgert']}, onnxruntime {facts['onnxruntime']} on both sides, "
        f"onnxruntime-genai {facts['onnxruntime_genai']}, Python {facts['python']}"
    )
    console.print(rich_table(table, f"fp32, {work}; medians"))
    for threads, use in used.items():
        console.print(f"{threads} threads: {use['rounds']} of {use['of']} rounds used")
        if not use["quiet"]:
            console.print(
                "  [bold]warning[/bold]: the machine was busy, so all rounds were used: "
                "neither speeds nor ratios are to be trusted"
            )
    console.print(f"tokens compared wherever the margin exceeds {CLEAR_MARGIN:g}")
    for goal in reached:
        verdict = "[green]met   [/green]" if goal.met else "[red]missed[/red]"
        if not goal.reliable:
            verdict = "[yellow]unsure[/yellow]"
        console.print(f"{verdict}  {goal.measured:>8}  {goal.text}")
    if not sys.stdout.isatty():
        console.print(markdown(table), markup=False, soft_wrap=True)


@click.command()
@click.option(
    "--bundle", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True
)
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    help="What the bundle was exported from (default: export/<name of the bundle>.toml).",
)
@click.option("--threads", default="1,2", show_default=True, metavar="LIST")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--repeats", type=click.IntRange(1, 100), default=2, show_default=True)
@click.option(
    "--patience",
    type=click.FloatRange(0, 3600),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="Before each process, wait at most so long for others to leave the machine alone.",
)
@click.option("--prompt", type=click.IntRange(1, 100_000), default=256, show_default=True)
@click.option("--tokens", type=click.IntRange(1, 100_000), default=128, show_default=True)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=HERE / "prompt.txt",
    help="Where the prompt comes from (default: benchmarks/prompt.txt).",
)
@click.option("--cache", type=click.Path(path_type=Path), default=ROOT / ".cache" / "benchmarks")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--strict", is_flag=True, help="Exit with 1 when a goal is missed or unsure.")
def main(
    bundle: Path,
    source: Path | None,
    threads: str,
    rounds: int,
    repeats: int,
    patience: float,
    prompt: int,
    tokens: int,
    text: Path,
    cache: Path,
    json_file: Path | None,
    strict: bool,
) -> None:
    """Compare edgert with ONNX Runtime GenAI: speed, load time and memory."""
    try:
        counts = thread_counts(threads)
        opened = Bundle.open(bundle, True)
        ids = prompt_ids(opened, text.read_text(encoding="utf-8"), prompt)
        source = source or ROOT / "export" / f"{opened.manifest.name}.toml"
        if not source.exists():
            raise UsageError(f"there is no {source}", do="say what the bundle came from: --source")
        facts, cache = machine(), cache.resolve()
        peer = set_up(cache, source, opened.manifest.weights_id, facts["onnxruntime"], note)
        log = cache / "workers.log"
        log.write_bytes(b"")
        plan = Plan(bundle.resolve(), ids, tokens, counts, rounds, repeats, patience)
        result = measure(plan, peer, facts, log)
    except EdgertError as error:
        note(f"error: {error}")
        sys.exit(error.exit_code)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    invalid = sum(check["reason"] is not None for check in result["history"])
    if invalid:
        note(f"error: {invalid} of {len(result['history'])} rounds are invalid, not timed")
    missed = strict and not all(goal["met"] and goal["reliable"] for goal in result["goals"])
    sys.exit(1 if invalid or missed else 0)


if __name__ == "__main__":
    main()
