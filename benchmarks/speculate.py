"""Speculation against plain decode: answers that repeat much of a text, and answers that do not.

    python benchmarks/speculate.py bundles/smollm2-135m-instruct --precision fp32,int4

Each prompt goes through the chat template and is answered greedily, in a session of its own, plain
and speculating in turns; the time is that from the first token to the last. Tokens must be equal
wherever the best logit leads by more than the bundle's parity allows. Ratios are medians of the
rounds: plain time over the time with speculation. On a machine that others use the ratio of CPU
time is the steadier one, with one thread: threads that wait for each other spin.

--widths measures instead what a step costs that reads several tokens, in plain steps: where the
numbers in `edgert/speculate.py` come from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from runtimes.measure import Window, await_quiet
from speculate_prompts import EDIT, OPEN

import edgert
from edgert.bench.verify import margin_of
from edgert.model import Model
from edgert.speculate import Guesses

SETS = {"edit": EDIT, "open-ended": OPEN}
GOALS = {"edit": ("median", 1.5), "open-ended": ("least", 0.97)}
WAYS = ("off", "auto")
DEPTH = 256  # tokens in the state before a step whose width is measured
WIDTHS = (1, 2, 3, 5, 9)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--precision", default="fp32", show_default=True, metavar="NAMES")
@click.option("--threads", default=2, type=click.IntRange(1), show_default=True)
@click.option("--rounds", default=5, type=click.IntRange(1), show_default=True)
@click.option("--tokens", default=160, type=click.IntRange(2), show_default=True)
@click.option("--patience", default=0.0, show_default=True, help="Seconds to wait for quiet, each.")
@click.option("--widths", is_flag=True, help="Measure what the width of a step costs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each precision.")
def main(
    bundle: Path,
    precision: str,
    threads: int,
    rounds: int,
    tokens: int,
    patience: float,
    widths: bool,
    as_json: bool,
) -> None:
    """Plain decode and speculation in turns: milliseconds a token, ratio, guessed tokens."""
    for name in precision.split(","):
        with edgert.load(bundle, precision=name, threads=threads) as model:
            window = Window()
            if widths:
                report = {"steps": width_costs(model, rounds)}
                show = width_table
            else:
                report = {"prompts": compared(model, rounds, tokens, patience)}
                show = table
            facts = {"model": model.manifest.name, "placement": model.placement, "rounds": rounds}
            report = facts | {"others_cpus": window.others()} | report
        click.echo(json.dumps(report) if as_json else show(report))


def compared(model: Model, rounds: int, tokens: int, patience: float) -> list[dict[str, Any]]:
    """Every prompt in both ways, in turns. Raises ClickException where tokens differ."""
    answer(model, [1, 2, 3], 16, "off")  # warm-up
    found = []
    for kind, prompts in SETS.items():
        for name, text in prompts.items():
            ids = model.chat_ids([{"role": "user", "content": text}])
            made: dict[str, list[Answer]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                if patience:
                    await_quiet(0.2, patience)
                for way in WAYS:
                    made[way].append(answer(model, ids, tokens, way))
            off, on = (made[way][0] for way in WAYS)
            pairs = list(zip(made["off"], made["auto"], strict=True))
            found.append(
                {
                    "set": kind,
                    "prompt": name,
                    "n_prompt": len(ids),
                    "n_gen": len(off.tokens),
                    "unclear": check(model, ids, made),
                    "ms": {way: median(one.ms for one in made[way]) for way in WAYS},
                    "ratios": [a.ms / b.ms for a, b in pairs],
                    "cpu_ratios": [a.cpu_ms / b.cpu_ms for a, b in pairs],
                    "checked": on.guesses.checked,
                    "accepted": on.guesses.accepted,
                }
            )
    return found


@dataclass(frozen=True)
class Answer:
    """Its tokens; milliseconds from token to token on average, by the clock and of the CPUs."""

    tokens: tuple[int, ...]
    guesses: Guesses
    ms: float
    cpu_ms: float


def answer(model: Model, ids: list[int], tokens: int, way: str) -> Answer:
    with model.session() as session:
        stream = session.stream(ids, max_tokens=tokens, temperature=0.0, speculate=way)
        next(stream)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in stream:
            pass
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    steps = max(1, len(stream.tokens) - 1)
    spent = (seconds / steps * 1e3 for seconds in (wall, cpu))
    return Answer(tuple(stream.tokens), stream.timings.guesses, *spent)


def check(model: Model, ids: list[int], made: Mapping[str, list[Answer]]) -> int | None:
    """None if all answers have the same tokens, else the first place where they differ, if that is
    one where rounding decides. Raises ClickException for any other."""
    want = made["off"][0].tokens
    for way in WAYS:
        for one in made[way]:
            if one.tokens == want:
                continue
            pairs = zip(one.tokens, want, strict=False)
            shorter = min(len(one.tokens), len(want))  # one may end where the other goes on
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
            second, first = np.sort(model.logits([[*ids, *want[:place]]])[0, -1])[-2:]
            if way == "off" or first - second > margin_of(model):
                raise click.ClickException(
                    f"{way} says other tokens than plain decode, from token {place} on, where the "
                    f"best logit leads by {first - second:.3g}"
                )
            return place
    return None


def width_costs(model: Model, rounds: int) -> list[dict[str, float]]:
    """Steps of several tokens behind DEPTH others, in turns; results at every position."""
    ids = np.random.default_rng(0).integers(0, model.manifest.vocab_size, DEPTH)
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}
    with model.session() as session:
        execution = session.execution
        for _ in execution.feed(ids):
            pass
        for turn in range(20 * rounds + 1):
            for width in WIDTHS:
                execution.lens[0] = DEPTH
                begun = time.perf_counter()
                execution.verify(ids[:width].tolist())
                if turn:  # the first one binds its buffers
                    times[width].append((time.perf_counter() - begun) * 1e3)
    one = times[1]
    return [
        {
            "tokens": width,
            "ms": median(spent),
            "plain_steps": median(b / a for a, b in zip(one, spent, strict=True)),
        }
        for width, spent in times.items()
    ]


def width_table(r: dict[str, Any]) -> str:
    lines = [heading(r), f"{'tokens in a step':20}{'ms':>9}{'plain steps':>13}{'a guess':>9}"]
    for step in r["steps"]:
        more = step["tokens"] - 1
        each = f"{(step['plain_steps'] - 1) / more:9.3f}" if more else ""
        lines.append(
            f"{step['tokens']:<20}{step['ms']:9.2f}{step['plain_steps']:13.2f}{each}".rstrip()
        )
    return "\n".join(lines) + "\n"


def heading(r: dict[str, Any]) -> str:
    return (
        f"{r['model']} · {r['placement']} · {r['rounds']} rounds · "
        f"others kept {r['others_cpus']:.2f} CPUs busy"
    )


def table(r: dict[str, Any]) -> str:
    lines = [
        heading(r),
        f"{'':22}{'tokens':>7}{'plain ms':>10}{'auto ms':>9}{'ratio':>8}{'of CPU':>8}"
        f"{'guessed':>9}{'right':>7}",
    ]
    for kind in SETS:
        rows = [row for row in r["prompts"] if row["set"] == kind]
        for row in rows:
            right = f"{100 * row['accepted'] / row['checked']:.0f} %" if row["checked"] else "–"
            lines.append(
                f"{kind + ' ' + row['prompt']:22}{row['n_gen']:7}{row['ms']['off']:10.2f}"
                f"{row['ms']['auto']:9.2f}{median(row['ratios']):7.2f}x"
                f"{median(row['cpu_ratios']):7.2f}x"
                f"{100 * row['accepted'] / row['n_gen']:7.0f} %{right:>7}"
                + (f"  differs from {row['unclear']} on" if row["unclear"] is not None else "")
            )
        which, goal = GOALS[kind]
        for what, key in (("ratio", "ratios"), ("of CPU", "cpu_ratios")):
            ratios = [median(row[key]) for row in rows]
            value = median(ratios) if which == "median" else min(ratios)
            lines.append(
                f"{kind}, {what}: median {median(ratios):.2f}x, least {min(ratios):.2f}x; "
                f"goal {which} >= {goal}: {'met' if value >= goal else 'missed'}"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
