"""Generation and sessions, on a fake graph: what is said, why it ends, and what is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from fake_model import (
    CONTEXT,
    EOS,
    OFFSET,
    TABLE,
    VOCAB,
    Graph,
    fake_model,
    hashed,
    kept,
    says,
    script,
)

from edgert.errors import CapacityExceeded, EdgertError, Poisoned, UsageError
from edgert.generate import Generation, Piece, Stream, check_ids
from edgert.model import Model
from edgert.runner import PREFILL_CHUNK
from edgert.sampler import SamplingParams
from edgert.session import Session

A = ord("a") + OFFSET
PROMPT = [A, A + 1, A + 2]
SAMPLED = {"temperature": 1.0, "max_tokens": 12}


def ids(text: str) -> list[int]:
    return [byte + OFFSET for byte in text.encode()]


def greedy(history: list[int], count: int) -> list[int]:
    """What a model that answers with `hashed` says, one token after the other."""
    said = list(history)
    for _ in range(count):
        said.append(int(hashed(np.array(said)).argmax()))
    return said[len(history) :]


def speaking(text: str | bytes, **changes: object) -> Model:
    """A model that answers the one-token prompt [A] with this text."""
    return fake_model(Graph(says(text)), **changes)


# Why a stream ends


def test_the_answer_is_that_of_the_whole_history():
    """Every token depends on all before it, so any slip in the state shows."""
    made = fake_model().generate(PROMPT, max_tokens=20)
    assert list(made.tokens) == greedy(PROMPT, 20)
    assert made.finish_reason == "length"


@pytest.mark.parametrize(
    ("text", "options", "want", "count", "reason"),
    [
        ("hello", {}, "hello", 5, "stop"),
        ("", {}, "", 0, "stop"),
        ("hello", {"max_tokens": 1}, "h", 1, "length"),
        ("hello", {"max_tokens": 5}, "hello", 5, "length"),
        ("hello", {"stop_tokens": [ord("l") + OFFSET]}, "he", 2, "stop"),
        ("hello", {"stop_tokens": [ord("h") + OFFSET]}, "", 0, "stop"),
        ("hello", {"stop": "ll"}, "he", 4, "stop"),
        ("hello", {"stop": "hello"}, "", 5, "stop"),
        ("hello", {"stop": "h"}, "", 1, "stop"),
        ("hello", {"stop": "hello there"}, "hello", 5, "stop"),
        ("hello", {"stop": "lot", "max_tokens": 5}, "hello", 5, "length"),
        ("hello", {"stop": ["o", "xx"]}, "hell", 5, "stop"),
        ("hello", {"ignore_eos": True, "max_tokens": 6}, "hello", 6, "length"),
    ],
)
def test_why_a_stream_ends(text, options, want, count, reason):
    """End token, stop token, stop string, max_tokens; also as the very first thing said."""
    made = speaking(text).generate([A], **options)
    assert (made.text, len(made.tokens), made.finish_reason) == (want, count, reason)


@pytest.mark.parametrize("text", ["one END two", "oneEN END", "END", "one EN", "EEND", "one ENEND"])
def test_a_stop_string_is_never_shown(text):
    """Not in any piece, however its letters arrive; what only began like one is shown at last."""
    pieces = list(speaking(text).session().stream([A], stop="END"))
    shown = "".join(piece.text for piece in pieces)
    assert shown == text.partition("END")[0]
    assert [bool(piece.finish_reason) for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_the_last_piece_says_why():
    """An end token has no piece of its own token; a stop string and the length have one."""
    assert list(speaking("a").stream([A]))[-1] == Piece("", None, finish_reason="stop")
    assert list(speaking("ab").stream([A], stop="b"))[-1] == Piece("", A + 1, finish_reason="stop")
    last = list(speaking("ab").stream([A], max_tokens=2))[-1]
    assert last == Piece("b", A + 1, finish_reason="length")


@pytest.mark.parametrize("cut", range(1, 10))
def test_characters_come_whole(cut):
    """Bytes of a character are held until it is complete; U+FFFD stands for a rest at the end."""
    data = "aé€😀".encode()
    made = speaking(data)
    pieces = [piece.text for piece in made.stream([A], max_tokens=cut)]
    assert "".join(pieces) == data[:cut].decode("utf-8", "replace")
    assert all("\ufffd" not in text for text in pieces[:-1])


def test_an_unfinished_character_may_complete_a_stop_string():
    """The replacement character is text as well: the reason is then the stop string."""
    made = speaking("a€").generate([A], stop="\ufffd", max_tokens=3)
    assert (made.text, made.finish_reason) == ("a", "stop")


def test_text_goes_on_behind_an_unfinished_character_of_the_prompt():
    """The prompt's own bytes are not shown again, and are not lost for the character either."""
    lead, rest = "é".encode()
    assert speaking(bytes([rest])).generate([lead + OFFSET]).text == "é"


