"""What a run says: tables, the sentences around them, goals; on a terminal and as a page."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from peers_goals import ACCEPTED, MET, MISSED, Goal, goals
from peers_report import MIN_QUIET, OURS, Perplexity, Summary, Work, judge, summarise
from peers_rounds import MEMORY_SIZE, Plan, Results

if TYPE_CHECKING:
    from rich.table import Table

GOAL_COLUMNS = ("goal", "measured", "")
COLORS = {MET: "green", ACCEPTED: "green", MISSED: "red"}


def columns(work: Work) -> list[str]:
    prefill = [f"prefill {n}, tok/s" for n in work.prefills]
    decode = [f"decode at {n}, ms" for n in work.depths]
    return ["threads", "side", *prefill, *decode, "of limit", "cold start, s", "peak MB"]


def rows(table: Mapping[int, Mapping[str, Summary]], work: Work) -> list[list[str]]:
    """A row for each side at each thread count. Beside a peer's speed: how many times as fast
    edgert's side is that it is compared with."""

    def beside(text: str, side: Summary, key: str) -> str:
        return f"{text} ({side.over[key]:.2f}x)" if key in side.over else text

    return [
        [
            str(threads),
            name + ("" if side.quiet else " *"),
            *(beside(f"{side.prefill[n]:.0f}", side, f"prefill {n}") for n in work.prefills),
            *(beside(f"{side.step_ms[n]:.2f}", side, f"decode {n}") for n in work.depths),
            " ".join(f"{side.limit[n]:.0%}" for n in work.depths),
            beside(f"{side.cold_s:.2f}", side, "cold"),
            f"{side.peak:.0f}",
        ]
        for threads, sides in table.items()
        for name, side in sides.items()
    ]


TEXT_COLUMNS = ("side", "runtime", "weights a step, MB", "perplexity", "beside fp32")


def text_rows(sides: Mapping[str, Any], scores: Mapping[str, Perplexity]) -> list[list[str]]:
    """What each side is, and what the text costs it."""
    return [
        [
            name,
            facts["about"],
            f"{facts['weight_bytes'] / 1e6:.1f}",
            f"{scores[name].perplexity:.3f}",
            f"{scores[name].ratio:.4f} ± {scores[name].error:.4f}",
        ]
        for name, facts in sides.items()
        if name in scores
    ]


def rich_table(names: Sequence[str], lines: Sequence[Sequence[str]], title: str) -> Table:
    """A section ends where the first cell changes, if it is a number."""
    from rich.table import Table

    out = Table(title=title, title_justify="left")
    for name in names:
        out.add_column(name, justify="left" if name in ("side", "runtime") else "right")
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        ends = following is None or (line[0].isdigit() and line[0] != following[0])
        style = "bold" if OURS in line[0] + line[1] else None
        out.add_row(*line, end_section=ends, style=style)
    return out


def markdown(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(names), ["---"] * len(names), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


@dataclass(frozen=True)
class Report:
    """What there is to say."""

    about: dict[str, Any]
    plan: Plan
    sides: dict[str, dict[str, Any]]
    scores: dict[str, Perplexity]
    table: dict[int, dict[str, Summary]]  # threads -> side -> medians
    limits: dict[int, dict[int, float]]  # threads -> size -> GB/s
    goals: list[Goal]
    missing: dict[str, str]  # not to be had, or failed
    wrong: dict[str, str]  # measured, and not believed


def summary(
    results: Results, plan: Plan, sides: dict[str, dict[str, Any]], missing: dict[str, str]
) -> Report:
    scores, wrong = judge(sides, results.scores, results.rounds, plan.work)
    valid = {name: facts for name, facts in sides.items() if name not in wrong}
    limits = {
        threads: {size: median(found) for size, found in results.speeds(threads).items()}
        for threads in plan.threads
    }
    table: dict[int, dict[str, Summary]] = {}
    for threads in plan.threads:
        rounds = results.at(threads)
        table[threads] = {}
        for name, facts in valid.items():
            speed = limits[threads].get(facts["weight_bytes"])
            found = speed and summarise(rounds, valid, name, plan.work, speed, scores)
            if found:
                table[threads][name] = found
    precisions = [name.partition("-")[2] for name in sides if name.startswith("edgert-")]
    reached = goals(table, scores, goal_threads(plan), precisions)
    return Report(results.about, plan, sides, scores, table, limits, reached, missing, wrong)


def goal_threads(plan: Plan) -> int:
    return 2 if 2 in plan.threads else max(plan.threads)


def sentences(r: Report) -> list[str]:
    """What stands around the tables."""
    found = []
    for threads, speeds in r.limits.items():
        if MEMORY_SIZE in speeds:
            sizes = sorted(set(speeds) - {MEMORY_SIZE})
            some = ", ".join(f"{speeds[n]:.1f} of {n / 1e6:.0f} MB" for n in sizes)
            found.append(
                f"{threads} threads read memory at {speeds[MEMORY_SIZE]:.1f} GB/s; {some} again and"
                " again"
            )
    compared = {
        name: side.beside
        for sides in r.table.values()
        for name, side in sides.items()
        if side.beside
    }
    for ours in dict.fromkeys(compared.values()):
        theirs = ", ".join(name for name, side in compared.items() if side == ours)
        found.append(f"in brackets, {ours} beside: {theirs}")
    used = [side.rounds for sides in r.table.values() for side in sides.values()]
    if used:
        found.append(f"medians of {min(used)} to {max(used)} rounds")
    busy = {n for sides in r.table.values() for n, side in sides.items() if not side.quiet}
    if busy:
        found.append(
            f"* others kept the machine busy, or there were fewer than {MIN_QUIET} rounds: "
            "not to be trusted"
        )
    found += [f"{name} is not there: {why}" for name, why in r.missing.items()]
    found += [f"{name} is INVALID: {why}" for name, why in r.wrong.items()]
    return found


def show(r: Report) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(f"{r.about['machine']['cpu']}, {r.about['machine']['cpus']} CPUs")
    title = "medians; (1.30x): edgert's side of as many bits is 1.30 times as fast"
    console.print(rich_table(columns(r.plan.work), rows(r.table, r.plan.work), title))
    title = f"{len(r.plan.windows())} windows of {r.plan.window} tokens"
    console.print(rich_table(TEXT_COLUMNS, text_rows(r.sides, r.scores), title))
    for text in sentences(r):
        console.print(text, markup=False, soft_wrap=True)
    for goal in r.goals:
        color = COLORS.get(goal.verdict, "yellow")
        console.print(f"[{color}]{goal.verdict:>12}[/{color}]  {goal.text}:  {goal.measured}")


def page(r: Report) -> str:
    """Markdown."""
    parts = [
        markdown(columns(r.plan.work), rows(r.table, r.plan.work)),
        markdown(TEXT_COLUMNS, text_rows(r.sides, r.scores)),
        "\n".join(f"- {text}" for text in sentences(r)),
        markdown(GOAL_COLUMNS, [[goal.text, goal.measured, goal.verdict] for goal in r.goals]),
    ]
    return "\n\n".join(parts) + "\n"
