"""Generation, on a fake graph: what is said, why it ends, and which settings decide."""

from __future__ import annotations

import time

import numpy as np
import pytest
from fake_model import (
    CONTEXT,
    EOS,
    OFFSET,
    PROMPT,
    SAMPLED,
    TABLE,
    VOCAB,
    A,
    Graph,
    fake_model,
    greedy,
    hashed,
    ids,
    script,
    speaking,
)

from edgert.errors import CapacityExceeded, UsageError
from edgert.generate import Piece, Stream, check_ids
from edgert.sampler import SamplingParams

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
