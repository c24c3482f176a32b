"""From the workers' answers to a verdict: which sides are valid, medians, ratios, goals.

Pure functions. A side is named <runtime>-<variant>; edgert's side of as many bits is what a peer is
compared with. A round holds one answer of each side at one thread count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

OURS = "edgert"
REFERENCE = "edgert-fp32"
EXACT = (REFERENCE, "edgert-fp32-mapped", "genai-fp32", "torch-eager", "torch-compile")
"""Sides that compute the same in float32 throughout: their tokens must be equal."""

CLEAR_MARGIN = 1e-3
"""Logits of two sound implementations differ by less: a larger lead decides the token."""

MIN_COMPARED = 0.25
"""Tokens are believed only if at least this share of them was compared."""

WORST_RATIO = {32: 1.001, 8: 1.2, 4: 1.5}
"""Perplexity beside the reference's, by bits: a side beyond does not compute the model. Rounding to
4 bits without calibration, the head too, costs a model of this size a quarter; a graph that is
wrong costs it tens of times as much."""

QUIET = 0.2
"""CPUs that others may keep busy while a side is measured that counts as undisturbed."""

MIN_QUIET = 3

Answer = Mapping[str, Any]
Round = Mapping[str, Answer]


@dataclass(frozen=True)
class Work:
    """What a worker does. Prompts are the first tokens of one text."""

    prefills: tuple[int, ...] = (32, 256, 1024)
    depths: tuple[int, ...] = (0, 512, 1024)  # tokens in the KV cache as decoding starts
    steps: int = 64
    cold: int = 32
    short: int = 4  # the prompt of depth 0

    def prompt(self, depth: int) -> int:
        return max(depth, self.short)

    def requests(self) -> list[tuple[int, int]]:
        """(prompt length, steps) of each request."""
        decoded = {self.prompt(depth) for depth in self.depths}
        lengths = sorted(decoded | set(self.prefills))
        return [(n, self.steps if n in decoded else 0) for n in lengths]

    def capacity(self) -> int:
        return max(n + steps for n, steps in self.requests()) + 1


def bits_of(sides: Mapping[str, Any], name: str) -> int:
    return int(sides[name]["bits"])


def counterpart(
    sides: Mapping[str, Any], name: str, scores: Mapping[str, Perplexity] | None = None
) -> str | None:
    """edgert's side of as many bits that a side is compared with: of those whose perplexity is no
    higher, the one that reads the fewest bytes a step; the first one named where there is none."""
    ours = [n for n in sides if n.startswith(f"{OURS}-") and same_bits(sides, n, name)]
    scores = scores or {}
    as_true = [n for n in ours if name in scores and n in scores]
    as_true = [n for n in as_true if scores[n].ratio <= scores[name].ratio]
    return min(as_true or ours[:1], key=lambda n: sides[n]["weight_bytes"], default=None)


def same_bits(sides: Mapping[str, Any], a: str, b: str) -> bool:
    return bits_of(sides, a) == bits_of(sides, b)


# Validity: tokens of sides that compute the same, perplexity of all.


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs (or that only one has); None if they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def unfinished(answer: Answer, work: Work) -> str | None:
    """Why an answer is not the work that was asked for, or None."""
    wanted = dict(work.requests())
    for run in answer["runs"]:
        want = wanted[run["prompt"]] + 1
        if len(run["tokens"]) != want:
            return f"it gave {len(run['tokens'])} tokens behind {run['prompt']}, not {want}"
    return None


def differs(reference: Answer, answer: Answer) -> str | None:
    """Why the tokens of a side are not those of the reference, which knows its margins; or None.

    Sequences part for good at a near-tie, so they are compared up to there: a difference at a clear
    margin is an error, and so is one that leaves too little compared.
    """
    runs = {run["prompt"]: run for run in reference["runs"]}
    compared = total = 0
    for run in answer["runs"]:
        ours = runs[run["prompt"]]
        at = first_difference(ours["tokens"], run["tokens"])
        total += len(ours["tokens"])
        compared += len(ours["tokens"]) if at is None else at
        if at is not None and ours["margins"][at] > CLEAR_MARGIN:
            return (
                f"token {at} behind {run['prompt']} is {run['tokens'][at]}, not "
                f"{ours['tokens'][at]}, which leads by {ours['margins'][at]:.3g}"
            )
    if compared < total * MIN_COMPARED:
        return f"the tokens part after {compared} of {total}: too early to call it the same work"
    return None


def invalid(round_: Round, work: Work) -> dict[str, str]:
    """side -> why its answer of this round does not count."""
    found = {name: unfinished(answer, work) for name, answer in round_.items()}
    if REFERENCE in round_ and found[REFERENCE] is None:
        for name in EXACT:
            if name in round_ and found[name] is None:
                found[name] = differs(round_[REFERENCE], round_[name])
    return {name: reason for name, reason in found.items() if reason is not None}


@dataclass(frozen=True)
class Perplexity:
    """Of a text, and beside the reference's; `error` is the standard error of the ratio."""

    perplexity: float
    ratio: float
    error: float
    tokens: int


