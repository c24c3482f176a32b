"""One user's sequence: its tokens, and the state that holds them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.errors import CapacityExceeded, UsageError
from edgert.generate import Generation, Stream
from edgert.runner import Execution, StepIO
from edgert.sampler import SamplingParams

if TYPE_CHECKING:
    from edgert.model import Model
    from edgert.tokenizer import Detokenizer

Prompt = str | Sequence[int]


class Session:
    """A conversation with a model. `tokens` is all that was said so far, by either side.

    The newest token is usually chosen but not yet in the state: it is fed with what follows.
    A session is used by one thread at a time; many sessions may share a model. What goes against
    that, uses a closed session, or advances a stream that the session has left behind raises
    UsageError and changes nothing.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tokens: list[int] = []
        self.execution: Execution = model.runner.open()
        self.in_use = threading.Lock()  # held while a stream advances or tokens are appended
        self.turn = 0  # a stream goes on while this stays what it was when the stream began
        self._closed = False

    @property
    def eos(self) -> tuple[int, ...]:
        return self.model.manifest.eos

    def stream(
        self, prompt: Prompt = (), params: SamplingParams | None = None, **options: Any
    ) -> Stream:
        """Append a prompt and continue it, piece by piece.

        prompt   text, or token ids; empty to go on with what is already there
        options  any field of SamplingParams, over the bundle's defaults
        Nothing happens until the first piece is asked for; a stream that never is, leaves the
        session as it was. A stream left early can be resumed until the session is used otherwise.
        Raises UsageError (bad option or id), CapacityExceeded (prompt longer than the context) and
        Poisoned (an earlier step failed) before anything changes.
        """
        self.acquire()
        try:
            self.check()
        finally:
            self.release()
        ids = self.model.encode(prompt)
        self._check_room(len(ids))
        return Stream(self, ids, self.model.sampling(params, options))

    def generate(
        self, prompt: Prompt = (), params: SamplingParams | None = None, **options: Any
    ) -> Generation:
        """`stream`, run to its end."""
        return self.stream(prompt, params, **options).result()

    def append(self, prompt: Prompt) -> None:
        """Add tokens without generating: prefilled at once, so that the next answer starts fast.

        Raises as `stream` does.
        """
        ids = self.model.encode(prompt)
        self.acquire()
        try:
            self.begin(ids)
            if self.tokens:
                for _ in self.feed_pending():
                    pass
        finally:
            self.release()

    def check(self) -> None:
        """Raise UsageError if the session or its model is closed, Poisoned if a step failed."""
        if self._closed:
            raise UsageError("the session is closed", do="open a new one")
        self.execution.check()

    def acquire(self) -> None:
        """Take `in_use`, or raise UsageError."""
        if not self.in_use.acquire(blocking=False):
            raise UsageError(
                "the session is in use by another thread", do="give each thread its own session"
            )

    def release(self) -> None:
        if self._closed:  # by another thread, in the meantime
            self.execution.close()
        self.in_use.release()

    def begin(self, ids: Sequence[int]) -> int:
        """Start a turn with checked ids, which the next `feed_pending` feeds. Returns `turn`."""
        self.check()
        self._check_room(len(ids))
        self.tokens.extend(ids)
        self.turn += 1
        return self.turn

    def _check_room(self, more: int) -> None:
        context = self.model.manifest.context
        if len(self.tokens) + more > context:
            raise CapacityExceeded(
                f"{len(self.tokens) + more} tokens are more than this model's context of {context}",
                do="shorten the prompt, or export the model again with a larger --context",
            )

    def feed_pending(self) -> Iterator[StepIO]:
        """Feed the tokens that the state does not hold yet, a chunk at a time.

        Where it holds them all (a stream was cut off behind its prefill), the results of the
        newest token are still there; after a rewind they are not, and it is fed again.
        """
        lens = self.execution.lens
        last = self.execution.last
        if last is not None and int(lens[0]) == len(self.tokens):
            yield last
            return
        lens[0] = start = min(int(lens[0]), len(self.tokens) - 1)
        yield from self.execution.feed(np.asarray(self.tokens[start:], np.int64))

    def detokenizer(self) -> Detokenizer | None:
        """What turns the next tokens into text, given those so far; None without a tokenizer."""
        tokenizer = self.model.tokenizer
        return tokenizer.detokenizer(self.tokens) if tokenizer else None

    def close(self) -> None:
        """Give the state's memory back; `tokens` stay. Closing twice does nothing.

        A stream of it that another thread advances ends with UsageError after its step.
        """
        self._closed = True
        self.turn += 1
        if self.in_use.acquire(blocking=False):
            self.release()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
