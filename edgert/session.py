"""One user's sequence: its tokens, and the state that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.errors import CapacityExceeded
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
    A session is used by one thread at a time; many sessions may share a model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tokens: list[int] = []
        self.execution: Execution = model.runner.open()

    @property
    def eos(self) -> tuple[int, ...]:
        return self.model.manifest.eos

    def stream(
        self, prompt: Prompt = (), params: SamplingParams | None = None, **options: Any
    ) -> Stream:
        """Append a prompt and continue it, piece by piece.

        prompt   text, or token ids; empty to go on with what is already there
        options  any field of SamplingParams, over the bundle's defaults
        Raises UsageError (bad option or id) and CapacityExceeded (prompt longer than the context)
        before anything changes.
        """
        ids = self.model.encode(prompt)
        self._check_room(len(ids))
        return Stream(self, ids, self.model.sampling(params, options))

    def generate(
        self, prompt: Prompt = (), params: SamplingParams | None = None, **options: Any
    ) -> Generation:
        """`stream`, run to its end."""
        return self.stream(prompt, params, **options).result()

    def append(self, prompt: Prompt) -> None:
        """Add tokens without generating: prefilled at once, so that the next answer starts fast."""
        self.extend(self.model.encode(prompt))
        for _ in self.feed_pending():
            pass

    def extend(self, ids: Sequence[int]) -> None:
        """Add tokens that will be fed with the next step."""
        self._check_room(len(ids))
        self.tokens.extend(ids)

    def _check_room(self, more: int) -> None:
        context = self.model.manifest.context
        if len(self.tokens) + more > context:
            raise CapacityExceeded(
                f"{len(self.tokens) + more} tokens are more than this model's context of {context}",
                do="shorten the prompt, or export the model again with a larger --context",
            )

    def feed_pending(self) -> Iterator[StepIO]:
        """Feed the tokens that the state does not hold yet, a chunk at a time.

        Where it holds them all (a stream was cut off behind its prefill), the last one is fed
        again, since what follows it was never chosen.
        """
        lens = self.execution.lens
        lens[0] = start = min(int(lens[0]), len(self.tokens) - 1)
        yield from self.execution.feed(np.asarray(self.tokens[start:], np.int64))

    def detokenizer(self) -> Detokenizer | None:
        """What turns the next tokens into text, given those so far; None without a tokenizer."""
        tokenizer = self.model.tokenizer
        return tokenizer.detokenizer(self.tokens) if tokenizer else None

    def close(self) -> None:
        """Give the state's memory back."""
        self.execution.states.buffers.clear()
        self.tokens.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()