def perplexity(costs: Sequence[float], reference: Sequence[float]) -> Perplexity:
    """-ln p of each token, of a side and of the reference."""
    if len(costs) != len(reference):
        raise ValueError(f"{len(costs)} costs beside {len(reference)}")
    apart = [a - b for a, b in zip(costs, reference, strict=True)]
    mean = sum(apart) / len(apart)
    spread = math.sqrt(sum((x - mean) ** 2 for x in apart) / len(apart))
    ratio = math.exp(mean)
    return Perplexity(
        perplexity=math.exp(sum(costs) / len(costs)),
        ratio=ratio,
        error=ratio * spread / math.sqrt(len(apart)),
        tokens=len(costs),
    )


def implausible(bits: int, found: Perplexity) -> str | None:
    """Why a side cannot be computing the model, or None."""
    worst = WORST_RATIO[bits]
    if found.ratio <= worst:
        return None
    return f"its perplexity is {found.ratio:.4f} times that of fp32, more than {worst}"


def judge(
    sides: Mapping[str, Any],
    scores: Mapping[str, Sequence[Sequence[float]]],
    rounds: Mapping[str, Round],
    work: Work,
) -> tuple[dict[str, Perplexity], dict[str, str]]:
    """What the text costs each side, and side -> why nothing of it counts.

    scores  side -> costs of each window; rounds: by a name that a reason can quote
    """
    found, wrong = {}, {}
    reference = [cost for window in scores.get(REFERENCE, ()) for cost in window]
    for name in sides if reference else ():
        if name in scores:
            found[name] = perplexity([c for window in scores[name] for c in window], reference)
            reason = implausible(bits_of(sides, name), found[name])
            if reason is not None:
                wrong[name] = reason
    for number, round_ in rounds.items():
        for name, reason in invalid(round_, work).items():
            wrong.setdefault(name, f"round {number}: {reason}")
    return found, wrong


# Speed: medians over rounds, ratios within a round.


def prefill_speed(answer: Answer, prompt: int) -> float:
    """Tokens a second."""
    return float(median(prompt / r["prefill_s"] for r in answer["runs"] if r["prompt"] == prompt))


def step_speed(answer: Answer, prompt: int) -> float:
    """Steps a second, by the median step behind a prompt."""
    return 1 / float(
        median(s for r in answer["runs"] if r["prompt"] == prompt for s in r["step_s"])
    )


def start_speed(answer: Answer) -> float:
    return 1 / float(answer["cold_s"])


def disturbance(answer: Answer) -> float:
    return max(float(answer["others"]), float(answer["cold_others"]))