def test_without_a_tokenizer_there_are_tokens_and_no_text():
    made = speaking("hi", tokenizer=None).generate([A])
    assert (made.text, list(made.tokens), made.finish_reason) == ("", ids("hi"), "stop")


# The context


@pytest.mark.parametrize(
    ("length", "count"), [(1, 7), (6, 2), (7, 1), (8, 0)], ids=lambda v: str(v)
)
def test_the_context_ends_a_stream(length, count):
    """Prompt and answer together fill it and no more; a prompt that fills it gets no answer."""
    session = fake_model(context=8).session()
    made = session.generate([A] * length)
    assert (len(made.tokens), made.finish_reason) == (count, "length")
    assert len(session.tokens) == 8
    assert session.generate().tokens == ()
    with pytest.raises(CapacityExceeded, match="9 tokens .* context of 8"):
        session.append([A])


@pytest.mark.parametrize("prompt", [[A] * 9, "a" * 9, np.full(9, A), range(9)])
def test_a_prompt_beyond_the_context_is_refused_with_nothing_changed(prompt):
    graph = Graph()
    session = fake_model(graph, context=8).session()
    for use in (session.stream, session.generate, session.append):
        with pytest.raises(CapacityExceeded, match="9 tokens .* context of 8"):
            use(prompt)
    assert session.tokens == []
    session.generate([A] * 3, max_tokens=2)
    with pytest.raises(CapacityExceeded, match="9 tokens"):
        session.stream([A] * 4)
    assert len(session.tokens) == 5


def test_a_session_grows_through_its_buckets():
    """A long answer crosses the capacity it started with, unnoticed."""
    made = fake_model().generate([A] * 250, max_tokens=20)
    assert list(made.tokens) == greedy([A] * 250, 20)


# Interruptions


def test_cancel_in_a_long_prefill_is_heard_after_the_chunk():
    """From another thread, while the graph runs; the session goes on later as if nothing was."""
    graph, entered = Graph(), threading.Event()

    def wait_for_the_cancel() -> None:
        entered.set()
        stream._cancelled.wait(30)

    graph.hook = wait_for_the_cancel
    session = fake_model(graph).session()
    prompt = [A] * (3 * PREFILL_CHUNK)
    stream = session.stream(prompt, max_tokens=4)

    def cancel() -> None:
        entered.wait(30)
        stream.cancel()

    other = threading.Thread(target=cancel)
    other.start()
    assert list(stream) == [Piece("", None, finish_reason="cancelled")]
    other.join()
    assert [tokens for tokens, _ in graph.calls] == [PREFILL_CHUNK]
    assert session.generate(max_tokens=4).tokens == tuple(greedy(prompt, 4))
    assert [tokens for tokens, _ in graph.calls] == [PREFILL_CHUNK] * 3 + [1] * 3


def test_cancel_while_streaming():
    """The token at hand is still given."""
    stream = fake_model().session().stream(PROMPT, max_tokens=100)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 5:
            threading.Thread(target=stream.cancel).start()
            stream._cancelled.wait(30)
    assert len(pieces) == 6
    assert pieces[-1].finish_reason == "cancelled"
    assert pieces[-1].token is not None


def test_cancel_before_the_first_piece_runs_nothing():
    graph = Graph()
    stream = fake_model(graph).session().stream(PROMPT)
    stream.cancel()
    assert stream.result().finish_reason == "cancelled"
    assert graph.calls == []


