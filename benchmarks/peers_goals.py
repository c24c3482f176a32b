"""What edgert promises beside its peers, and whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from peers_report import OURS, Perplexity, Summary

MET, ACCEPTED, MISSED, UNSURE, UNKNOWN = "met", "accepted", "missed", "unsure", "not measured"


@dataclass(frozen=True)
class Goal:
    text: str
    measured: str
    verdict: str


@dataclass(frozen=True)
class Promise:
    """edgert in a precision is `least` times as fast as the fastest of some peers, in all that
    begins with `what`; the worst counts. `accepted` is less, and still taken."""

    what: str  # of Summary.over: 'decode', 'prefill', 'cold'
    precision: str
    peers: tuple[str, ...]
    least: float
    accepted: float | None = None

    @property
    def text(self) -> str:
        return f"{self.precision} {self.what} >= {self.least:.2f}x {named(self.peers)}"


GENAI4, GENAI8, GENAI32 = "genai-int4", "genai-int8", "genai-fp32"
MIXED4 = "genai-int4-mixed"
LLAMA4 = ("llama-q4_0", "llama-q4_1")

PROMISES = (
    Promise("decode", "int4", (GENAI4,), 1.3, accepted=1.15),
    Promise("decode", "int4", LLAMA4, 1.7),
    Promise("decode", "int8", (GENAI8,), 1.3),
    Promise("decode", "fp32", (GENAI32,), 1.0),
    Promise("prefill", "int4", (GENAI4, MIXED4, *LLAMA4, "openvino-int4"), 1.1),
    Promise("prefill", "int8", (GENAI8, "llama-q8_0", "openvino-int8"), 1.1),
    Promise("prefill", "fp32", (GENAI32, "llama-f32", "torch-eager"), 1.1),
    Promise("cold", "int4", (GENAI4,), 1.5),
    Promise("cold", "int8", (GENAI8,), 1.5),
    Promise("cold", "fp32", (GENAI32,), 1.5),
)
SMALLER = (("int4", GENAI4), ("int8", GENAI8), ("fp32", GENAI32))  # peak memory
TRUER = tuple(("int4", peer) for peer in (GENAI4, MIXED4, *LLAMA4))  # perplexity


def named(peers: Sequence[str]) -> str:
    return peers[0] if len(peers) == 1 else f"the best of {', '.join(peers)}"


def verdict(ratio: float, promise: Promise) -> str:
    if ratio >= promise.least:
        return MET
    return ACCEPTED if promise.accepted and ratio >= promise.accepted else MISSED


def speed_goal(promise: Promise, sides: Mapping[str, Summary]) -> Goal:
    """The lowest ratio over all peers and everything that is measured of this kind."""
    there = [sides[peer] for peer in promise.peers if peer in sides]
    ratios = [
        (ratio, key, peer)
        for peer in promise.peers
        if peer in sides
        for key, ratio in sides[peer].over.items()
        if key.split()[0] == promise.what
    ]
    if f"{OURS}-{promise.precision}" not in sides or not ratios:
        return Goal(promise.text, "-", UNKNOWN)
    ratio, key, peer = min(ratios)
    where = [key] * (key != promise.what) + [peer] * (len(promise.peers) > 1)
    at = f" ({', '.join(where)})" if where else ""
    sure = all(side.quiet for side in there)
    return Goal(promise.text, f"{ratio:.2f}x{at}", verdict(ratio, promise) if sure else UNSURE)


def bounded(
    text: str, ours: float | None, theirs: float | None, show: Callable[[float], str]
) -> Goal:
    """Ours is no larger than theirs."""
    if ours is None or theirs is None:
        return Goal(text, "-", UNKNOWN)
    return Goal(text, f"{show(ours)} beside {show(theirs)}", MET if ours <= theirs else MISSED)


def goals(
    table: Mapping[int, Mapping[str, Summary]],
    scores: Mapping[str, Perplexity],
    threads: int,
    precisions: Sequence[str],
) -> list[Goal]:
    """Every promise about the precisions asked for. Times at one thread count; memory at the one
    that takes the most. Memory and perplexity do not depend on who else is at work."""
    sides = table.get(threads, {})
    found = [speed_goal(p, sides) for p in PROMISES if p.precision in precisions]

    def peak(name: str) -> float | None:
        return max((s[name].peak for s in table.values() if name in s), default=None)

    def ratio(name: str) -> float | None:
        return scores[name].ratio if name in scores else None

    for precision, peer in SMALLER:
        if precision in precisions:
            text = f"{precision} peak memory <= {peer}"
            ours = peak(f"{OURS}-{precision}")
            found.append(bounded(text, ours, peak(peer), lambda x: f"{x:.0f} MB"))
    for precision, peer in TRUER:
        if precision in precisions:
            text = f"{precision} perplexity <= {peer}"
            ours = ratio(f"{OURS}-{precision}")
            found.append(bounded(text, ours, ratio(peer), lambda x: f"{x:.4f}"))
    return found