def chosen(rounds: Sequence[Round], names: Iterable[str]) -> tuple[list[Round], bool]:
    """The rounds that hold all these sides undisturbed, and True; with fewer than MIN_QUIET of
    them all rounds that hold the sides, and False."""
    names = list(names)
    there = [r for r in rounds if all(name in r for name in names)]
    alone = [r for r in there if all(disturbance(r[name]) <= QUIET for name in names)]
    return (alone, True) if len(alone) >= MIN_QUIET else (there, False)


@dataclass(frozen=True)
class Summary:
    """One side at one thread count: medians over rounds. `over` has the same keys as the speeds:
    how many times as fast edgert's side `beside` it is; empty for edgert, and where it has no such
    side."""

    prefill: dict[int, float]  # prompt -> tokens/s
    step_ms: dict[int, float]  # depth -> median step
    limit: dict[int, float]  # depth -> share of the memory limit: its time over the step's
    cold_s: float
    peak: float  # MB
    anonymous: float
    file: float
    over: dict[str, float]  # 'prefill 256', 'decode 512', 'cold'
    rounds: int
    quiet: bool
    beside: str | None = None

    def tokens(self, depth: int) -> float:
        """Decode, tokens a second."""
        return 1e3 / self.step_ms[depth]


def speeds(work: Work) -> dict[str, Callable[[Answer], float]]:
    """Every speed of an answer, by the key it has in `Summary.over`."""

    def prefilled(prompt: int) -> Callable[[Answer], float]:
        return lambda answer: prefill_speed(answer, prompt)

    def decoded(depth: int) -> Callable[[Answer], float]:
        return lambda answer: step_speed(answer, work.prompt(depth))

    found: dict[str, Callable[[Answer], float]] = {}
    found |= {f"prefill {prompt}": prefilled(prompt) for prompt in work.prefills}
    found |= {f"decode {depth}": decoded(depth) for depth in work.depths}
    return found | {"cold": start_speed}


def read_ms(facts: Mapping[str, Any], depth: float, gb_per_s: float) -> float:
    """What it takes to read a step's weights, and the KV cache of `depth` positions."""
    return float((facts["weight_bytes"] + depth * facts["kv_bytes"]) / gb_per_s / 1e6)


def summarise(
    rounds: Sequence[Round],
    sides: Mapping[str, Any],
    name: str,
    work: Work,
    gb_per_s: float,
    scores: Mapping[str, Perplexity] | None = None,
) -> Summary | None:
    """Rounds -> medians of a side; None if no round holds it.

    gb_per_s  how fast memory is read where as much is read as this side reads in a step
    """
    kept, quiet = chosen(rounds, [name])
    if not kept:
        return None
    answers = [r[name] for r in kept]
    ours = None if name.startswith(f"{OURS}-") else counterpart(sides, name, scores)
    over = {}
    if ours is not None:
        pairs, sure = chosen(rounds, [name, ours])
        quiet &= sure
        for key, speed in speeds(work).items() if pairs else ():
            over[key] = float(median(speed(r[ours]) / speed(r[name]) for r in pairs))

    def middle(of: Callable[[Answer], float]) -> float:
        return float(median(of(answer) for answer in answers))

    def step_ms(depth: int) -> float:
        return middle(lambda a: 1e3 / step_speed(a, work.prompt(depth)))

    steps = {depth: step_ms(depth) for depth in work.depths}
    halfway = work.steps / 2
    return Summary(
        prefill={n: middle(lambda a, n=n: prefill_speed(a, n)) for n in work.prefills},
        step_ms=steps,
        limit={
            depth: read_ms(sides[name], work.prompt(depth) + halfway, gb_per_s) / ms
            for depth, ms in steps.items()
        },
        cold_s=middle(lambda a: float(a["cold_s"])),
        peak=middle(lambda a: float(a["memory"]["peak"])),
        anonymous=middle(lambda a: float(a["memory"]["anonymous"])),
        file=middle(lambda a: float(a["memory"]["file"])),
        over=over,
        rounds=len(kept),
        quiet=quiet,
    )
