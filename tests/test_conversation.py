"""A conversation, on a fake graph that speaks bytes: what is read, kept, dropped and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_model import OFFSET, Graph, fake_model, says

from edgert.conversation import Conversation
from edgert.errors import BadSession, CapacityExceeded, UsageError
from edgert.model import Model

TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}:{{ m.content }}>{% endfor %}<a:"


@pytest.fixture
def chatty(monkeypatch):
    """A function that makes a model with a chat template; its graph is the first argument."""

    def make(graph: Graph | None = None, **changes: object) -> Model:
        model = fake_model(graph, chat_template="template", **changes)
        monkeypatch.setattr("edgert.model._template", lambda path: TEMPLATE)
        monkeypatch.setattr("edgert.bundle.Bundle.path", lambda self, file: Path(file))
        return model

    return make


def said(talk: Conversation, text: str, **options: object) -> str:
    return "".join(piece.text for piece in talk.say(text, **options))


def text_of(model: Model, tokens: list[int]) -> str:
    return model.tokenizer.decode(tokens)


def test_only_what_is_new_is_read(chatty):
    """The second turn feeds the end of the first answer, the new message, and nothing before."""
    graph = Graph(says("ok", after=len("<u:hi><a:")))
    model = chatty(graph)
    talk = Conversation(model.session())
    assert said(talk, "hi") == "ok"
    first = sum(tokens for tokens, _ in graph.calls)
    assert (talk.reused, talk.read) == (0, len("<u:hi><a:"))
    assert first == len("<u:hi><a:ok")
    said(talk, "more", max_tokens=1)
    assert (talk.reused, talk.read) == (len("<u:hi><a:ok"), len("><u:more><a:"))
    fed = sum(tokens for tokens, _ in graph.calls)
    assert fed - first == len("><u:more><a:")


def test_messages_are_those_of_both_sides(chatty):
    model = chatty(Graph(says("ok", after=len("<s:be kind><u:hi><a:"))))
    talk = Conversation(model.session(), "be kind")
    said(talk, "hi")
    assert talk.messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ok"},
    ]
    assert text_of(model, talk.session.tokens) == "<s:be kind><u:hi><a:ok"


def test_an_answer_equals_that_to_the_whole_prompt(chatty):
    """Reading it in turns, or at once in a fresh session, is the same."""
    model = chatty()
    talk = Conversation(model.session())
    said(talk, "one", max_tokens=5)
    second = said(talk, "two", max_tokens=5)
    ids = model.chat_ids(talk.messages[:-1])
    assert model.generate(ids, max_tokens=5).text == second


def test_a_retry_after_undo_reads_nothing_new(chatty):
    """The prompt is the same; greedy, so is the answer; with another seed it is another answer."""
    model = chatty()
    talk = Conversation(model.session())
    first = said(talk, "one", max_tokens=8, temperature=1.0, seed=1)
    assert talk.undo() == "one"
    assert talk.messages == []
    assert said(talk, "one", max_tokens=8, temperature=1.0, seed=1) == first
    assert talk.read == 0
    talk.undo()
    assert said(talk, "one", max_tokens=8, temperature=1.0, seed=2) != first


def test_undo_of_nothing_and_clear(chatty):
    talk = Conversation(chatty().session(), "be kind")
    assert talk.undo() is None
    said(talk, "one", max_tokens=2)
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "be kind"}]
    assert talk.session.tokens == []


def test_a_saved_conversation_goes_on(chatty, tmp_path):
    """Resumed, the next turn reads what is new, and answers as the uninterrupted one does."""
    model = chatty()
    talk = Conversation(model.session(), "be kind")
    said(talk, "one", max_tokens=6)
    talk.session.save(tmp_path / "talk.session")
    want = said(talk, "two", max_tokens=6)
    import edgert

    again = Conversation(edgert.resume(tmp_path / "talk.session", model), "be kind")
    assert said(again, "two", max_tokens=6) == want
    assert (again.reused, again.messages) == (talk.reused, talk.messages)


def test_a_deadline_keeps_what_was_said(chatty):
    """The answer so far joins the messages, as it was shown."""
    talk = Conversation(chatty().session())
    pieces = list(talk.say("one", deadline_ms=1e-6))
    assert pieces[-1].finish_reason == "deadline"
    assert talk.messages[-1] == {"role": "assistant", "content": ""}


def test_the_oldest_turns_go_when_the_context_is_full(chatty):
    """The system message stays, and the newest turns; what goes is counted."""
    model = chatty(context=256)
    talk = Conversation(model.session(), "be kind")
    for number in range(6):
        said(talk, f"message {number} " + "x" * 30, max_tokens=4)
    assert talk.dropped == 2
    assert talk.messages[0]["role"] == "system"
    assert talk.messages[1]["content"].startswith("message ")
    assert len(talk.session.tokens) <= 256


def test_a_message_that_cannot_fit_is_refused(chatty):
    """And nothing is changed by it."""
    talk = Conversation(chatty(context=64).session(), "be kind")
    with pytest.raises(CapacityExceeded, match="context of 64") as caught:
        talk.say("x" * 100)
    assert "say less" in str(caught.value)
    assert len(talk.messages) == 1


def test_a_conversation_needs_a_template():
    with pytest.raises(UsageError, match="no chat template"):
        Conversation(fake_model().session())


def test_another_system_message_is_refused_later(chatty):
    session = chatty().session()
    said(Conversation(session, "be kind"), "one", max_tokens=1)
    with pytest.raises(UsageError, match="without this system message"):
        Conversation(session, "be brief")


@pytest.mark.parametrize("messages", [3, [3], [{"role": "user"}], [{"role": 1, "content": "a"}]])
def test_messages_that_are_none_are_refused(chatty, messages):
    """A session's data may come from anywhere."""
    session = chatty().session()
    session.data["messages"] = messages
    with pytest.raises(BadSession, match="not those of a conversation"):
        Conversation(session)


def test_bytes_are_the_ids_of_these_tests():
    """So that the counts above are counts of characters."""
    assert fake_model().encode("a") == [ord("a") + OFFSET]