def test_a_deadline_in_the_prefill():
    """The chunk that is running ends; no token is chosen, and no time is spent on others."""
    graph = Graph(hook=lambda: time.sleep(0.25))
    session = fake_model(graph).session()
    made = session.generate([A] * (2 * PREFILL_CHUNK), deadline_ms=200)
    assert (made.tokens, made.finish_reason) == ((), "deadline")
    assert len(graph.calls) == 1
    assert made.timings.prefill_s >= made.timings.graph_s >= 0.25


def test_a_deadline_in_the_decode():
    """The token at hand is still given."""
    graph = Graph()
    graph.hook = lambda: time.sleep(0.4 if len(graph.calls) == 3 else 0)
    made = fake_model(graph).generate(PROMPT, deadline_ms=350, max_tokens=1000)
    assert (len(made.tokens), made.finish_reason) == (3, "deadline")


def test_a_deadline_that_is_over_runs_nothing():
    graph = Graph()
    made = fake_model(graph).generate(PROMPT, deadline_ms=1e-6)
    assert (made.tokens, made.finish_reason, graph.calls) == ((), "deadline", [])


# What is left behind


def test_leaving_early_and_going_on_gives_the_uninterrupted_answer():
    """Draws belong to positions: with the seed, it does not matter where one pauses."""
    want = fake_model().generate(PROMPT, seed=7, **SAMPLED)
    session = fake_model().session()
    got: list[int] = []
    for stop in (1, 4, 5):
        for piece in session.stream(PROMPT if not got else (), seed=7, **SAMPLED):
            got.append(piece.token)
            if len(got) == stop:
                break
    got += session.generate(seed=7, temperature=1.0, max_tokens=12 - len(got)).tokens
    assert got == list(want.tokens)
    assert session.tokens == [*PROMPT, *got]


def test_a_second_prompt_continues_the_first():
    """The same as one long prompt of everything said so far, and no token is fed twice."""
    graph = Graph()
    session = fake_model(graph).session()
    first = session.generate(PROMPT, max_tokens=5).tokens
    second = session.generate([A + 9, A + 8], max_tokens=5).tokens
    history = [*PROMPT, *first, A + 9, A + 8]
    assert list(second) == greedy(history, 5)
    assert sum(tokens for tokens, _ in graph.calls) == len(history) + 4
    assert kept(session.execution.states.buffers["kept"], 0, 5) == history[:5]


def test_append_then_stream_without_a_prompt():
    """The state is full already: the first token costs no step at all."""
    graph = Graph()
    session = fake_model(graph).session()
    session.append(PROMPT)
    session.append([A + 5])
    assert [tokens for tokens, _ in graph.calls] == [3, 1]
    made = session.generate(max_tokens=1)
    assert list(made.tokens) == greedy([*PROMPT, A + 5], 1)
    assert len(graph.calls) == 2


def test_after_an_end_token_the_session_goes_on():
    """The end token is not part of what was said; asked again, the model ends again."""
    session = speaking("hi").session()
    assert session.generate([A]).text == "hi"
    assert session.tokens == [A, *ids("hi")]
    again = session.generate()
    assert (again.text, again.finish_reason) == ("", "stop")


def test_a_stream_that_is_never_iterated_changes_nothing():
    graph = Graph()
    session = fake_model(graph).session()
    stream = session.stream(PROMPT)
    assert (session.tokens, graph.calls) == ([], [])
    assert session.generate([A], max_tokens=3).tokens == tuple(greedy([A], 3))
    assert list(stream.result().tokens)[:1] == greedy([A, *greedy([A], 3), *PROMPT], 1)


def test_a_rewind_by_hand_feeds_the_newest_token_again():
    """Dropping tokens and lowering the counter is all there is to it."""
    session = fake_model().session()
    session.generate(PROMPT, max_tokens=10)
    del session.tokens[6:]
    session.execution.lens[0] = 6
    assert list(session.generate(max_tokens=3).tokens) == greedy(session.tokens[:6], 3)


def test_an_empty_prompt_needs_something_to_continue():
    session = fake_model().session()
    session.append("")
    for prompt in ((), "", []):
        with pytest.raises(UsageError, match="nothing to continue: the prompt is empty"):
            session.generate(prompt)
    assert session.tokens == []
    assert session.generate(PROMPT, max_tokens=1).tokens == tuple(greedy(PROMPT, 1))


