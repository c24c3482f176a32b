"""Prefill and decode: from a session and sampling parameters to a stream of pieces of text."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgert.errors import CapacityExceeded, UsageError
from edgert.halting import parse_halt
from edgert.rng import fresh_seed
from edgert.sampler import OFF, Choice, SamplingParams, pick
from edgert.speculate import Guesses, Speculation
from edgert.stops import StopStrings

if TYPE_CHECKING:
    from edgert.runner import StepIO
    from edgert.session import Session
    from edgert.sessionfile import Request
    from edgert.tokenizer import Detokenizer

ANSWER_ROOM = 256
"""Tokens of answer for which the state has room from the start; a longer one grows it."""


@dataclass(frozen=True)
class Piece:
    """What one step added. `text` may be empty while a character or a stop string is undecided.

    The last piece of a stream has a `finish_reason`: 'stop' (end token, stop token or stop
    string), 'length' (max_tokens or the model's context), 'deadline' or 'cancelled'. It has no
    token if it was an end or stop token that ended the stream, or if no token was chosen at all.
    """

    text: str
    token: int | None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None


@dataclass
class Timings:
    """Where the time of one request went. Seconds, from when the first piece was asked for.

    `token_s` holds one entry per token after the first, without what the caller does between two
    pieces, so its percentiles are the inter-token latency: nearly nothing for a token that was
    guessed, since the step before it has read it already. `guesses` counts those.
    """

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    first_token_s: float = 0.0  # until the first token was chosen (TTFT)
    token_s: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)  # of the loop, for each entry of token_s
    graph_s: float = 0.0  # of all the above, inside graph calls
    sample_s: float = 0.0  # of all the above, choosing tokens from logits
    detokenize_s: float = 0.0  # tokens to text, stop strings included
    guesses: Guesses = field(default_factory=Guesses)

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
    """An iterator of `Piece`, made by `Session.stream`. `cancel()` may be called from any thread.

    Leaving the loop early is allowed: the session keeps what was generated so far, and the stream
    can be taken up again until the session is used otherwise; then it raises UsageError. Text
    held back at that moment, which may be the start of a stop string, is not shown any more.
    """

    def __init__(
        self,
        session: Session,
        prompt: list[int],
        params: SamplingParams,
        going_on: Request | None = None,
    ) -> None:
        """`going_on`: the request whose answer this one continues; `prompt` is empty then."""
        self.params = params
        self.seed = fresh_seed() if params.seed is None else params.seed
        self.timings = Timings(prompt_tokens=len(prompt))
        self.tokens: list[int] = []
        self._seen: list[Piece] = []
        self._halt = None if params.halt is None else parse_halt(params.halt)
        self._cancelled = threading.Event()
        self._acquire, self._release = session.acquire, session.release
        self._pieces = self._run(session, prompt, going_on)

    def cancel(self) -> None:
        """Stop after the step (or prefill chunk) that is running."""
        self._cancelled.set()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        self._acquire()
        try:
            piece = next(self._pieces)
        finally:
            self._release()
        self._seen.append(piece)
        return piece

    def result(self) -> Generation:
        """Run to the end and put all pieces together, those already seen too.

        A stream that an error ended counts as cancelled.
        """
        for _ in self:
            pass
        with_token = [p for p in self._seen if p.token is not None]
        on = self.params.logprobs is not None
        return Generation(
            text="".join(p.text for p in self._seen),
            tokens=tuple(self.tokens),
            finish_reason=(self._seen[-1].finish_reason if self._seen else None) or "cancelled",
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

    def _run(
        self, session: Session, prompt: list[int], going_on: Request | None
    ) -> Iterator[Piece]:
        params, timings, tokens = self.params, self.timings, session.tokens
        execution = session.execution
        start = time.perf_counter()
        deadline = None if params.deadline_ms is None else start + params.deadline_ms / 1e3
        graph_before = execution.graph_ns
        if not prompt and not tokens:
            raise UsageError(
                "there is nothing to continue: the prompt is empty",
                do="give at least one token of prompt",
            )
        turn = session.begin(prompt)
        session.answer(self.params, self.seed, going_on)
        self._draw = params.replace(stream=params.stream ^ session.stream_id)
        context = session.model.manifest.context
        step = self._step_of(session)
        io: StepIO | None = None
        reason = "length" if len(tokens) >= context else self._interrupted(deadline)
        if reason is None:
            # Growing in mid-answer would cost that token a copy of the state.
            execution.reserve(min(context, len(tokens) + min(params.max_tokens, ANSWER_ROOM)))
            for read in session.feed_pending(step):
                io = read
                timings.graph_s = (execution.graph_ns - graph_before) / 1e9
                if reason := self._interrupted(deadline):
                    break
        timings.prefill_s = time.perf_counter() - start
        if reason or io is None:
            session.finish(reason)
            yield Piece("", None, finish_reason=reason)
            return

        end_tokens = frozenset(params.stop_tokens)
        if not params.ignore_eos:
            end_tokens |= frozenset(session.eos)
        text_of = _text_so_far(session, params.stop, going_on)
        resumed = start
        while True:
            asked = time.perf_counter()
            choice = self._choose(io, tokens)
            token = choice.token
            now = time.perf_counter()
            timings.sample_s += now - asked
            if self.tokens:
                timings.token_s.append(now - resumed)
                timings.iterations.append(int(io.iterations[0]))
            else:
                timings.first_token_s = now - start
            timings.graph_s = (execution.graph_ns - graph_before) / 1e9
            if token in end_tokens:
                session.finish("stop")
                yield Piece(text_of.rest(), None, finish_reason="stop")
                return
            tokens.append(token)
            self.tokens.append(token)
            pushed = time.perf_counter()
            text = text_of.push(token)
            timings.detokenize_s += time.perf_counter() - pushed
            if text_of.stopped:
                reason = "stop"
            elif len(self.tokens) >= params.max_tokens or len(tokens) >= context:
                reason = "length"
            else:
                reason = self._interrupted(deadline)
            if reason:
                text += text_of.rest()
                reason = "stop" if text_of.stopped else reason
                session.finish(reason)
            yield Piece(text, token, choice.logprob, choice.alternatives, reason)
            if reason:
                return
            resumed = time.perf_counter()
            if session.turn != turn:
                raise UsageError(
                    "the session has gone on without this stream, or was closed",
                    do="use one stream of a session at a time",
                )
            io = step(token)

    def _step_of(self, session: Session) -> Callable[[int], StepIO]:
        """What makes the results behind the newest token of the answer: the decode step."""
        execution, halt, width = session.execution, self._halt, self.params.speculate
        if width == OFF or not session.model.runner.can_speculate(halt):
            return lambda token: execution.step(token, halt)
        lookup, record, guesses = session.lookup, session.record, self.timings.guesses
        return Speculation(execution, session.tokens, lookup, record, width, guesses).step

    def _choose(self, io: StepIO, tokens: list[int]) -> Choice:
        """The next token. The graph's own argmax will do, unless its logit is not a number."""
        logits: NDArray[np.float32] = io.logits[0, io.place]
        if not self.params.needs_logits:
            token = int(io.token[0, io.place])
            if 0 <= token < logits.size and math.isfinite(logits[token]):
                return Choice(token)
        return pick(logits, self._draw, tokens, len(tokens), self.seed)


class _Text:
    """Tokens to text that may be shown. `stopped` once a stop string is complete."""

    def __init__(self, detokenizer: Detokenizer | None, stop: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._stops = StopStrings(stop)
        self._shown = 0  # of what the stop strings hold back: characters that are out already
        self.stopped = False

    def go_on(self, tokens: list[int], *, flushed: bool) -> None:
        """Take up an answer that has these tokens: what was shown of it is not shown again.

        flushed: it had an end, at which what was held back was shown after all.
        """
        for token in tokens:
            self.push(token)
        if self.stopped:  # by a stop string that was not one then: only what comes counts
            self._stops, self.stopped = StopStrings(self._stop), False
        self._shown = self._stops.held if flushed else 0

    def push(self, token: int) -> str:
        return self._show(self._detokenizer.push(token)) if self._detokenizer else ""

    def rest(self) -> str:
        """What was held back: the stream ends here."""
        if self._detokenizer is None or self.stopped:
            return ""
        text = self._show(self._detokenizer.flush())
        return text + self._stops.flush()[self._shown :]

    def _show(self, text: str) -> str:
        text, hit = self._stops.push(text)
        self.stopped = hit is not None
        new = text[self._shown :]
        self._shown = max(0, self._shown - len(text))
        return new


def _text_so_far(session: Session, stop: tuple[str, ...], going_on: Request | None) -> _Text:
    """What turns the next tokens into text, mindful of the answer that it goes on with: a stop
    string may have begun, and a character too."""
    if going_on is None:
        return _Text(session.detokenizer(), stop)
    text = _Text(session.detokenizer(going_on.start), stop)
    text.go_on(session.tokens[going_on.start :], flushed=going_on.finish_reason is not None)
    return text


def check_ids(ids: object, vocab_size: int, limit: int) -> list[int]:
    """Token ids from outside -> a list of ints.

    Raises UsageError naming the first bad one, CapacityExceeded for more than `limit`.
    """
    try:
        size = len(ids) if hasattr(ids, "__len__") else 0  # before numpy makes room for them
        array = np.asarray(ids if size <= limit else [])
    except Exception as error:  # whatever a caller's own sequence type can raise
        raise UsageError(f"token ids must be a flat list of integers: {error}") from error
    if size > limit:
        raise CapacityExceeded(
            f"{size} tokens are more than this model's context of {limit}",
            do="shorten the prompt, or export the model again with a larger --context",
        )
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(
            f"token ids must be a flat list of integers, not {array.dtype} of shape {array.shape}"
        )
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if bad.size:
        raise UsageError(
            f"token id {array[bad[0]]} at position {bad[0]} is outside the vocabulary of "
            f"{vocab_size}"
        )
    return [int(token) for token in array]
