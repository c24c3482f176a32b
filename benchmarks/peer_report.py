"""From the workers' answers to a verdict: are the tokens right, what are the medians, which goals
are met, and the table that says so. Pure functions.

A side is 'genai', 'edgert' (weights prepacked) or 'edgert low_memory' (weights mapped). A round is
one answer of each side at one thread count.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

PEER, DEFAULT, LOW_MEMORY = SIDES = ("genai", "edgert", "edgert low_memory")

CLEAR_MARGIN = 1e-3
"""Logits of two sound implementations differ by less: a larger lead decides the token."""

MIN_COMPARED = 0.25
"""A run is believed only if at least this share of its tokens was compared."""

QUIET = 0.2
"""CPUs that others may keep busy in a round that counts as quiet."""

MIN_QUIET = 3

HOST_SHARE = 0.05
MEMORY_MARGIN_MB = 250.0

Answer = dict[str, Any]
Round = Mapping[str, Answer]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs (or that only one has); None if they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


@dataclass(frozen=True)
class Check:
    """How far two token sequences agree. `reason` says why the runs are invalid, None if valid."""

    compared: int
    diverged: int | None
    margin: float | None  # of the first token that differs
    reason: str | None


def compare(
    ours: Sequence[int], peers: Sequence[int], margins: Sequence[float], want: int
) -> Check:
    """Greedy tokens of both sides. `margins` are the leads of our tokens over the second best.

    Sequences part for good at a near-tie, so they are compared up to there: a difference at a clear
    margin is an error, and so is one that leaves too little compared.
    """
    for who, tokens in (("edgert", ours), ("the peer", peers)):
        if len(tokens) != want:
            return Check(0, None, None, f"{who} gave {len(tokens)} tokens, not {want}")
    at = first_difference(ours, peers)
    if at is None:
        return Check(want, None, None, None)
    reason = None
    if margins[at] > CLEAR_MARGIN:
        reason = (
            f"token {at} differs ({ours[at]}, peer {peers[at]}) at a margin of {margins[at]:.3g}"
        )
    elif at < want * MIN_COMPARED:
        reason = f"the tokens part at {at}, a near-tie: too early to call the rest the same work"
    return Check(at, at, margins[at], reason)


def verify(answers: Round, tokens: int) -> Check:
    """All runs of all sides of a round against edgert's first run: the least that agreed."""
    reference = answers[DEFAULT]
    ours, margins = reference["runs"][0]["tokens"], reference["margins"]
    checks = [
        compare(ours, run["tokens"], margins, tokens + 1)
        for answer in answers.values()
        for run in answer["runs"]
    ]
    return min(checks, key=lambda check: (check.reason is None, check.compared))


def quiet(rounds: Sequence[Round]) -> tuple[list[Round], bool]:
    """The rounds in which others kept the machine alone, and whether there were enough of them.

    With fewer than MIN_QUIET, all rounds are used, and the caller warns.
    """
    alone = [r for r in rounds if max(a["others"] for a in r.values()) <= QUIET]
    return (alone, True) if len(alone) >= MIN_QUIET else (list(rounds), False)


@dataclass(frozen=True)
class Summary:
    """One side at one thread count: medians over rounds. Speeds in tokens/s, memory in MB."""

    prefill: float
    decode: float
    step_ms: float
    load_s: float
    peak: float
    anonymous: float
    file: float
    host_share: float | None  # of a decode step, outside the graph call; None for the peer
    prefill_ratio: float  # to the peer: median over rounds of the ratio within a round
    decode_ratio: float
    step_ratio: float  # of median steps: > 1 is faster; blind to what happens once in a while


def prefill_speed(answer: Answer, prompt: int) -> float:
    return float(median(prompt / run["prefill_s"] for run in answer["runs"]))


def decode_speed(answer: Answer) -> float:
    return float(median(len(run["step_s"]) / sum(run["step_s"]) for run in answer["runs"]))


def step_speed(answer: Answer) -> float:
    return 1 / float(median(s for run in answer["runs"] for s in run["step_s"]))