# One stream at a time


def test_interleaved_streams_are_refused():
    """The older one ends with an error; the newer one and the session are as they should be."""
    session = fake_model().session()
    old = session.stream(PROMPT, max_tokens=50)
    said = [next(old).token, next(old).token]
    new = session.stream([A + 7], max_tokens=5)
    first = next(new).token
    with pytest.raises(UsageError, match="gone on without this stream") as caught:
        next(old)
    assert "one stream of a session at a time" in str(caught.value)
    history = [*PROMPT, *said, A + 7]
    assert [first, *(piece.token for piece in new)] == greedy(history, 5)


@pytest.mark.parametrize("other", [lambda s: s.append([A]), lambda s: s.close()])
def test_a_stream_does_not_outlive_what_it_streams(other):
    session = fake_model().session()
    stream = session.stream(PROMPT)
    next(stream)
    other(session)
    before = list(session.tokens)
    with pytest.raises(UsageError, match="gone on without this stream, or was closed"):
        next(stream)
    assert session.tokens == before
    assert stream.result().finish_reason == "cancelled"


def test_a_stream_left_early_can_be_taken_up_again():
    session = fake_model().session()
    stream = session.stream(PROMPT, max_tokens=8)
    for piece in stream:
        if piece.token is not None:
            break
    made = stream.result()
    assert list(made.tokens) == greedy(PROMPT, 8)
    assert made.text == session.model.tokenizer.decode(made.tokens)
    assert stream.result() == made


def test_two_threads_on_one_session_are_refused():
    """While one is in a step, the other gets a typed error and nothing is disturbed."""
    graph, entered, leave = Graph(), threading.Event(), threading.Event()
    session = fake_model(graph).session()
    results: list[Generation] = []

    def pause() -> None:
        entered.set()
        leave.wait(30)

    graph.hook = pause
    stream, waiting = session.stream(PROMPT, max_tokens=3), session.stream([A])
    thread = threading.Thread(target=lambda: results.append(stream.result()))
    thread.start()
    entered.wait(30)
    for use in (lambda: next(waiting), lambda: next(stream), *uses(session)):
        with pytest.raises(UsageError, match="in use by another thread") as caught:
            use()
        assert "each thread its own session" in str(caught.value)
    leave.set()
    thread.join()
    assert list(results[0].tokens) == greedy(PROMPT, 3)


def test_closing_a_session_in_mid_step_ends_its_stream():
    """The step ends well; then the stream ends with an error and the memory is given back."""
    graph, entered, leave = Graph(), threading.Event(), threading.Event()
    session = fake_model(graph).session()
    stream = session.stream(PROMPT, max_tokens=3)
    next(stream)
    errors: list[EdgertError] = []

    def advance() -> None:
        try:
            next(stream)
            next(stream)
        except UsageError as error:
            errors.append(error)

    def pause() -> None:
        entered.set()
        leave.wait(30)

    graph.hook = pause
    thread = threading.Thread(target=advance)
    thread.start()
    entered.wait(30)
    session.close()
    leave.set()
    thread.join()
    assert "was closed" in str(errors[0])
    assert session.execution.states.buffers == {}


def test_many_sessions_in_threads_answer_as_alone():
    """One model, sessions of their own: nothing is shared that one could change."""
    model = fake_model()
    prompts = [[A + i] * (i + 1) for i in range(8)]
    results: dict[int, Generation] = {}

    def work(i: int) -> None:
        results[i] = model.generate(prompts[i], seed=i, **SAMPLED)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prompt in enumerate(prompts):
        assert results[i].tokens == model.generate(prompt, seed=i, **SAMPLED).tokens


# Failures


