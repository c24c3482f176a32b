"""Sessions saved, resumed, rewound, trimmed and forked: they go on as if nothing had happened.

What is promised bit for bit is compared bit for bit: tokens, log-probabilities (each depends on
every logit of its step) and, at the end, the whole state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import assert_close
from fake_model import PROMPT, VOCAB, A, Graph, fake_model, greedy, ids, says, speaking

import edgert
from edgert.errors import BadSession, EdgertError, Incompatible, Poisoned, UsageError
from edgert.generate import Piece
from edgert.model import Model
from edgert.runner import PREFILL_CHUNK
from edgert.session import Session
from edgert.sessionfile import read_session, write_session
from edgert.spec import GraphSpec, StateSpec, VariantSpec

LENGTH = 64  # tokens of the answer that is paused at each of its positions
MARGIN = 1e-3  # of log-probability: beyond it the best token is the best in any summation order
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}  # of fp32, where a chunk is computed as single steps

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    "sampled, seed left to chance": {"temperature": 1.5, "top_k": 40},
    "repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.4},
    "penalty of a window": {"temperature": 0.7, "repetition_penalty": 1.4, "repetition_window": 9},
    "logit bias": {"temperature": 0.8, "seed": 3, "logit_bias": {40: 2.0, 50: -1e9, 60: 3.5}},
}


@pytest.fixture(scope="module", params=["ort", "portable"])
def tiny(request, tiny_exported_bundle) -> Iterator[Model]:
    with edgert.load(tiny_exported_bundle, lowering=request.param) as model:
        yield model


def reopened(session: Session, path: Path) -> Session:
    """The session after a pause: saved, closed, and resumed from its file."""
    session.save(path)
    session.close()
    back = edgert.resume(path, session.model)
    assert back.notes == ()
    return back


def start_of(pieces: Iterator[Piece], count: int) -> list[Piece]:
    """The first `count` pieces; then the loop is left."""
    return [next(pieces) for _ in range(count)]


def said(pieces: list[Piece]) -> list[tuple[Any, ...]]:
    """All of each piece that is promised bit for bit; text may be held back differently."""
    return [(p.token, p.logprob, p.alternatives, p.finish_reason) for p in pieces]


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def bits(session: Session) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in session.execution.states.export().items()}


# Pausing


@pytest.mark.parametrize("name", SETTINGS)
def test_an_answer_paused_at_each_of_its_64_positions_goes_on_bitwise(tiny, tmp_path, name):
    """64 pauses in one answer, one file each; each file is resumed, and runs to the end.

    Tokens, log-probabilities, alternatives, finish reason, and the state at the end.
    """
    options = {"max_tokens": LENGTH, "logprobs": 3, "ignore_eos": True, **SETTINGS[name]}
    prompt = tiny.encode("the start then the")
    whole, session = tiny.session(), tiny.session()
    stream = whole.stream(prompt, **options)
    want = list(stream)
    assert len(want) == LENGTH
    pieces = session.stream(prompt, **options | {"seed": stream.seed})
    got: list[Piece] = []
    for position in range(1, LENGTH + 1):
        got.append(next(pieces))
        session.save(tmp_path / "paused")
        with edgert.resume(tmp_path / "paused", tiny) as resumed:
            rest = list(resumed.stream()) if position < LENGTH else []
            assert said(got + rest) == said(want), position
            assert text(got + rest) == text(want), position
            assert resumed.tokens == whole.tokens
            assert bits(resumed) == bits(whole), position
            assert resumed.request == whole.request
    assert list(pieces) == []


def test_an_answer_paused_after_every_token_is_the_same(tiny, tmp_path):
    """64 pauses of one answer, one after the other: each resumed session makes one token."""
    options = {"max_tokens": LENGTH, "logprobs": 0, "temperature": 0.9, "seed": 5}
    whole = tiny.session()
    want = list(whole.stream("hello", **options, ignore_eos=True))
    session, got = tiny.session(), []
    got += start_of(session.stream("hello", **options, ignore_eos=True), 1)
    while got[-1].finish_reason is None:
        session = reopened(session, tmp_path / "s")
        got += start_of(session.stream(), 1)
    assert said(got) == said(want)
    assert text(got) == text(want)
    assert bits(session) == bits(whole)


def test_a_session_that_was_never_saved_goes_on_the_same(tiny):
    """Leaving the loop and asking for the rest needs no file."""
    options = {"max_tokens": 20, "temperature": 0.9, "seed": 5, "logprobs": 0, "ignore_eos": True}
    want = list(tiny.session().stream("hello", **options))
    for position in range(1, 20):
        session = tiny.session()
        got = start_of(session.stream("hello", **options), position)
        assert said(got + list(session.stream())) == said(want)


def test_a_pause_near_the_end_of_the_room_goes_on_bitwise(tiny, tmp_path):
    """Where the paused session moves into a larger capacity earlier than the other would."""
    options = {"max_tokens": 360, "logprobs": 0, "ignore_eos": True}
    prompt = [5 + i * 7 % 200 for i in range(720)]  # room for 1024 until the last tokens
    want = list(tiny.session().stream(prompt, **options))
    session = tiny.session()
    stream = session.stream(prompt, **options)
    got = start_of(stream, 200)
    assert session.execution.states.capacity == 1024
    session = reopened(session, tmp_path / "s")
    assert said(got + list(session.stream())) == said(want)


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_prefill_cancelled_after_a_chunk_goes_on_bitwise(tiny, tmp_path, chunks):
    """Three chunks of prompt, paused behind the first or second; then the same answer."""
    options = {"max_tokens": 8, "logprobs": 2, "temperature": 0.8, "seed": 2, "ignore_eos": True}
    prompt = [5 + i * 11 % 200 for i in range(2 * PREFILL_CHUNK + 9)]
    want = list(tiny.session().stream(prompt, **options))
    session = tiny.session()
    stream = session.stream(prompt, **options)
    run = session.execution.run
    fed: list[int] = []

    def cancel_then(io: Any, halt: Any = None) -> None:
        run(io, halt)
        fed.append(io.ids.shape[1])
        if len(fed) == chunks:
            stream.cancel()

    session.execution.run = cancel_then  # type: ignore[method-assign]
    assert said(list(stream)) == [(None, None, (), "cancelled")]
    assert fed == [PREFILL_CHUNK] * chunks
    session = reopened(session, tmp_path / "s")
    assert session.tokens == prompt
    assert int(session.execution.lens[0]) == chunks * PREFILL_CHUNK
    assert said(list(session.stream())) == said(want)


def test_a_request_cancelled_before_it_began_is_saved_whole(tiny, tmp_path):
    """Position 0: nothing is in the state yet, and the answer is the uninterrupted one."""
    options = {"max_tokens": 8, "logprobs": 2, "temperature": 0.8, "ignore_eos": True}
    session = tiny.session()
    stream = session.stream("hello", **options)
    stream.cancel()
    assert stream.result().finish_reason == "cancelled"
    session = reopened(session, tmp_path / "s")
    got = list(session.stream())
    assert said(got) == said(list(tiny.session().stream("hello", **options, seed=stream.seed)))


def test_append_is_saved_with_its_results(tiny, tmp_path):
    """The newest token is in the state already: its logits are saved, and no step is repeated."""
    options = {"max_tokens": 8, "logprobs": 2, "temperature": 0.8, "seed": 1, "ignore_eos": True}
    whole, session = tiny.session(), tiny.session()
    for each in (whole, session):
        each.append("hello ")
        each.append("the star")
    want = list(whole.stream(**options))
    session = reopened(session, tmp_path / "s")
    before = session.execution.graph_ns
    got = start_of(session.stream(**options), 1)
    assert session.execution.graph_ns == before
    assert said(got + list(session.stream())) == said(want)


def test_logits_behind_an_end_token_are_saved(tiny, tmp_path):
    """An answer ended by a stop token, paused, and taken further with another choice."""
    drawn = {"temperature": 1.5, "seed": 8, "max_tokens": 30, "ignore_eos": True}
    first = tiny.generate("hello", **drawn).tokens
    stop = next(token for i, token in enumerate(first) if i and token not in first[:i])
    ended, more = {**drawn, "stop_tokens": (stop,)}, {"logprobs": 3, "stop_tokens": ()}
    whole, session = tiny.session(), tiny.session()
    for each in (whole, session):
        assert list(each.stream("hello", **ended))[-1].finish_reason == "stop"
    want = list(whole.stream(**more))
    session = reopened(session, tmp_path / "s")
    assert want[0].token == stop
    assert said(list(session.stream(**more))) == said(want)
    assert bits(session) == bits(whole)


def test_an_ended_answer_ends_again_after_the_pause(tmp_path):
    """Without a single step: the results of the newest token are in the file."""
    graph = Graph(says("hi"))
    session = fake_model(graph).session()
    assert session.generate([A]).text == "hi"
    session = reopened(session, tmp_path / "s")
    graph.calls.clear()
    made = session.generate()
    assert (made.text, made.finish_reason, graph.calls) == ("", "stop", [])


TEXT = "say hello worlds, Zoë: 日本 \U0001f600 and bye"


@pytest.mark.parametrize("stop", [(), ("world!", "rlds, Z"), ("\U0001f600",), ("本 ",), ("never",)])
def test_text_is_the_same_wherever_it_is_paused(tmp_path, stop):
    """At every byte: within a character, and within what may become a stop string."""
    model = speaking(TEXT)
    want = model.generate([A], stop=stop, max_tokens=200)
    count = len(want.tokens)
    assert count > 15
    for position in range(1, count):
        session = model.session()
        got = start_of(session.stream([A], stop=stop, max_tokens=200), position)
        session = reopened(session, tmp_path / "s")
        rest = session.stream().result()
        assert text(got) + rest.text == want.text, position
        assert rest.finish_reason == want.finish_reason
        assert session.tokens == [A, *want.tokens]


def test_a_stop_string_that_straddles_the_pause_is_found(tmp_path):
    """Half of it before, half behind; neither half is shown."""
    model = speaking("good morning to all")
    session = model.session()
    got = start_of(session.stream([A], stop="morning", max_tokens=99), len("good mor"))
    assert text(got) == "good "
    session = reopened(session, tmp_path / "s")
    rest = session.stream().result()
    assert (rest.text, rest.finish_reason) == ("", "stop")
    assert session.tokens == [A, *ids("good morning")]


@pytest.mark.parametrize("position", range(1, 12))
def test_what_is_left_of_max_tokens_is_kept(tmp_path, position):
    """A pause gives no more tokens than were asked for."""
    session = fake_model().session()
    start_of(session.stream(PROMPT, max_tokens=12), position)
    session = reopened(session, tmp_path / "s")
    made = session.generate()
    assert (len(made.tokens), made.finish_reason) == (12 - position, "length")
    assert session.tokens == [*PROMPT, *greedy(PROMPT, 12)]


def test_an_answer_that_reached_its_length_goes_on_for_as_much_again(tmp_path):
    session = fake_model().session()
    session.generate(PROMPT, max_tokens=5)
    session = reopened(session, tmp_path / "s")
    assert list(session.generate().tokens) == greedy(PROMPT, 10)[5:]


def test_settings_can_be_changed_when_going_on(tmp_path):
    """What is not given stays as it was; a pause does not change what was asked for."""
    session = fake_model().session()
    start_of(session.stream(PROMPT, max_tokens=50, temperature=1.0, seed=9), 3)
    session = reopened(session, tmp_path / "s")
    start_of(session.stream(), 1)
    assert session.request is not None
    assert (session.request.params.max_tokens, session.request.end) == (50, 53)
    start_of(session.stream(max_tokens=4), 1)
    assert (session.request.params.seed, session.request.params.temperature) == (9, 1.0)
    assert session.request.end - len(session.tokens) == 3


def test_an_empty_session_can_be_saved(tmp_path):
    session = reopened(fake_model().session(), tmp_path / "s")
    assert (session.tokens, session.request, session.data) == ([], None, {})
    assert list(session.generate(PROMPT, max_tokens=3).tokens) == greedy(PROMPT, 3)


def test_saving_in_mid_stream_does_not_disturb_it(tmp_path):
    """Saved between any two tokens, the stream goes on."""
    session = fake_model().session()
    got = []
    for piece in session.stream(PROMPT, max_tokens=9):
        got.append(piece.token)
        session.save(tmp_path / "s")
    assert got == greedy(PROMPT, 9)


def test_save_says_how_large_the_file_is(tmp_path):
    session = fake_model().session()
    session.append(PROMPT)
    assert session.save(tmp_path / "s") == (tmp_path / "s").stat().st_size
    assert session.save(str(tmp_path / "t")) == (tmp_path / "t").stat().st_size


def test_only_the_filled_part_of_the_state_is_saved(tiny, tmp_path):
    """Not the room behind it: the file grows with the tokens, not with the capacity."""
    session = tiny.session()
    session.append([9] * 10)
    small = session.save(tmp_path / "s")
    session.append([9] * 10)
    larger = session.save(tmp_path / "s")
    filled = sum(len(data) for data in bits(session).values())
    assert larger - small < filled
    assert larger < filled + 267 * 4 + 4096  # logits and header


@pytest.mark.parametrize("how", ["passphrase", "key_file"])
def test_an_encrypted_session_goes_on_the_same(tmp_path, how):
    (tmp_path / "key").write_bytes(bytes(range(32)))
    key: dict[str, Any] = {how: "open sesame" if how == "passphrase" else tmp_path / "key"}
    session = fake_model().session()
    start_of(session.stream(PROMPT, max_tokens=12), 4)
    session.save(tmp_path / "s", **key)
    back = edgert.resume(tmp_path / "s", session.model, **key)
    assert list(back.generate().tokens) == greedy(PROMPT, 12)[4:]


def _closed(session: Session) -> None:
    session.close()


def _poisoned(session: Session) -> None:
    def fail(io: Any) -> None:
        raise EdgertError("broken")

    graph = session.model.runner.graphs["epilogue"]._function  # type: ignore[attr-defined]
    graph.hook = lambda: fail(None)
    with pytest.raises(EdgertError, match="broken"):
        session.append([A])


@pytest.mark.parametrize(
    ("spoil", "error", "reason"),
    [(_closed, UsageError, "is closed"), (_poisoned, Poisoned, "cannot be trusted")],
)
def test_what_cannot_be_trusted_is_not_saved_rewound_or_forked(tmp_path, spoil, error, reason):
    """And the old file stays."""
    session = fake_model().session()
    session.append(PROMPT)
    session.save(tmp_path / "s")
    old = (tmp_path / "s").read_bytes()
    spoil(session)
    uses: list[Callable[[], object]] = [
        lambda: session.save(tmp_path / "s"),
        lambda: session.rewind(0),
        lambda: session.trim(0),
        session.fork,
    ]
    for use in uses:
        with pytest.raises(error, match=reason):
            use()
    assert (tmp_path / "s").read_bytes() == old


def test_a_session_in_use_is_not_saved(tmp_path):
    """By another thread, in mid-step: the state is half of one token and half of the next."""
    graph, entered, leave = Graph(), threading.Event(), threading.Event()
    session = fake_model(graph).session()

    def pause() -> None:
        entered.set()
        leave.wait(30)

    graph.hook = pause
    thread = threading.Thread(target=lambda: session.append(PROMPT))
    thread.start()
    entered.wait(30)
    for use in (
        lambda: session.save(tmp_path / "s"),
        lambda: session.rewind(0),
        lambda: session.trim(0),
        session.fork,
    ):
        with pytest.raises(UsageError, match="in use by another thread"):
            use()
    leave.set()
    thread.join()
    assert not (tmp_path / "s").exists()


# Files that are sound and not this model's

WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "token ids beyond the vocabulary": (
        lambda s: replace(s, tokens=np.array([*s.tokens[:-1], VOCAB])),
        f"token ids outside the vocabulary of {VOCAB}",
    ),
    "negative token ids": (
        lambda s: replace(s, tokens=np.array([-1, *s.tokens[1:]])),
        "token ids outside the vocabulary",
    ),
    "the bits of a NaN as a token": (
        lambda s: replace(s, tokens=np.full(s.tokens.size, np.nan).view(np.int64)),
        "token ids outside the vocabulary",
    ),
    "more tokens than the context": (
        lambda s: replace(s, tokens=np.zeros(6000, np.int64)),
        "6000 tokens are more than the context of 5000",
    ),
    "more rows than tokens": (
        lambda s: replace(s, tokens=s.tokens[:3], request=None),
        "it has 6 rows of 3 tokens",
    ),
    "capacity beyond the context": (
        lambda s: replace(s, capacity=5001),
        "6 rows of 7 tokens in a capacity of 5001",
    ),
    "capacity below the rows": (
        lambda s: replace(s, capacity=5),
        "6 rows of 7 tokens in a capacity of 5",
    ),
    "capacity that no session has": (lambda s: replace(s, capacity=300), "has a capacity of 300"),
    "a negative counter": (lambda s: _state(s, lens=np.array([-1])), "it has -1 rows"),
    "a counter of 2^62": (lambda s: _state(s, lens=np.array([2**62])), f"it has {2**62} rows"),
    "a counter that says less": (lambda s: _state(s, lens=np.array([4])), "state 'kept' is int64"),
    "a state too many": (lambda s: _state(s, other=np.array([6])), "state 'other' is on one side"),
    "a counter of another dtype": (
        lambda s: _state(s, lens=np.array([6], np.int32)),
        "counter 'lens' is",
    ),
    "a counter of two rows": (lambda s: _state(s, lens=np.array([6, 6])), "counter 'lens' is not"),
    "a state of another dtype": (
        lambda s: _state(s, kept=s.states["kept"].astype(np.float32)),
        "state 'kept' is float32(1, 6), not int64(1, 6)",
    ),
    "a state of another shape": (
        lambda s: _state(s, kept=s.states["kept"][:, :-1]),
        "state 'kept' is int64(1, 5), not int64(1, 6)",
    ),
    "a state of more axes": (
        lambda s: _state(s, kept=s.states["kept"][..., None]),
        "state 'kept' is int64(1, 6, 1), not int64(1, 6)",
    ),
    "a state more": (
        lambda s: _state(s, more=np.zeros(3, np.float32)),
        "state 'more' is on one side only",
    ),
    "a state less": (
        lambda s: replace(s, states={"lens": s.states["lens"]}),
        "state 'kept' is on one side only",
    ),
    "no state": (lambda s: replace(s, states={}), "counter 'lens' is not there"),
    "logits of a token that is not the newest": (
        lambda s: replace(s, pending=(np.zeros(VOCAB, np.float32), 1)),
        "results of a token that is not its newest",
    ),
    "logits of another vocabulary": (
        lambda s: replace(
            s, tokens=s.tokens[:6], request=None, pending=(np.zeros(9, np.float32), 1)
        ),
        "pending logits of shape (9,), token 1",
    ),
    "a pending token beyond the vocabulary": (
        lambda s: replace(
            s, tokens=s.tokens[:6], request=None, pending=(np.zeros(VOCAB, np.float32), VOCAB)
        ),
        f"pending logits of shape ({VOCAB},), token {VOCAB}",
    ),
}


def _state(saved: Any, **states: Any) -> Any:
    return replace(saved, states=saved.states | states)


@pytest.mark.parametrize("name", WRONG)
def test_a_session_that_cannot_be_this_models_is_refused(tmp_path, name):
    """Sealed rightly, and saying that it is this variant's; the file stays, no memory is kept."""
    change, reason = WRONG[name]
    session = fake_model().session()
    session.generate(PROMPT, max_tokens=4)
    session.save(tmp_path / "s")
    write_session(tmp_path / "s", change(read_session(tmp_path / "s")))
    data = (tmp_path / "s").read_bytes()
    with pytest.raises(BadSession) as caught:
        edgert.resume(tmp_path / "s", session.model)
    assert "the session is not one of this model" in caught.value.what
    assert reason in caught.value.what
    assert caught.value.where == str(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == data


# Rewinding


def test_rewound_to_every_position_it_says_the_same_again(tmp_path):
    """Within the answer and at its ends, greedy and drawn; also after the pause."""
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        session = fake_model().session()
        made = session.generate(PROMPT, max_tokens=16, **options)
        whole = [*PROMPT, *made.tokens]
        for position in range(len(PROMPT), len(whole)):
            session.rewind(position)
            assert session.tokens == whole[:position]
            resumed = reopened(session.fork(), tmp_path / "s")
            assert len(resumed.tokens) == position
            assert session.generate().tokens == made.tokens[position - len(PROMPT) :]
            assert session.tokens == whole


def test_rewound_within_an_answer_of_graphs_it_goes_on_bitwise(tiny):
    """Every position behind the first token: the state there came from single steps, as before.

    At the first one the prompt's last token is computed alone instead of in its chunk: the same
    tokens, and log-probabilities within the tolerance.
    """
    session = tiny.session()
    options = {"max_tokens": 24, "temperature": 0.9, "seed": 4, "logprobs": 2, "ignore_eos": True}
    want = list(session.stream("the start", **options))
    start = len(session.tokens) - 24
    for position in range(start + 1, start + 24):
        session.rewind(position)
        assert said(list(session.stream())) == said(want[position - start :]), position
    session.rewind(start)
    again = list(session.stream())
    assert [p.token for p in again] == [p.token for p in want]
    assert_close([p.logprob for p in again], [p.logprob for p in want], **TOLERANCE)


def test_another_prompt_after_a_rewind_is_as_in_a_fresh_session(tiny):
    """From every position: the same history, and the same log-probabilities within tolerance."""
    session = tiny.session()
    session.generate("the start then the", max_tokens=20, ignore_eos=True)
    whole = list(session.tokens)
    options = {"max_tokens": 4, "logprobs": 2, "ignore_eos": True}
    for position in range(len(whole) + 1):
        each = session.fork()
        each.rewind(position)
        got = list(each.stream(" other", **options))
        want = list(tiny.session().stream([*whole[:position], *tiny.encode(" other")], **options))
        clear = [p.alternatives[0][1] - p.alternatives[1][1] > MARGIN for p in want]
        assert all(clear)
        assert [p.token for p in got] == [p.token for p in want], position
        assert_close([p.logprob for p in got], [p.logprob for p in want], **TOLERANCE)


def test_a_rewind_before_the_answer_forgets_the_request():
    """There is no answer left to go on with: the bundle's defaults hold again."""
    session = fake_model().session()
    session.generate(PROMPT, max_tokens=5, temperature=1.0)
    session.rewind(2)
    assert session.request is None
    made = session.generate(max_tokens=3)
    assert list(made.tokens) == greedy(PROMPT[:2], 3)


@pytest.mark.parametrize("cut", [Session.rewind, Session.trim])
def test_a_position_that_is_none_is_refused(cut):
    session = fake_model().session()
    session.append(PROMPT)
    for position in (-1, 4, 2**70):
        with pytest.raises(UsageError, match=f"has 3 tokens, there is no position {position}"):
            cut(session, position)
    assert session.tokens == PROMPT
    assert list(session.generate(max_tokens=2).tokens) == greedy(PROMPT, 2)


@pytest.mark.parametrize("cut", [Session.rewind, Session.trim])
def test_a_stream_does_not_outlive_a_rewind(cut):
    session = fake_model().session()
    stream = session.stream(PROMPT)
    start_of(stream, 3)
    cut(session, 4)
    with pytest.raises(UsageError, match="gone on without this stream"):
        next(stream)


def test_a_rewind_to_nothing_starts_over(tmp_path):
    session = fake_model().session()
    session.generate(PROMPT, max_tokens=5)
    session.rewind(0)
    session = reopened(session, tmp_path / "s")
    assert (session.tokens, session.request) == ([], None)
    with pytest.raises(UsageError, match="nothing to continue"):
        session.generate()
    assert list(session.generate([A], max_tokens=3).tokens) == greedy([A], 3)


def test_a_stream_made_before_a_rewind_leaves_a_session_that_can_be_saved(tmp_path):
    """It goes on with what is left; what is saved then can be read."""
    session = fake_model().session()
    session.generate(PROMPT, max_tokens=5)
    stream = session.stream(max_tokens=2)
    session.rewind(2)
    start_of(stream, 1)
    session = reopened(session, tmp_path / "s")
    assert session.tokens[:2] == PROMPT[:2]


def carrying() -> Model:
    """A model that keeps, besides its history, a state that each step replaces."""
    graph = Graph()

    def decode(carry: np.ndarray, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        return {**graph(**arrays), "carry_next": carry + np.float32(arrays["ids"].sum())}

    spec = fake_model().runner.parts["epilogue"]
    decode_spec = GraphSpec(
        file="decode",
        data=(),
        inputs={**spec.inputs, "carry": "state.carry"},
        outputs={**spec.outputs, "carry_next": "state.carry"},
    )
    states = fake_model().manifest.states
    return fake_model(
        decode,
        states={**states, "carry": StateSpec("carry", "float32", ("batch", 2))},
        variants={
            "fp32-ort": VariantSpec(
                "fp32", "ort", {"ai.onnx": 20}, {"decode": decode_spec}, "cd" * 32
            )
        },
    )


def test_a_state_that_keeps_no_history_cannot_go_back(tmp_path):
    """Except to the start; and it is saved and resumed like any other."""
    session = carrying().session()
    session.generate(PROMPT, max_tokens=4)
    for cut in (session.rewind, session.trim):
        with pytest.raises(Incompatible, match="replaced by each step") as caught:
            cut(3)
        assert "rewind to 0, or save the session" in str(caught.value)
    carry = session.execution.states.buffers["carry"].host.copy()
    session = reopened(session, tmp_path / "s")
    assert np.array_equal(session.execution.states.buffers["carry"].host, carry)
    assert carry.any()
    session.rewind(len(session.tokens) - 1)  # the newest token is not in the state yet
    session.rewind(0)
    assert not session.execution.states.buffers["carry"].host.any()


# Trimming


def test_trim_gives_memory_back_and_goes_on(tiny, tmp_path):
    """From room for 1024 tokens to room for 256, then the same answer; the file is smaller too."""
    options = {"max_tokens": 6, "logprobs": 1, "ignore_eos": True}
    session = tiny.session()
    prompt = [5 + i * 7 % 200 for i in range(400)]
    session.append(prompt)
    states = session.execution.states
    before, large = (states.capacity, states.nbytes), session.save(tmp_path / "s")
    session.trim(50)
    assert session.tokens == prompt[:50]
    assert (before[0], states.capacity) == (1024, 256)
    assert states.nbytes < before[1] / 3
    assert session.save(tmp_path / "s") < large / 4
    session = reopened(session, tmp_path / "s")
    assert session.execution.states.capacity == 256
    got = list(session.stream(**options))
    want = list(tiny.session().stream(prompt[:50], **options))
    assert [p.token for p in got] == [p.token for p in want]
    assert_close([p.logprob for p in got], [p.logprob for p in want], **TOLERANCE)


def test_trim_within_an_answer_lets_it_go_on():
    session = fake_model().session()
    made = session.generate(PROMPT, max_tokens=300)
    session.trim(20)
    assert session.execution.states.capacity == 256
    assert session.generate().tokens == made.tokens[20 - len(PROMPT) :]


# Forking


def test_forks_draw_their_own_numbers(tmp_path):
    """Parent, two forks and a fork's fork say four different things, each of them repeatable."""

    def family(parent: Session) -> list[tuple[int, ...]]:
        first, second = parent.fork(), parent.fork()
        grandchild = first.fork()
        return [each.generate().tokens for each in (parent, first, second, grandchild)]

    def paused() -> Session:
        session = fake_model().session()
        start_of(session.stream(PROMPT, temperature=1.0, max_tokens=24, seed=5), 4)
        return session

    made = family(paused())
    assert len(set(made)) == 4
    assert (
        made[0] == fake_model().generate(PROMPT, temperature=1.0, max_tokens=24, seed=5).tokens[4:]
    )
    assert family(paused()) == made
    assert family(reopened(paused(), tmp_path / "s")) == made


def test_forks_are_numbered_across_a_pause(tmp_path):
    """The second fork is the second one whether or not a pause lies between."""
    session = fake_model().session()
    start_of(session.stream(PROMPT, temperature=1.0, max_tokens=24, seed=5), 4)
    first, second = session.fork().stream_id, session.fork().stream_id
    other = fake_model().session()
    start_of(other.stream(PROMPT, temperature=1.0, max_tokens=24, seed=5), 4)
    assert other.fork().stream_id == first
    other = reopened(other, tmp_path / "s")
    assert other.fork().stream_id == second


def test_a_fork_goes_on_as_itself_after_a_pause(tiny, tmp_path):
    """Its own draws, bit for bit."""
    session = tiny.session()
    options = {"temperature": 1.2, "max_tokens": 20, "seed": 5, "logprobs": 0, "ignore_eos": True}
    start_of(session.stream("hello", **options), 4)
    fork, twin = session.fork(), session.fork()
    twin.stream_id = fork.stream_id
    want = list(twin.stream())
    got = start_of(fork.stream(), 5)
    fork = reopened(fork, tmp_path / "s")
    assert said(got + list(fork.stream())) == said(want)


def test_greedy_forks_say_the_same(tiny):
    session = tiny.session()
    start_of(session.stream("hello", max_tokens=20, logprobs=2, ignore_eos=True), 6)
    forks = [session.fork() for _ in range(3)]
    want = said(list(session.stream()))
    assert all(said(list(fork.stream())) == want for fork in forks)


def test_a_fork_and_its_parent_share_nothing():
    """Neither tokens nor state nor data; and closing one leaves the other."""
    session = fake_model().session()
    session.data["list"] = [1]
    session.generate(PROMPT, max_tokens=5)
    before, history = bits(session), list(session.tokens)
    fork = session.fork()
    assert (fork.tokens, fork.data, fork.request) == (history, {"list": [1]}, session.request)
    assert not fork.owns_model
    fork.data["list"].append(2)
    fork.generate([A + 9], max_tokens=5)
    fork.close()
    assert (session.tokens, session.data, bits(session)) == (history, {"list": [1]}, before)
    assert list(session.generate([A + 4], max_tokens=3).tokens) == greedy([*history, A + 4], 3)


def test_a_fork_in_mid_stream_does_not_disturb_it():
    session = fake_model().session()
    stream = session.stream(PROMPT, max_tokens=10)
    got = start_of(stream, 3)
    fork = session.fork()
    assert [p.token for p in got + list(stream)] == greedy(PROMPT, 10)
    assert list(fork.generate().tokens) == greedy(PROMPT, 10)[3:]


# Reuse


def fed(graph: Graph) -> int:
    count = sum(tokens for tokens, _ in graph.calls)
    graph.calls.clear()
    return count


@pytest.mark.parametrize("common", [0, 1, 3, 10, 29, 30])
def test_only_what_a_prompt_does_not_share_is_prefilled(tmp_path, common):
    """Counted in the graph: the tokens behind the common prefix; the answer is the whole one's."""
    graph = Graph()
    session = fake_model(graph).session()
    old = [A + i % 20 for i in range(30)]
    session.append(old)
    session = reopened(session, tmp_path / "s")
    fed(graph)
    prompt = [*old[:common], *([A + 25, A + 26] if common < 30 else [A + 25])]
    rest = session.reuse(prompt)
    assert rest == prompt[common:]
    assert session.tokens == old[:common]
    assert list(session.generate(rest, max_tokens=1).tokens) == greedy(prompt, 1)
    assert fed(graph) == len(rest)


def test_a_prompt_that_is_there_in_full_is_not_fed_again():
    """Not one step: its results are still there. A shorter one feeds its last token alone."""
    graph = Graph()
    session = fake_model(graph).session()
    session.append(PROMPT)
    fed(graph)
    assert session.reuse(PROMPT) == []
    assert list(session.generate(max_tokens=1).tokens) == greedy(PROMPT, 1)
    assert fed(graph) == 0
    assert session.reuse(PROMPT[:2]) == []
    assert list(session.generate(max_tokens=1).tokens) == greedy(PROMPT[:2], 1)
    assert fed(graph) == 1


def test_a_conversation_feeds_each_turn_once():
    """Question and answer in turn: what the model said itself is common, but for its newest."""
    graph = Graph()
    session = fake_model(graph).session()
    whole: list[int] = []
    for turn in range(4):
        whole += [A + turn, A + turn + 1]
        rest = session.reuse(whole)
        assert rest == whole[-2:]
        whole += session.generate(rest, max_tokens=3).tokens
        assert fed(graph) == 2 + 2 + (turn > 0)
    assert session.tokens == whole


def test_a_state_without_history_is_fed_from_the_start():
    """It cannot go back, so it starts over; a prompt that only adds is still reused."""
    session = carrying().session()
    session.append(PROMPT)
    assert session.reuse([*PROMPT, A + 9]) == [A + 9]
    assert session.reuse([*PROMPT[:2], A + 9]) == [*PROMPT[:2], A + 9]
    assert session.tokens == []


def test_reuse_checks_its_prompt():
    session = fake_model().session()
    session.append(PROMPT)
    with pytest.raises(UsageError, match=f"outside the vocabulary of {VOCAB}"):
        session.reuse([A, VOCAB])
    assert session.tokens == PROMPT


# Where it was saved


def test_another_number_of_threads_is_noted(tiny_exported_bundle, tmp_path):
    """And the tokens are the same, since each is the best by a clear margin."""
    options = {"max_tokens": 24, "logprobs": 2, "ignore_eos": True}
    with edgert.load(tiny_exported_bundle, threads=1) as model:
        want = list(model.stream("the start", **options))
        session = model.session()
        got = start_of(session.stream("the start", **options), 8)
        session.save(tmp_path / "s")
    margins = [p.alternatives[0][1] - p.alternatives[1][1] for p in want]
    assert min(margins) > MARGIN
    for change, note in (
        ({"threads": 2}, "threads 1 → 2"),
        ({"threads": 1, "prepack": False}, "prepack true → false"),
    ):
        with edgert.load(tiny_exported_bundle, **change) as model:
            resumed = edgert.resume(tmp_path / "s", model)
            assert resumed.notes == (note,)
            rest = list(resumed.stream())
            assert [p.token for p in got + rest] == [p.token for p in want]
            want_logprobs = [p.logprob for p in want]
            assert_close([p.logprob for p in got + rest], want_logprobs, **TOLERANCE)
            assert resumed.fork().notes == (note,)


def test_another_backend_version_or_processor_is_noted(tmp_path):
    """In the order of their names; what is the same is not mentioned; state is taken over."""
    session = fake_model().session()
    start_of(session.stream(PROMPT, max_tokens=12), 4)
    session.save(tmp_path / "s")
    saved = read_session(tmp_path / "s")
    place = {**saved.place, "backend": "fake 0.9", "machine": "pdp11"}
    write_session(tmp_path / "s", replace(saved, place=place))
    with closing(edgert.resume(tmp_path / "s", session.model)) as resumed:
        assert resumed.notes == ("backend fake 0.9 → fake", "machine pdp11 → unknown")
        assert list(resumed.generate().tokens) == greedy(PROMPT, 12)[4:]


def test_saved_again_elsewhere_it_is_of_that_place(tmp_path):
    """Notes are about one move: what is saved here was computed here from here on."""
    session = fake_model().session()
    session.append(PROMPT)
    session.save(tmp_path / "s")
    saved = read_session(tmp_path / "s")
    write_session(tmp_path / "s", replace(saved, place={"backend": "other"}))
    resumed = edgert.resume(tmp_path / "s", session.model)
    assert resumed.notes
    resumed.save(tmp_path / "s")
    assert edgert.resume(tmp_path / "s", session.model).notes == ()
