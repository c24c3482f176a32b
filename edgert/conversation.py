"""A conversation over a session: messages in, answers out, and only what is new is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgert.errors import BadSession, CapacityExceeded, UsageError
from edgert.generate import Piece, Stream
from edgert.session import Session

ROOM = 128
"""Tokens that an answer should have room for before older turns are dropped to make it."""

_KEY = "messages"  # in Session.data: saved and resumed with the session

Message = dict[str, str]


class Conversation:
    """Turns of user and assistant over one session, through the bundle's chat template.

    `messages` are the session's own (`session.data["messages"]`): saving the session saves them.
    `reused` and `read` say how many tokens of the newest prompt the state held already, and how
    many were prefilled; `dropped` how many of the oldest messages had to go to make room.
    Raises UsageError if the bundle has no chat template, or a system message is given to a
    conversation that has begun; BadSession if the session's messages are none.
    """

    def __init__(self, session: Session, system: str | None = None) -> None:
        self.session = session
        self.reused = self.read = self.dropped = 0
        self.stream: Stream | None = None
        if session.model.manifest.chat_template is None:
            session.model.chat_ids([])  # says so
        messages = session.data.setdefault(_KEY, [])
        if not _are_messages(messages):
            raise BadSession(
                "the session's messages are not those of a conversation",
                do="go on with it through `edgert run --session`, or start a new one",
            )
        if system is not None:
            if messages and messages[0] != {"role": "system", "content": system}:
                raise UsageError(
                    "the conversation has begun without this system message",
                    do="leave it out, or start a new session",
                )
            if not messages:
                messages.append({"role": "system", "content": system})

    @property
    def messages(self) -> list[Message]:
        found: list[Message] = self.session.data[_KEY]
        return found

    def say(self, text: str, **options: Any) -> Iterator[Piece]:
        """Stream the answer to a message of the user; `options` as `Session.stream`.

        When it ends, or the loop over it is left, message and answer join `messages`. Raises as
        `Session.stream`, with nothing changed; CapacityExceeded if the message alone is too long.
        """
        asked: Message = {"role": "user", "content": text}
        ids = self._prompt(asked)
        rest = self.session.reuse(ids)
        self.session.request = None  # a new answer, also where nothing new is to be read
        self.reused, self.read = len(ids) - len(rest), len(rest)
        self.stream = self.session.stream(rest, **options)
        return self._answer(self.stream, asked)

    def _answer(self, stream: Stream, asked: Message) -> Iterator[Piece]:
        said: list[str] = []
        try:
            for piece in stream:
                said.append(piece.text)
                yield piece
        finally:
            if said:
                self.messages.extend([asked, {"role": "assistant", "content": "".join(said)}])

    def undo(self) -> str | None:
        """Take back the newest message and its answer; the message, or None if there is none."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not turns:
            return None
        text = self.messages[turns[-1]]["content"]
        del self.messages[turns[-1] :]
        return text

    def clear(self) -> None:
        """Start over, with the system message if there is one."""
        del self.messages[self._kept() :]
        self.session.rewind(0)

    def _kept(self) -> int:
        """Messages that are never dropped: the system's."""
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def _prompt(self, asked: Message) -> list[int]:
        """The ids of the whole conversation, without its oldest turns where it is too long."""
        context = self.session.model.manifest.context
        room = min(ROOM, context // 2)
        kept, messages = self._kept(), list(self.messages)
        dropped = 0
        while True:
            ids = self.session.model.chat_ids([*messages, asked])
            if len(ids) + room <= context:
                break
            if len(messages) - kept < 2:
                if len(ids) < context:
                    break
                raise CapacityExceeded(
                    f"the message alone does not fit this model's context of {context} tokens",
                    do="say less at once",
                )
            del messages[kept : kept + 2]
            dropped += 2
        self.messages[:] = messages
        self.dropped = dropped
        return ids


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
        for message in value
    )
