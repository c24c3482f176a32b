"""Prefill and decode: from a session and sampling parameters to a stream of pieces of text."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgert.errors import UsageError
from edgert.rng import fresh_seed
from edgert.sampler import Choice, SamplingParams, pick
from edgert.stops import StopStrings

if TYPE_CHECKING:
    from edgert.session import Session

FINISH_REASONS = ("stop", "length", "deadline", "cancelled")


@dataclass(frozen=True)
class Piece:
    """What one step added. `text` may be empty while a character or a stop string is undecided.

    The last piece of a stream has a `finish_reason`: 'stop' (end token, stop token or stop
    string), 'length' (max_tokens or the model's context), 'deadline' or 'cancelled'; it has a
    token only where a stop string or the length ended the stream.
    """

    text: str
    token: int | None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None


@dataclass
class Timings:
    """Where the time of one request went. Seconds; `token_s` holds one entry per token after the
    first, so its percentiles are the inter-token latency."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    first_token_s: float = 0.0  # request accepted -> first token chosen (TTFT)
    token_s: list[float] = field(default_factory=list)
    graph_s: float = 0.0  # of all the above, inside graph calls

    @property
    def decode_tokens_per_s(self) -> float:
        total = sum(self.token_s)
        return len(self.token_s) / total if total else 0.0


@dataclass(frozen=True)
class Generation:
    """A finished stream. `text` excludes the stop string and special tokens."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] | None
    alternatives: tuple[tuple[tuple[int, float], ...], ...]
    seed: int
    timings: Timings


class Stream:
    """An iterator of `Piece`. `cancel()` may be called from any thread.

    Leaving the loop early is allowed: the session keeps what was generated so far.
    """

    def __init__(self, session: Session, prompt: list[int], params: SamplingParams) -> None:
        self.params = params
        self.seed = fresh_seed() if params.seed is None else params.seed
        self.timings = Timings(prompt_tokens=len(prompt))
        self.tokens: list[int] = []
        self._cancelled = threading.Event()
        self._pieces = self._run(session, prompt)

    def cancel(self) -> None:
        """Stop after the step (or prefill chunk) that is running."""
        self._cancelled.set()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def __next__(self) -> Piece:
        return next(self._pieces)

    def result(self) -> Generation:
        """Run to the end and put the pieces together."""
        pieces = list(self)
        with_token = [p for p in pieces if p.token is not None]
        on = self.params.logprobs is not None
        return Generation(
            text="".join(p.text for p in pieces),
            tokens=tuple(self.tokens),
            finish_reason=(pieces[-1].finish_reason if pieces else None) or "cancelled",
            logprobs=tuple(p.logprob or 0.0 for p in with_token) if on else None,
            alternatives=tuple(p.alternatives for p in with_token) if self.params.logprobs else (),
            seed=self.seed,
            timings=self.timings,
        )

    def _interrupted(self, deadline: float | None) -> str | None:
        if self._cancelled.is_set():
            return "cancelled"
        if deadline is not None and time.perf_counter() >= deadline:
            return "deadline"
        return None

    def _run(self, session: Session, prompt: list[int]) -> Iterator[Piece]:
        params, timings = self.params, self.timings
        start = time.perf_counter()
        deadline = None if params.deadline_ms is None else start + params.deadline_ms / 1e3
        execution, tokens = session.execution, session.tokens
        graph_before = execution.graph_ns
        session.extend(prompt)
        if not tokens:
            raise UsageError(
                "there is nothing to continue: the prompt is empty",
                do="give at least one token of prompt",
            )
        for io in session.feed_pending():
            if reason := self._interrupted(deadline):
                yield Piece("", None, finish_reason=reason)
                return
        timings.prefill_s = time.perf_counter() - start

        end_tokens = frozenset(params.stop_tokens)
        if not params.ignore_eos:
            end_tokens |= frozenset(session.eos)
        detokenizer = session.detokenizer()
        stops = StopStrings(params.stop)
        context = execution.runner.manifest.context
        needs_logits = params.needs_logits
        last = start
        while True:
            if needs_logits:
                choice = pick(io.logits[0, 0], params, tokens, len(tokens), self.seed)
            else:
                choice = Choice(int(io.token[0, 0]), None, ())
            now = time.perf_counter()
            if self.tokens:
                timings.token_s.append(now - last)
            else:
                timings.first_token_s = now - start
            last = now
            timings.graph_s = (execution.graph_ns - graph_before) / 1e9
            token = choice.token
            reason: str | None = None
            hit: str | None = None
            if token in end_tokens:
                held = stops.push(detokenizer.flush()) if detokenizer else ("", None)
                yield Piece(held[0] + ("" if held[1] else stops.flush()), None, finish_reason="stop")
                return
            tokens.append(token)
            self.tokens.append(token)
            text, hit = stops.push(detokenizer.push(token)) if detokenizer else ("", None)
            if hit is not None:
                reason = "stop"
            elif len(self.tokens) >= params.max_tokens or len(tokens) >= context:
                reason = "length"
            else:
                reason = self._interrupted(deadline)
            if reason and hit is None and detokenizer:
                rest, hit = stops.push(detokenizer.flush())
                text += rest + ("" if hit else stops.flush())
            yield Piece(text, token, choice.logprob, choice.alternatives, reason)
            if reason:
                return
            execution.reserve(len(tokens))
            io = execution.io()
            io.ids[0, 0] = token
            io.select[0, 0] = 0
            io.run()


def check_ids(ids: object, vocab_size: int) -> list[int]:
    """Token ids from outside -> a list of ints. Raises UsageError naming the first bad one."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(
            f"token ids must be a flat list of integers, not {array.dtype} of shape {array.shape}"
        )
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if bad.size:
        raise UsageError(
            f"token id {array[bad[0]]} at position {bad[0]} is outside the vocabulary of {vocab_size}"
        )
    return [int(token) for token in array]
