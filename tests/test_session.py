"""Sessions, on a fake graph: interrupted, continued, used wrongly, and what is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from fake_model import PROMPT, SAMPLED, VOCAB, A, Graph, fake_model, greedy, ids, kept, speaking

from edgert.errors import EdgertError, Poisoned, UsageError
from edgert.generate import Generation, Piece
from edgert.runner import PREFILL_CHUNK
from edgert.session import Session


def uses(session: Session) -> list[Callable[[], object]]:
    return [
        lambda: session.stream(PROMPT),
        lambda: session.generate(PROMPT),
        lambda: session.append(PROMPT),
    ]


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