def test_a_failed_step_poisons_the_session_and_no_other():
    graph = Graph()
    model = fake_model(graph)
    session = model.session()
    session.generate(PROMPT, max_tokens=2)
    before = list(session.tokens)

    def fail() -> None:
        raise EdgertError("broken")

    graph.hook = fail
    stream = session.stream((), max_tokens=3)
    with pytest.raises(EdgertError, match="broken"):
        list(stream)
    graph.hook = lambda: None
    for use in (session.stream, session.generate, session.append):
        with pytest.raises(Poisoned, match="open a new session"):
            use([A])
    assert session.tokens == before
    assert model.generate(before, max_tokens=2).tokens == tuple(greedy(before, 2))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"logprobs": 1}])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_numbers_are_an_error(value, options):
    """Also for the graph's own argmax, which would silently answer 0 for ever."""
    model = fake_model(Graph(lambda history: np.full(VOCAB, value, np.float32)), eos=())
    with pytest.raises(Poisoned, match="no finite maximum"):
        model.generate(PROMPT, **options)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**62])
def test_a_graph_that_chooses_no_token_is_not_believed(token):
    """The argmax output is a file's claim; the logits decide where it cannot be."""

    def lying(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        return {**Graph()(**arrays), "token": np.full_like(arrays["select"], token)}

    assert list(fake_model(lying).generate(PROMPT, max_tokens=3).tokens) == greedy(PROMPT, 3)


def uses(session: Session) -> list[Callable[[], object]]:
    return [
        lambda: session.stream(PROMPT),
        lambda: session.generate(PROMPT),
        lambda: session.append(PROMPT),
    ]


def test_a_closed_session_says_so():
    """Its tokens can still be read; closing twice does nothing."""
    with fake_model().session() as session:
        tokens = [*PROMPT, *session.generate(PROMPT, max_tokens=2).tokens]
        stream = session.stream()
    session.close()
    for use in (*uses(session), lambda: next(stream)):
        with pytest.raises(UsageError, match="the session is closed") as caught:
            use()
        assert "open a new one" in str(caught.value)
    assert session.tokens == tokens


def test_a_closed_model_says_so():
    """Its sessions too, and a stream in the middle."""
    model = fake_model()
    session = model.session()
    stream = session.stream(PROMPT)
    next(stream)
    model.close()
    model.close()
    more = [model.session, lambda: model.generate(PROMPT), lambda: model.logits([PROMPT])]
    for use in (*uses(session), *more, lambda: next(stream)):
        with pytest.raises(UsageError, match="the model is closed"):
            use()
    session.close()


# Ids, settings, draws


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1, -1], "token id -1 at position 1 is outside the vocabulary of 258"),
        ([VOCAB], "token id 258 at position 0"),
        (np.array([2**64 - 1], np.uint64), "token id 18446744073709551615"),
        ([2**70], "flat list of integers, not object"),
        ([1.0, 2.0], "flat list of integers, not float64"),
        ([True, False], "not bool"),
        ([[1, 2], [3, 4]], r"not int64 of shape \(2, 2\)"),
        ([[1, 2], [3]], "flat list of integers: "),
        (["a"], "not <U1"),
        ([None], "not object"),
        (7, r"of shape \(\)"),
        (b"abc", "flat list of integers"),
        (np.broadcast_to(np.int64(1), (2, 10**12)), r"of shape \(2, 1000000000000\)"),
    ],
)
def test_ids_from_outside_are_checked(bad, message):
    """By a typed error that names the first bad one, with nothing changed."""
    session = fake_model().session()
    with pytest.raises(UsageError, match=message):
        session.stream(bad)
    assert session.tokens == []


@pytest.mark.parametrize(
    "huge", [range(10**12), np.broadcast_to(np.int64(1), 10**12), [1] * (CONTEXT + 1)]
)
def test_too_many_ids_are_refused_before_room_is_made(huge):
    with pytest.raises(CapacityExceeded, match=f"{len(huge)} tokens are more than .* {CONTEXT}"):
        fake_model().session().stream(huge)


class Hostile:
    def __len__(self) -> int:
        raise RuntimeError("boo")


def test_a_sequence_that_raises_is_a_usage_error():
    with pytest.raises(UsageError, match="boo"):
        check_ids(Hostile(), VOCAB, CONTEXT)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda v: np.array(v, np.uint8)])
