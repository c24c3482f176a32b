"""Speculation without a second model: what was said before proposes what comes next.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding): where
the newest tokens have occurred before, what followed them there is a guess at what follows now. The
model reads the guesses in one step and chooses at every position as it would have without them;
they count as far as it chooses the same, and the state goes back over the rest.

Lookup       an index of a sequence's short n-grams
Record       how often guesses came true; with the cost of a guess it says how many to check
Speculation  the step of a decode loop that speculates

A step that checks k guesses takes as long as 1 + COST * k plain ones, as measured on an x86-64 CPU
(in fp32 products over few rows wait for memory, with few bits they unpack and compute): so a guess
must come true the more often, the fewer bits the weights have. What comes true is noted at every
match, checked or not, so that text which does not repeat itself costs no more than a look into the
index; a new session begins as if guesses behind 2 tokens had come true one time in four, and behind
more one time in two, which lost next to nothing on open questions: see docs/speculation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgert.halting import AUTO

if TYPE_CHECKING:
    from edgert.runner import Execution, StepIO

LENGTHS = (4, 3, 2)
"""Of the n-grams, longest first."""

WIDTHS = (1, 2, 4, 8)
"""Guesses in one step, where `Record` decides: few, since every one has buffers of its own."""

COST = {"fp32": 0.08, "int8": 0.17, "int4": 0.24}
"""Time of one more guess in a step, in plain steps, by the precision of the weights."""

_UNKNOWN_COST = 0.25

WINDOW = 8
"""Outcomes that a record holds for each length: a bit each, the newest lowest."""

_BITS = 32  # a token id plus one fits


class Lookup:
    """Where the newest tokens of a sequence have occurred before.

    `match` is (length, position): as many of the newest tokens also stand before that position;
    the longest of LENGTHS that occurred, and there the newest place. None if there is none.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.tokens: list[int] = []
        self.match: tuple[int, int] | None = None
        self._newest = 0  # the last tokens as one number; each plus one, so that none is 0
        self._behind: list[tuple[int, int, dict[int, int]]] = [
            (length, (1 << _BITS * length) - 1, {}) for length in LENGTHS
        ]  # length, mask, and where the n-gram ended last

    def push(self, token: int) -> None:
        """One more token. Takes the same time however many there are."""
        self.tokens.append(token)
        end = len(self.tokens)
        newest = self._newest = (self._newest << _BITS | token + 1) & self._behind[0][1]
        match = None
        for length, mask, behind in self._behind:
            gram = newest & mask
            if match is None and gram in behind:
                match = length, behind[gram]
            behind[gram] = end
        self.match = match

    def cut(self, position: int) -> None:
        """The sequence goes back to so many tokens: its index is made anew when it is needed."""
        if position < len(self.tokens):
            self.clear()

    def guess(self, count: int) -> list[int]:
        """What followed at the match, and goes on as it does: a short period repeats itself."""
        assert self.match is not None
        start, end = self.match[1], len(self.tokens)
        found = self.tokens[start : start + count]
        while len(found) < count:
            found.append(found[start + len(found) - end])
        return found


class Record:
    """The newest WINDOW outcomes of guesses, for matches of 2, 3 and 4 tokens apart.

    outcomes  a number for each length, shortest first; a set bit is a guess that came true
    """

    START = (0x11, 0x55, 0x55)  # as if 1/4, 1/2, 1/2 of the guesses had come true

    def __init__(self, outcomes: Sequence[int] = START) -> None:
        self.outcomes = list(outcomes)

    def note(self, length: int, hit: bool) -> None:
        place = length - LENGTHS[-1]
        self.outcomes[place] = (self.outcomes[place] << 1 | hit) & (1 << WINDOW) - 1

    def width(self, length: int, cost: float, most: int = WIDTHS[-1]) -> int:
        """How many guesses are worth a step behind a match of so many tokens: 0, or of WIDTHS.

        cost  of a guess, in plain steps
        The one with the most tokens for its time, 1 + p1 + p1 p2 + ... for 1 + cost * k, where a
        guess that comes true makes the match of the next one longer; none if that is below 1.
        """
        best, width = 1.0, 0
        tokens = reached = 1.0
        for k in range(1, min(most, WIDTHS[-1]) + 1):
            place = min(length + k - 1, LENGTHS[0]) - LENGTHS[-1]
            reached *= self.outcomes[place].bit_count() / WINDOW
            if reached < cost and k - 1 in (0, *WIDTHS):  # it falls: no more guesses will pay
                break
            tokens += reached
            speed = tokens / (1 + cost * k)
            if speed > best and k in WIDTHS:
                best, width = speed, k
        return width


@dataclass
class Guesses:
    """How many were checked by the model, and how many of them became tokens."""

    checked: int = 0
    accepted: int = 0


class Speculation:
    """The decode steps of one request that speculates.

    tokens  of the session, the list itself: the newest one is what `step` is called with
    lookup, record  the session's own: they outlive the request. A record changes with what is
            said alone, never with the time it took: so a session that resumes goes on alike
    width   AUTO, or how many guesses to check wherever there is a match
    """

    def __init__(
        self,
        execution: Execution,
        tokens: list[int],
        lookup: Lookup,
        record: Record,
        width: str | int,
        guesses: Guesses,
    ) -> None:
        self._execution, self._tokens = execution, tokens
        self._lookup, self._record = lookup, record
        self._width = None if width == AUTO else int(width)
        self._cost = COST.get(execution.runner.variant.precision, _UNKNOWN_COST)
        self._context = execution.runner.manifest.context
        self.guesses = guesses

    def step(self, token: int) -> StepIO:
        """The results behind the newest token: `Execution.step`, in fewer steps."""
        self._learn(token)
        execution = self._execution
        io = execution.take(token)
        if io is not None:
            self.guesses.accepted += 1
            return io
        guess = self._guess()
        if not guess:
            return execution.step(token)
        self.guesses.checked += len(guess)
        return execution.verify([token, *guess])

    def _learn(self, token: int) -> None:
        """Note whether the newest token is the one that was foreseen, and index it."""
        lookup, before = self._lookup, len(self._tokens) - 1
        for earlier in self._tokens[len(lookup.tokens) : before]:  # a prompt
            lookup.push(earlier)
        if len(lookup.tokens) > before:  # by a step that failed, and left all as it was
            return
        if lookup.match is not None:
            length, position = lookup.match
            self._record.note(length, lookup.tokens[position] == token)
        lookup.push(token)

    def _guess(self) -> list[int]:
        """Of what may follow the newest token; nothing that would go beyond the context."""
        match = self._lookup.match
        if match is None:
            return []
        most = self._context - len(self._tokens) - 1
        width = self._width
        if width is None:
            width = self._record.width(match[0], self._cost, most)
        return self._lookup.guess(min(width, max(0, most)))