def summarise(rounds: Sequence[Round], side: str, prompt: int) -> Summary:
    """Rounds (at least one) -> medians of a side. Ratios are paired: A and B of the same round."""
    answers = [r[side] for r in rounds]
    runs = [run for answer in answers for run in answer["runs"]]

    def middle(*path: str) -> float:
        return float(median(a[path[0]] if len(path) == 1 else a[path[0]][path[1]] for a in answers))

    def ratio(speed: Any, *args: int) -> float:
        return float(median(speed(r[side], *args) / speed(r[PEER], *args) for r in rounds))

    return Summary(
        prefill=median(prefill_speed(a, prompt) for a in answers),
        decode=median(decode_speed(a) for a in answers),
        step_ms=1e3 * median(s for run in runs for s in run["step_s"]),
        load_s=middle("load_s"),
        peak=middle("memory", "peak"),
        anonymous=middle("memory", "anonymous"),
        file=middle("memory", "file"),
        host_share=median(1 - run["graph_s"] / sum(run["step_s"]) for run in runs)
        if all("graph_s" in run for run in runs)
        else None,
        prefill_ratio=ratio(prefill_speed, prompt),
        decode_ratio=ratio(decode_speed),
        step_ratio=ratio(step_speed),
    )


@dataclass(frozen=True)
class Goal:
    """`reliable` is False where the machine was too busy to say whether it is met."""

    text: str
    measured: str
    met: bool
    reliable: bool


def goals(
    table: Mapping[int, Mapping[str, Summary]],
    weights_mb: float,
    state_mb: float,
    trusted: Collection[int],
) -> list[Goal]:
    """What edgert promises, against medians: threads -> side -> summary.

    trusted  thread counts whose times were measured on a quiet machine
    """
    limit = weights_mb + state_mb + MEMORY_MARGIN_MB
    found = []
    for threads, sides in table.items():
        mine, sure = sides[DEFAULT], threads in trusted
        where = f"{threads} thread" + "s" * (threads > 1)
        for name, ratio in (("prefill", mine.prefill_ratio), ("decode", mine.decode_ratio)):
            found.append(Goal(f"{name} >= 1.00x, {where}", f"{ratio:.2f}x", ratio >= 1.0, sure))
        for side in (DEFAULT, LOW_MEMORY):
            share = sides[side].host_share
            assert share is not None
            text = f"{side}: host time < {HOST_SHARE:.0%} of a step, {where}"
            found.append(Goal(text, f"{share:.1%}", share < HOST_SHARE, sure))
    for side in (DEFAULT, LOW_MEMORY):
        peak = max(sides[side].peak for sides in table.values())
        text = (
            f"{side}: peak memory <= {limit:.0f} MB "
            f"(weights {weights_mb:.0f} + state {state_mb:.0f} + {MEMORY_MARGIN_MB:.0f})"
        )
        found.append(Goal(text, f"{peak:.0f} MB", peak <= limit, True))
    return found


def rows(table: Mapping[int, Mapping[str, Summary]]) -> list[list[str]]:
    """The table as text, under COLUMNS."""
    return [
        [
            str(threads),
            side,
            f"{s.prefill:.0f}",
            f"{s.prefill_ratio:.2f}x",
            f"{s.decode:.1f}",
            f"{s.decode_ratio:.2f}x",
            f"{s.step_ms:.2f}",
            f"{s.step_ratio:.2f}x",
            "-" if s.host_share is None else f"{s.host_share:.1%}",
            f"{s.load_s:.2f}",
            f"{s.peak:.0f}",
            f"{s.anonymous:.0f}",
            f"{s.file:.0f}",
        ]
        for threads, sides in table.items()
        for side, s in sides.items()
    ]


COLUMNS = (
    *("threads", "side", "prefill tok/s", "ratio", "decode tok/s", "ratio"),
    *("ms/step", "ratio", "host", "load s", "peak MB", "anon MB", "file MB"),
)


def rich_table(table: Mapping[int, Mapping[str, Summary]], title: str) -> Table:
    from rich.table import Table

    out = Table(title=title, title_justify="left")
    for i, name in enumerate(COLUMNS):
        out.add_column(name, justify="left" if i == 1 else "right", no_wrap=i == 1)
    for row in rows(table):
        out.add_row(*row, end_section=row[1] == LOW_MEMORY)
    return out


def markdown(table: Mapping[int, Mapping[str, Summary]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows(table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(table: Mapping[int, Mapping[str, Summary]]) -> dict[str, Any]:
    return {
        str(threads): {side: asdict(summary) for side, summary in sides.items()}
        for threads, sides in table.items()
    }
