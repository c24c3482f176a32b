"""Messages -> the prompt that a model's chat template makes of them, and its token ids.

A template is a program from whoever published the model: `sandbox.py` has what bounds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from edgert.chat.sandbox import compiled
from edgert.errors import BadTokenizer, EdgertError, UsageError

MAX_TEMPLATE = 2**17  # characters: compiling more takes longer than MAX_SECONDS; real ones: 2**15
MAX_OUTPUT = 16 * 2**20  # characters; also of all messages together

_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Encoder(Protocol):
    """What `encode_chat` needs of a tokenizer."""

    @property
    def specials(self) -> tuple[str, ...]: ...

    def encode(self, text: str, *, special: bool = True) -> list[int]: ...


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    extra: Mapping[str, Any] | None = None,
) -> str:
    """The prompt as text.

    messages  {"role": letters, digits, _ and -; "content": any text}, nothing else
    extra     further variables of the template
    Encode text that holds other people's words with `encode_chat` instead: here, special-token
    text in a message is not told apart from the template's own.
    Raises UsageError for messages that are not so, or that the template itself refuses;
    BadTokenizer, with the line, for a template that fails or oversteps its bounds.
    """
    _check_messages(messages)
    if len(template) > MAX_TEMPLATE:
        raise BadTokenizer(
            f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE}"
        )
    variables = {
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    for name in extra or {}:
        if name in variables:
            raise UsageError(f"extra may not set '{name}', which has its own argument")
    try:
        pieces, size = [], 0
        for piece in compiled(template).generate(variables | dict(extra or {})):
            size += len(piece)
            if size > MAX_OUTPUT:
                raise UsageError(
                    f"the chat prompt is longer than {MAX_OUTPUT} characters",
                    do="send fewer or shorter messages",
                )
            pieces.append(piece)
        return "".join(pieces)
    except EdgertError:
        raise
    except Exception as error:  # whatever a template's code can raise
        line = _line(error)
        raise BadTokenizer(
            f"the chat template fails: {_said(error)}",
            where=f"the chat template, line {line}" if line else "the chat template",
            do="export the bundle with another chat template, or send plain text",
        ) from error


def encode_chat(
    tokenizer: Encoder,
    template: str,
    messages: Sequence[Mapping[str, str]],
    **options: Any,
) -> list[int]:
    """Token ids of the prompt; special-token text inside messages is encoded as plain text.

    options: those of `render_chat`. Without such text the ids are those of the whole prompt.
    With it, each occurrence travels through the template as one private-use character and is
    encoded apart, so that a message cannot end its own turn.
    """
    _check_messages(messages)
    contents = [message["content"] for message in messages]
    forged = [text for text in tokenizer.specials if any(text in c for c in contents)]
    if not forged:
        return tokenizer.encode(render_chat(template, messages, **options))
    taken = set(template).union(*contents)
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in taken)
    marks = dict(zip(sorted(forged, key=len, reverse=True), free, strict=False))
    texts = {mark: text for text, mark in marks.items()}
    pattern = re.compile("|".join(map(re.escape, marks)))
    shielded = [
        {**message, "content": pattern.sub(lambda hit: marks[hit[0]], message["content"])}
        for message in messages
    ]
    prompt = render_chat(template, shielded, **options)
    ids: list[int] = []
    for piece in re.split(f"([{''.join(texts)}])", prompt):
        if piece:
            forgery = texts.get(piece)
            ids += tokenizer.encode(forgery or piece, special=forgery is None)
    return ids


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UsageError(
            f"messages are {_brief(messages)}",
            do='give a list of one or more {"role": ..., "content": ...}',
        )
    size = 0
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise UsageError(
                f"messages[{place}] is {_brief(message)}",
                do='give each message a "role" and a "content", and nothing else',
            )
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise UsageError(
                f"messages[{place}] has the role {_brief(role)}",
                do="use a name such as system, user or assistant",
            )
        if not isinstance(content, str):
            raise UsageError(
                f"messages[{place}] has the content {_brief(content)}", do="give it as a text"
            )
        size += len(content)
    if size > MAX_OUTPUT:
        raise UsageError(
            f"the messages have {size} characters, more than {MAX_OUTPUT}",
            do="send fewer or shorter messages",
        )


def _brief(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with the keys {sorted(map(str, value))[:8]}"
    if isinstance(value, (str, int, float)) and len(str(value)) <= 40:
        return repr(value)
    return f"of type {type(value).__name__}" + (
        f" and length {len(value)}" if hasattr(value, "__len__") else ""
    )


def _said(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error)  # jinja2's str() repeats the line
    return f"{type(error).__name__}: {text[:300]}"


def _line(error: BaseException) -> int | None:
    """The line of the template that an error of jinja2 comes from, if it can be told."""
    # Python's SyntaxError has a lineno as well, of the code made from the template
    line = None if isinstance(error, SyntaxError) else getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if "__jinja_exception__" in trace.tb_frame.f_globals:
            line = trace.tb_lineno  # the innermost such frame counts
        trace = trace.tb_next
    return line
