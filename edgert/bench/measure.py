"""The timed requests: the loop of `Session.stream`, with a clock beside it.

One request is a session of its own, as an application would open it. The clock starts when the
prompt is handed over and is read when each piece arrives, so a first token includes tokenizing,
prefill and its text. Nothing is reused between requests: each one prefills all of its prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edgert.bench.plan import Work
from edgert.errors import EdgertError
from edgert.model import Model
from edgert.speculate import Guesses

PARTS = ("tokenize", "graph", "sample", "detokenize")


@dataclass(frozen=True)
class Request:
    """One timed request. All times are in nanoseconds, `arrivals` counted from its start.

    begun        `time.perf_counter_ns` at its start
    iterations   that the loop took for each token after the first
    guesses      tokens that were guessed: checked, and found right
    prefill_ns   from the first piece asked for until the prompt was in the state
    parts        tokenize (the prompt handed over: text to ids, and their check), graph (inside
                 graph calls), sample (logits to tokens), detokenize (tokens to text)
    other_ns     what they leave of the wall time
    """

    begun: int
    tokens: tuple[int, ...]
    iterations: tuple[int, ...]
    arrivals: tuple[int, ...]
    prefill_ns: int
    parts: dict[str, int]
    state_bytes: int
    guesses: Guesses = field(default_factory=Guesses)

    @property
    def wall_ns(self) -> int:
        return self.arrivals[-1]

    @property
    def first_ns(self) -> int:
        return self.arrivals[0]

    @property
    def between_ns(self) -> list[int]:
        """From token to token: one fewer than there are tokens."""
        pairs = zip(self.arrivals[1:], self.arrivals, strict=False)
        return [later - earlier for later, earlier in pairs]

    @property
    def other_ns(self) -> int:
        return self.wall_ns - sum(self.parts.values())


def request(model: Model, work: Work) -> Request:
    """Answer the prompt of `work` once, greedily, behind its depth (which is not timed)."""
    clock = time.perf_counter_ns
    arrivals: list[int] = []
    with model.session() as session:
        if work.depth:
            session.append(work.depth)
        graph_before = session.execution.graph_ns
        begun = clock()
        stream = session.stream(work.prompt, model.sampling(work.params))
        taken = clock()
        for _ in stream:
            arrivals.append(clock() - begun)
        timings = stream.timings
        tokens = tuple(stream.tokens)
        if len(tokens) != work.plan.n_gen or len(arrivals) != len(tokens):
            raise EdgertError(
                f"the model gave {len(tokens)} tokens in {len(arrivals)} pieces instead of "
                f"{work.plan.n_gen}: the request cannot be timed"
            )
        parts = {
            "tokenize": taken - begun,
            "graph": session.execution.graph_ns - graph_before,
            "sample": round(timings.sample_s * 1e9),
            "detokenize": round(timings.detokenize_s * 1e9),
        }
        return Request(
            begun=begun,
            tokens=tokens,
            iterations=tuple(timings.iterations),
            arrivals=tuple(arrivals),
            prefill_ns=round(timings.prefill_s * 1e9),
            parts=parts,
            state_bytes=session.execution.states.nbytes,
            guesses=timings.guesses,
        )


def requests(model: Model, work: Work, done: Callable[[], None] = lambda: None) -> list[Request]:
    """Warm up, then time `repeats` requests. `done` is called between any two of them."""
    timed = []
    for number in range(work.plan.warmup + work.plan.repeats):
        one = request(model, work)
        if number >= work.plan.warmup:
            timed.append(one)
        done()
    return timed
