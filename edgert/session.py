"""One user's sequence: its tokens, and the state that holds them; saved, rewound, forked."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.errors import CapacityExceeded, Incompatible, UsageError
from edgert.generate import Generation, Stream
from edgert.runner import Execution, StepIO
from edgert.sampler import SamplingParams
from edgert.sessionfile import Move, Request, SavedSession, write_session
from edgert.snapshot import adopt, check_fits, not_of_this_model, snapshot
from edgert.speculate import Lookup, Record
from edgert.vault import key_from

if TYPE_CHECKING:
    from edgert.model import Model
    from edgert.tokenizer import Detokenizer

Prompt = str | Sequence[int]


class Session:
    """A conversation with a model. `tokens` is all that was said so far, by either side.

    `data` is the application's own: what JSON can hold, saved with the session.
    `request` is the newest request, which a stream without a prompt goes on with.
    `notes` say, after a resume, what is not as it was where the session was saved.
    `moves` say from which other variants of its model it came (`edgert.migrate`).

    The newest token is usually chosen but not yet in the state: it is fed with what follows.
    A session is used by one thread at a time; many sessions may share a model. What goes against
    that, uses a closed session, or advances a stream that the session has left behind raises
    UsageError and changes nothing.
    """

    def __init__(self, model: Model, *, room: int = 1) -> None:
        self.model = model
        self.tokens: list[int] = []
        self.data: dict[str, Any] = {}
        self.request: Request | None = None
        self.notes: tuple[str, ...] = ()
        self.moves: tuple[Move, ...] = ()
        self.stream_id = 0  # mixed into every draw; another one in each fork
        self.owns_model = False  # closing the session closes the model, too
        self.forks = 0  # made of this session: each has a number of its own
        self.lookup, self.record = Lookup(), Record()  # what speculation guesses by
        self.execution: Execution = model.runner.open(tokens=room)
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
        options  any field of SamplingParams, over the bundle's defaults; or, without a prompt and
                 `params`, over the settings and the seed of the newest request: so an answer that
                 was left early, saved or resumed goes on as if it had not been
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
        going_on = None if ids or params is not None else self.request
        if going_on is None:
            return Stream(self, ids, self.model.sampling(params, options))
        chosen = going_on.params
        if going_on.finish_reason == "stop":  # the answer is complete: this is another one
            going_on = replace(going_on, start=len(self.tokens), finish_reason=None)
        elif going_on.finish_reason != "length":  # what is left of the answer
            left = max(1, going_on.end - len(self.tokens))
            chosen = chosen.replace(max_tokens=min(left, 2**31 - 1))
        return Stream(self, ids, self.model.sampling(chosen, options), going_on)

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

    def reuse(self, prompt: Prompt) -> list[int]:
        """Keep what the session shares with a whole prompt, and return the rest of the prompt.

        The session goes back to where the prompt parts from it, so `stream(reuse(prompt))` is the
        answer to that prompt, and only what is new is prefilled. Raises as `rewind` does.
        """
        ids = self.model.encode(prompt)
        common = len(os.path.commonprefix([self.tokens, ids]))
        if common < len(self.tokens):
            common = common if self.execution.states.rewindable else 0
            self.rewind(common)
        return ids[common:]

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on, and their state.

        Going on without a prompt then repeats the answer from there, with the same draws, if the
        position lies within it. Raises UsageError (no such position, or as `stream` does), and
        Incompatible if a state of the model keeps no history and `position` is not 0.
        """
        self.acquire()
        try:
            self.check()
            self._cut(position)
        finally:
            self.release()

    def trim(self, position: int) -> None:
        """`rewind`, and give back the memory of what was forgotten. Raises as it does."""
        self.acquire()
        try:
            self.check()
            self._cut(position)
            self.execution.resize(max(1, position))
        finally:
            self.release()

    def _cut(self, position: int) -> None:
        if not 0 <= position <= len(self.tokens):
            raise UsageError(
                f"the session has {len(self.tokens)} tokens, there is no position {position}",
                do=f"use 0 to {len(self.tokens)}",
            )
        states, lens = self.execution.states, self.execution.lens
        if position < lens[0] and position and not states.rewindable:
            raise Incompatible(
                "a state of this model is replaced by each step, so it cannot go back",
                do="rewind to 0, or save the session where you may want to return to",
            )
        if position == 0:
            self.execution.reset()
        lens[0] = min(int(lens[0]), position)
        del self.tokens[position:]
        self.lookup.cut(position)
        if self.request is not None:
            inside = position >= self.request.start and position > 0
            self.request = replace(self.request, finish_reason=None) if inside else None
        self.turn += 1

    def fork(self) -> Session:
        """A copy that goes its own way: the same tokens, state and data, other random draws.

        The draws of the n-th fork are those of every n-th fork made here, also after a resume.
        Raises OutOfMemory, and as `stream` does.
        """
        self.acquire()
        try:
            self.check()
            other = Session(self.model, room=self.execution.states.capacity)
            adopt(other, snapshot(self))
            self.forks += 1
            mark = f"edgert fork {self.stream_id} {self.forks}".encode()
            other.stream_id = int.from_bytes(hashlib.sha256(mark).digest()[:8], "little")
            other.notes, other.forks = self.notes, 0
            return other
        finally:
            self.release()

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        passphrase: str | None = None,
        key_file: str | os.PathLike[str] | None = None,
    ) -> int:
        """Write the session to one file, mode 0600; its size in bytes.

        At every moment, also after a crash, the path holds the old file or the new one in full.
        With a passphrase or a key file the content is encrypted (`crypto` extra).
        Raises UsageError (data that is not JSON, or as `stream` does), Poisoned, EdgertError with
        the system's reason if it cannot be written; the old file then stays.
        """
        key = key_from(passphrase, key_file)
        self.acquire()
        try:
            self.check()
            saved = snapshot(self, Path(path))
        finally:
            self.release()
        return write_session(Path(path), saved, key)

    @classmethod
    def restore(cls, model: Model, saved: SavedSession, where: str = "the session") -> Session:
        """A saved session on a model, as it was. `where` names it in messages.

        Raises SessionMismatch if it was saved with another bundle or variant, BadSession if its
        content cannot be that of this model, OutOfMemory, UsageError if the model is closed.
        """
        check_fits(model, saved, where)
        session = cls(model, room=saved.capacity)
        try:
            adopt(session, saved)
        except BaseException as error:
            session.close()
            if isinstance(error, ValueError):
                raise not_of_this_model(str(error), where) from error
            raise
        return session

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
        if ids:
            self.request = None
        return self.turn

    def answer(self, params: SamplingParams, seed: int, going_on: Request | None) -> None:
        """Note the request that begins here, or goes on."""
        # A rewind since the stream was made may have left less than it goes on with.
        start = min(going_on.start, len(self.tokens)) if going_on else len(self.tokens)
        end = len(self.tokens) + params.max_tokens
        if going_on is not None and end == going_on.end:  # the rest of it, not a shorter request
            params = params.replace(max_tokens=going_on.params.max_tokens)
        self.request = Request(params.replace(seed=seed), start, end)

    def finish(self, reason: str | None) -> None:
        """Note how the request ended."""
        assert self.request is not None
        self.request = replace(self.request, finish_reason=reason)

    def _check_room(self, more: int) -> None:
        context = self.model.manifest.context
        if len(self.tokens) + more > context:
            raise CapacityExceeded(
                f"{len(self.tokens) + more} tokens are more than this model's context of {context}",
                do="shorten the prompt, or export the model again with a larger --context",
            )

    def feed_pending(self, step: Callable[[int], StepIO] | None = None) -> Iterator[StepIO]:
        """Feed the tokens that the state does not hold yet, a chunk at a time.

        A single token that an answer goes on from is decoded as that answer's others are, by
        `step`; a prompt is prefilled.
        Where it holds them all (a stream was cut off behind its prefill), the results of the
        newest token are still there; after a rewind they are not, and it is fed again.
        """
        lens = self.execution.lens
        last = self.execution.last
        if last is not None and int(lens[0]) == len(self.tokens):
            yield last
            return
        lens[0] = start = min(int(lens[0]), len(self.tokens) - 1)
        answered = self.request is not None and start >= self.request.start
        if step is not None and answered and start == len(self.tokens) - 1:
            yield step(self.tokens[start])
            return
        yield from self.execution.feed(np.asarray(self.tokens[start:], np.int64))

    def detokenizer(self, position: int | None = None) -> Detokenizer | None:
        """What turns the tokens from `position` (default: the next ones) into text, given those
        before; None without a tokenizer."""
        tokenizer = self.model.tokenizer
        return tokenizer.detokenizer(self.tokens[:position]) if tokenizer else None

    def close(self) -> None:
        """Give the state's memory back; `tokens` stay. Closing twice does nothing.

        A stream of it that another thread advances ends with UsageError after its step.
        """
        self._closed = True
        self.turn += 1
        if self.in_use.acquire(blocking=False):
            self.release()
        if self.owns_model:
            self.model.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
