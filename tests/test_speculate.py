"""Speculation changes how many steps an answer takes, and nothing else.

Fake models give the same logits however a sequence is cut into steps, so there everything is
compared exactly. Where a real graph rounds a chunk in another order, tokens are equal, and what is
promised bit for bit (pause and resume) is compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fake_loop import looped_model
from fake_model import CONTEXT, PROMPT, VOCAB, A, Graph, fake_model, hashed, ids, script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgert
from edgert.errors import BadSession, UsageError
from edgert.generate import Piece
from edgert.model import Model
from edgert.session import Session
from edgert.sessionfile import SavedSession
from edgert.snapshot import snapshot
from edgert.spec import StateSpec
from edgert.speculate import COST, LENGTHS, WIDTHS, WINDOW, Lookup, Record

SENTENCE = "the cat sat on the mat; "
SONG = SENTENCE * 6
"""What a model says that repeats itself: everything behind the first line can be guessed."""

WIDTH = ["auto", 1, 3, 16]


def singer(graph: Graph | None = None, text: str = SONG, **changes: Any) -> Model:
    """Answers the prompt [A] with the song."""
    graph = graph or Graph()
    graph.answer = script(*ids(text))
    return fake_model(graph, **changes)


def plain(model: Model, prompt: list[int], **options: Any) -> list[int]:
    return list(model.generate(prompt, speculate="off", **options).tokens)


unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


# The index


def brute_force(tokens: list[int]) -> tuple[int, int] | None:
    for length in LENGTHS:
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                return length, end
    return None


few = st.lists(st.integers(0, 3), max_size=60)
sequences = st.one_of(few, st.lists(st.sampled_from([0, 1, 2**31 - 1]), max_size=30))


@unhurried
@given(sequences)
def test_the_index_finds_what_a_search_finds(tokens):
    """After every token: the longest n-gram that occurred before, at its newest place."""
    lookup = Lookup()
    for end, token in enumerate(tokens, 1):
        lookup.push(token)
        assert lookup.match == brute_force(tokens[:end])


@unhurried
@given(sequences, st.integers(1, 20))
def test_a_guess_is_what_followed_and_goes_on_with_itself(tokens, count):
    lookup = Lookup()
    for token in tokens:
        lookup.push(token)
    if lookup.match is None:
        return
    said = list(tokens)
    for place in range(lookup.match[1], lookup.match[1] + count):
        said.append(said[place])
    assert lookup.guess(count) == said[len(tokens) :]


@unhurried
@given(sequences, sequences, st.integers(0, 60))
def test_an_index_that_was_cut_is_that_of_what_is_left(first, second, position):
    """Whatever was there before the cut, and comes behind it."""
    cut, fresh = Lookup(), Lookup()
    for token in first:
        cut.push(token)
    cut.cut(position)
    left = first[:position]
    for token in [*left[len(cut.tokens) :], *second]:
        cut.push(token)
    for token in [*left, *second]:
        fresh.push(token)
    assert (cut.tokens, cut.match) == (fresh.tokens, fresh.match)


# The record


outcomes = st.tuples(*[st.integers(0, (1 << WINDOW) - 1)] * len(LENGTHS))


def speed(record: Record, length: int, cost: float, width: int) -> float:
    """Tokens for the time of a plain step."""
    tokens = reached = 1.0
    for k in range(width):
        place = min(length + k, LENGTHS[0]) - LENGTHS[-1]
        reached *= bin(record.outcomes[place]).count("1") / WINDOW
        tokens += reached
    return tokens / (1 + cost * width)


@unhurried
@given(outcomes, st.sampled_from(LENGTHS), st.floats(0.01, 1.5), st.integers(0, 20))
def test_the_width_is_the_fastest_one(given, length, cost, most):
    """Of those that fit, no guess among them."""
    record = Record(given)
    speeds = {k: speed(record, length, cost, k) for k in (0, *WIDTHS) if k <= most}
    width = record.width(length, cost, most)
    assert width in speeds
    assert speeds[width] == pytest.approx(max(speeds.values()), rel=1e-12)


def test_a_record_holds_the_newest_outcomes_of_each_length():
    record = Record()
    for hit in [True] * 40 + [False, True, False]:
        record.note(3, hit)
    assert record.outcomes == [Record.START[0], 0b11111010, Record.START[2]]


@pytest.mark.parametrize("cost", COST.values())
def test_guesses_that_never_come_true_are_given_up_soon(cost):
    """A text that always looks as if it repeated itself and never does: what it loses in all."""
    record, lost = Record(), 0.0
    for _ in range(2 * WINDOW):
        for length in LENGTHS:
            lost += cost * record.width(length, cost)
            record.note(length, False)
    assert all(record.width(length, cost) == 0 for length in LENGTHS)
    assert lost < 4  # plain steps, once


@pytest.mark.parametrize("cost", COST.values())
def test_guesses_that_come_true_again_are_taken_up_again(cost):
    """Outcomes are noted whether or not they were checked."""
    record = Record((0, 0, 0))
    for _ in range(WINDOW):
        record.note(4, True)
    assert record.width(4, cost) == WIDTHS[-1]


# The same tokens


@pytest.mark.parametrize("width", WIDTH)
def test_a_song_takes_fewer_steps(width):
    """And has the same tokens; the counts are those of the steps."""
    want = plain(singer(), [A], max_tokens=len(SONG))
    graph = Graph()
    with singer(graph).session() as session:
        stream = session.stream([A], max_tokens=len(SONG), speculate=width)
        said = stream.result()
    assert list(said.tokens) == want == ids(SONG)
    guesses = said.timings.guesses
    steps = graph.calls[1:]  # behind the prompt
    assert len(steps) == len(SONG) - 1 - guesses.accepted
    assert sum(tokens - 1 for tokens, _ in steps) == guesses.checked >= guesses.accepted
    assert guesses.accepted > len(SONG) / 3
    assert max(tokens for tokens, _ in steps) == 1 + (width if width != "auto" else WIDTHS[-1])
    assert len(said.timings.token_s) == len(said.timings.iterations) == len(SONG) - 1


def test_a_text_that_does_not_repeat_itself_takes_plain_steps():
    graph = Graph()
    said = singer(graph, "abcdefghijklmnopqrstuvwxyz").generate([A], max_tokens=30)
    assert said.timings.guesses.checked == 0
    assert {tokens for tokens, _ in graph.calls} == {1}


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    "penalty": {"repetition_penalty": 1.3, "logprobs": 2},
    "sampled, penalty, bias": {
        "temperature": 0.7,
        "repetition_penalty": 1.2,
        "repetition_window": 9,
        "logit_bias": {A: 1.0},
        "top_k": 20,
        "seed": 3,
    },
}


def drifting(history: np.ndarray) -> np.ndarray:
    """Sings, but not everywhere: where a hash says so, the logits are noise."""
    out = hashed(history) * 2
    out[ids(SENTENCE)[len(history) % len(SENTENCE)]] += 12 if out[7] < 1 else 4
    return out


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("width", WIDTH)
def test_guesses_right_and_wrong_change_nothing_that_is_said(width, name):
    """Tokens, log-probabilities and alternatives; some guesses are right, and some are wrong."""
    options = {"max_tokens": 150, "ignore_eos": True, **SETTINGS[name]}
    made = [
        fake_model(Graph(drifting)).generate(PROMPT, speculate=how, **options)
        for how in ("off", width)
    ]
    off, on = (replace(one, timings=None, seed=0) for one in made)  # type: ignore[arg-type]
    assert on == off
    guesses = made[1].timings.guesses
    assert guesses.accepted > 0
    assert width == "auto" or guesses.checked > guesses.accepted


@pytest.fixture(scope="module", params=["ort", "portable"])
def tiny(request, tiny_bundle) -> Iterator[Model]:
    with edgert.load(tiny_bundle, lowering=request.param) as model:
        yield model


@pytest.mark.parametrize("name", SETTINGS)
def test_a_real_graph_says_the_same(tiny, name):
    """Tokens are equal; log-probabilities within the tolerance of fp32, where they are given."""
    options = {"max_tokens": 200, "ignore_eos": True, **SETTINGS[name]}
    text = "the star and the car; " * 4
    off = tiny.generate(text, speculate="off", **options)
    for width in WIDTH:
        on = tiny.generate(text, speculate=width, **options)
        assert on.tokens == off.tokens
        if off.logprobs:
            assert on.logprobs == pytest.approx(off.logprobs, abs=1e-4)
    if name == "greedy":
        assert on.timings.guesses.accepted > 20


# Stopping in the middle of what was guessed


def sung(width: int = 8, **options: Any) -> tuple[Session, list[Piece]]:
    """A session of the singer, its pieces, with every guess that there is."""
    session = singer().session()
    pieces = list(session.stream([A], max_tokens=400, speculate=width, **options))
    return session, pieces


ENDS: dict[str, tuple[dict[str, Any], str]] = {
    "stop string": ({"stop": ["mat; the cat sat on the m"]}, "stop"),
    "stop string of two pieces": ({"stop": [" on the mat; the cat s", "never"]}, "stop"),
    "stop token": ({"stop_tokens": ids("n")}, "stop"),
    "end token": ({}, "stop"),
    **{f"{n} tokens": ({"max_tokens": n}, "length") for n in range(30, 50)},
}


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_ends_where_it_would_without_guesses(name):
    """Same pieces, same session; and what is said next is the same too."""
    options, reason = ENDS[name]
    ended = []
    for width in ("off", 8):
        session = singer().session()
        options = {"max_tokens": 400} | options
        pieces = list(session.stream([A], speculate=width, **options))
        assert pieces[-1].finish_reason == reason
        held = int(session.execution.lens[0])
        more = session.generate(max_tokens=9, stop_tokens=(), speculate=width).tokens
        new = session.generate(PROMPT, max_tokens=9).tokens
        ended.append((pieces, held, more, new, session.tokens, session.request and True))
    assert ended[0] == ended[1]


def test_pieces_come_in_order_and_one_by_one():
    """A piece for each token, though several were read at once; the state holds what was said."""
    session = singer().session()
    for count, piece in enumerate(session.stream([A], max_tokens=100, speculate=8), 1):
        assert piece.token == ids(SONG)[count - 1]
        assert len(session.tokens) == 1 + count
        assert int(session.execution.lens[0]) == count


def test_a_deadline_and_a_cancel_are_heard_between_guessed_tokens(monkeypatch):
    """Not only between steps: what was read beyond is not said, and goes on where it was."""
    for how in ("deadline", "cancelled"):
        now = 0.0
        monkeypatch.setattr("edgert.generate.time.perf_counter", lambda: now)  # noqa: B023
        graph = Graph()
        session = singer(graph).session()
        stream = session.stream([A], max_tokens=100, deadline_ms=1000, speculate=8)
        pieces = []
        for piece in stream:
            pieces.append(piece)
            if len(session.tokens) == 33:  # in the middle of a step's guesses
                steps = len(graph.calls)
                if how == "deadline":
                    now = 2.0
                else:
                    stream.cancel()
        assert pieces[-1].finish_reason == how
        assert len(graph.calls) == steps
        assert len(session.tokens) == 34
        assert session.generate(deadline_ms=None).tokens == tuple(ids(SONG)[33:100])


# Growing, and the end of the context


@pytest.mark.parametrize("start", range(244, 258))
def test_a_session_grows_in_the_middle_of_guesses(start):
    """Over the first capacity, wherever the step that reaches it begins."""
    model = fake_model(Graph(drifting), context=CONTEXT)
    prompt = ids(SONG * 2)[:start]
    with model.session() as session:
        for width in ("off", 8):
            session.rewind(0)
            session.trim(0)
            options = {"max_tokens": 1, "ignore_eos": True}
            first = session.generate(prompt, speculate=width, **options).tokens
            capacity = session.execution.states.capacity
            rest = session.generate(max_tokens=40, speculate=width, ignore_eos=True).tokens
            assert session.execution.states.capacity == 1024 >= capacity
            if width == "off":
                want = first + rest
        assert first + rest == want


@pytest.mark.parametrize("context", range(60, 80))
def test_no_guess_goes_beyond_the_context(context):
    graph = Graph()
    said = singer(graph, context=context).generate([A], max_tokens=400, speculate=16)
    assert list(said.tokens) == ids(SONG)[: context - 1]
    assert said.finish_reason == "length"
    assert said.timings.guesses.accepted > 0


# Pausing


def same(one: Session, other: Session) -> None:
    """Bit for bit, all that decides how a session goes on."""
    a, b = snapshot(one), snapshot(other)
    assert {k: v.tobytes() for k, v in a.states.items()} == {
        k: v.tobytes() for k, v in b.states.items()
    }
    assert (a.pending is None) == (b.pending is None)
    if a.pending is not None and b.pending is not None:
        assert (a.pending[0].tobytes(), a.pending[1]) == (b.pending[0].tobytes(), b.pending[1])
    rest = {"tokens": None, "states": {}, "pending": None, "created": ""}
    assert replace(a, **rest) == replace(b, **rest)
    assert one.tokens == other.tokens


@pytest.mark.parametrize("width", ["auto", 5])
@pytest.mark.parametrize(
    "settings", [{"seed": 5}, {"seed": 5, "temperature": 0.8}], ids=["greedy", "drawn"]
)
def test_an_answer_paused_at_every_token_goes_on_bitwise(tiny, tmp_path, width, settings):
    """In its file; guesses are open at some of the pauses."""
    options = {"max_tokens": 48, "logprobs": 1, "ignore_eos": True, "speculate": width, **settings}
    prompt = tiny.encode("the star and the car; " * 3)
    whole, session = tiny.session(), tiny.session()
    want = list(whole.stream(prompt, **options))
    pieces = session.stream(prompt, **options)
    got: list[Piece] = []
    opened = 0
    for _ in range(len(want) - 1):
        got.append(next(pieces))
        session.save(tmp_path / "paused")
        opened += bool(snapshot(session).guess)
        with edgert.resume(tmp_path / "paused", tiny) as resumed:
            rest = list(resumed.stream())
            assert [(p.token, p.logprob) for p in got + rest] == [
                (p.token, p.logprob) for p in want
            ]
            same(resumed, whole)
    assert opened > 3


def test_an_answer_left_at_every_token_takes_the_same_steps():
    """In the same session: what was read already is not read again."""
    whole, parts = Graph(), Graph()
    song = singer(whole).generate([A], max_tokens=len(SONG)).tokens
    session = singer(parts).session()
    next(session.stream([A], max_tokens=len(SONG)))
    while session.request and session.request.finish_reason is None:
        next(session.stream())
    assert tuple(session.tokens[1:]) == song
    assert parts.calls == whole.calls


def test_requests_of_few_tokens_take_the_steps_of_one_request():
    """How many guesses are checked does not depend on how much was asked for."""
    whole, parts = Graph(), Graph()
    song = singer(whole).generate([A], max_tokens=100).tokens
    session = singer(parts).session()
    session.generate([A], max_tokens=20)
    while len(session.tokens) < 101:
        session.generate(max_tokens=8)
    assert tuple(session.tokens[1:101]) == song
    assert parts.calls == whole.calls


def paused() -> Session:
    """A singer's session of 42 tokens, left when three of its newest step's guesses were right."""
    session = singer().session()
    stream = session.stream([A], max_tokens=100, speculate=8)
    while len(session.tokens) < 42:
        next(stream)
    assert snapshot(session).states["lens"][0] == 42 - 4
    return session


USES: dict[str, Callable[[Session], object]] = {
    "another prompt": lambda s: s.generate(PROMPT, max_tokens=12).tokens,
    "append": lambda s: (s.append(PROMPT), s.generate(max_tokens=12).tokens),
    "plain steps": lambda s: s.generate(speculate="off").tokens,
    "one token back": lambda s: (s.rewind(41), s.generate().tokens),
    "some tokens back": lambda s: (s.rewind(36), s.generate().tokens),
    "a shared prompt": lambda s: s.generate(s.reuse([A, *ids(SONG)[:30], A]), max_tokens=5).tokens,
    "trimmed": lambda s: (s.trim(42), s.generate().tokens),
    "forked": lambda s: s.fork().generate().tokens,
}


@pytest.mark.parametrize("name", USES)
def test_open_guesses_are_nobodys_business(tmp_path, name):
    """Whatever is done next is as it would be without them, also behind a pause."""
    use = USES[name]
    without = singer().session()
    stream = without.stream([A], max_tokens=100, speculate="off")
    while len(without.tokens) < 42:
        next(stream)
    want = use(without)
    live = paused()
    live.save(tmp_path / "s")
    assert use(live) == want
    assert use(edgert.resume(tmp_path / "s", singer())) == want
    assert live.tokens == without.tokens


def test_guesses_whose_rows_were_trimmed_away_are_read_again():
    """The newest token fills the smaller capacity to its last row."""
    text = "ab" * 300
    sessions = []
    for width in ("off", 8):
        graph = Graph()
        session = singer(graph, text).session()
        stream = session.stream([A], max_tokens=400, speculate=width)
        while len(session.tokens) < 256:
            next(stream)
        session.trim(256)
        assert session.execution.states.capacity == 256
        session.generate(max_tokens=40)
        sessions.append(session.tokens)
    assert sessions[0] == sessions[1]


# Where there is none


def test_a_loop_that_ends_early_takes_one_token_at_a_time():
    """By default; a number of guesses is refused. At full depth there are guesses."""
    prompt = ids("abcabcabcabc")
    model = looped_model()
    early = model.generate(prompt, halt="fixed:2", max_tokens=30)
    assert early.timings.guesses.checked == 0
    with pytest.raises(UsageError, match="ends early takes one token at a time"):
        model.generate(prompt, halt="fixed:2", speculate=4)
    for halt in (None, "full"):
        on = model.generate(prompt, halt=halt, max_tokens=200, speculate=4)
        assert on.tokens == model.generate(prompt, max_tokens=200, speculate="off").tokens
        assert on.timings.guesses.checked > 0


def with_carry() -> Model:
    """A model with a state that each step replaces: the sum of what it has read."""

    def graph(ids: np.ndarray, lens: np.ndarray, kept: np.ndarray, **_: object) -> dict[str, Any]:
        total = kept + ids.sum(1)
        token = total[:, None] % 7 + A
        logits = np.zeros((1, 1, VOCAB), np.float32)
        logits[0, 0, token[0, 0]] = 9
        return {"token": token, "logits": logits, "kept_next": total}

    counter, carry = (
        StateSpec("counter", "int64", ("batch",)),
        StateSpec("carry", "int64", ("batch",)),
    )
    return fake_model(graph, states={"lens": counter, "kept": carry})


def test_a_state_that_cannot_go_back_has_no_guesses():
    model = with_carry()
    said = model.generate([A] * 9, max_tokens=40)
    assert said.timings.guesses.checked == 0
    assert any(a == b for a, b in pairwise(sorted(said.tokens)))
    with pytest.raises(UsageError, match="cannot go back"):
        model.generate([A] * 9, speculate=4)


# Files that lie


LIES: dict[str, Callable[[SavedSession], dict[str, Any]]] = {
    "another token than was said": lambda s: {"guess": (*s.guess[:-9], 7, *s.guess[1:])},
    "fewer than were said": lambda s: {"guess": s.guess[:1]},
    "tokens without the vocabulary": lambda s: {"guess": (*s.guess[:-1], VOCAB)},
    "nothing said of it": lambda s: {"tokens": s.tokens[: int(s.states["lens"][0]) + 1]},
    "no room": lambda s: {"capacity": int(s.states["lens"][0]) + len(s.guess)},
}


@pytest.mark.parametrize("name", LIES)
def test_guesses_that_cannot_be_are_refused(name):
    saved = snapshot(paused())
    with Session.restore(singer(), saved) as back:
        assert snapshot(back).guess == saved.guess
    with pytest.raises(BadSession, match="guesses do not belong to its tokens"):
        Session.restore(singer(), replace(saved, **LIES[name](saved)))