def test_ids_of_any_integer_kind_are_taken(kind):
    assert check_ids(kind([3, 1, 4]), VOCAB, CONTEXT) == [3, 1, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"tempature": 1}, "did you mean 'temperature'"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias names token 258, the model has tokens 0 to 257"),
        ({"params": 40}, "params is int, not SamplingParams"),
    ],
)
def test_settings_are_checked_before_anything_changes(options, message):
    graph = Graph()
    session = fake_model(graph).session()
    with pytest.raises(UsageError, match=message):
        session.stream(PROMPT, **options)
    assert (session.tokens, graph.calls) == ([], [])


def test_stop_strings_need_a_tokenizer():
    """Without text they could never be found."""
    model = fake_model(tokenizer=None)
    with pytest.raises(UsageError, match="cannot look for stop strings") as caught:
        model.generate(PROMPT, stop="x")
    assert "stop_tokens" in str(caught.value)


def test_params_come_before_the_bundle_and_options_before_params():
    model = fake_model(sampling={"max_tokens": 3, "temperature": 0.0})
    assert len(model.generate(PROMPT).tokens) == 3
    assert len(model.generate(PROMPT, SamplingParams(max_tokens=4)).tokens) == 4
    assert len(model.generate(PROMPT, SamplingParams(max_tokens=4), max_tokens=5).tokens) == 5
    assert model.generate(PROMPT, SamplingParams()).seed != 0


def test_the_seed_decides():
    """The same seed gives the same answer, another seed or stream another one."""
    model = fake_model()
    answers = [
        model.generate(PROMPT, **{**SAMPLED, **options}).tokens
        for options in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 1, "stream": 1})
    ]
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3


def test_a_fresh_seed_is_reported_and_repeats_the_answer():
    model = fake_model()
    first = model.generate(PROMPT, **SAMPLED)
    assert first.seed != model.generate(PROMPT, **SAMPLED).seed
    assert model.generate(PROMPT, seed=first.seed, **SAMPLED).tokens == first.tokens


def test_logprobs_come_with_every_token():
    """Those of the model's own distribution, best alternatives first."""
    made = fake_model().generate(PROMPT, max_tokens=4, logprobs=3)
    assert made.logprobs is not None
    assert len(made.logprobs) == len(made.alternatives) == 4
    history = list(PROMPT)
    for token, logprob, best in zip(made.tokens, made.logprobs, made.alternatives, strict=True):
        logits = hashed(np.array(history)).astype(np.float64)
        norm = np.log(np.exp(logits).sum())
        assert logprob == pytest.approx(logits[token] - norm, abs=1e-5)
        assert [i for i, _ in best] == np.argsort(-logits, kind="stable")[:3].tolist()
        history.append(token)


@pytest.mark.parametrize(("logprobs", "on"), [(None, False), (0, True)])
def test_alternatives_are_only_there_if_asked_for(logprobs, on):
    made = fake_model().generate(PROMPT, max_tokens=2, logprobs=logprobs)
    assert (made.logprobs is not None) == on
    assert made.alternatives == ()


def test_greedy_by_the_graph_is_greedy_by_the_sampler():
    """The graph's own argmax and the host's agree token by token."""
    model = fake_model()
    own = model.generate(PROMPT, max_tokens=30).tokens
    assert model.generate(PROMPT, max_tokens=30, logprobs=0).tokens == own


def test_timings_add_up():
    """Time that the caller takes between two pieces is nobody's latency."""
    stream = fake_model().session().stream(PROMPT, max_tokens=5)
    for _ in stream:
        time.sleep(0.1)
    t = stream.timings
    assert t.prompt_tokens == 3
    assert len(t.token_s) == 4
    assert 0 < t.prefill_s <= t.first_token_s
    assert 0 < t.graph_s <= t.first_token_s + sum(t.token_s)
    assert sum(t.token_s) < 0.3
    assert t.decode_tokens_per_s == pytest.approx(4 / sum(t.token_s))


def test_no_tokens_make_no_speed():
    assert speaking("").generate([A]).timings.decode_tokens_per_s == 0.0


def test_the_fake_ends_only_where_a_test_says_so():
    """The tests above rely on the end token being the least likely."""
    assert (TABLE.argmin(1) == EOS).all()
    assert script(5)(np.array([A, 5])).argmax() == EOS
    assert isinstance(fake_model().stream(PROMPT), Stream)
