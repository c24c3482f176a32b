"""run, chat: a prompt or a conversation, streamed; from a new session or a saved one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import (
    FILE,
    as_json,
    common,
    key,
    key_options,
    load_options,
    option,
    parse_ids,
    placement,
    sampling,
    sampling_options,
)
from edgert.cli.resumed import resumed
from edgert.cli.show import hashing, note, print_json, size

if TYPE_CHECKING:
    from edgert.conversation import Conversation
    from edgert.generate import Generation, Piece, Stream
    from edgert.model import Model
    from edgert.session import Session
    from edgert.solving import Solving

MAX_PROMPT_BYTES = 16 << 20
OPTIONAL_BUNDLE = click.argument("bundle", type=FILE, required=False)


@click.command(epilog='example: edgert run bundles/smollm2-135m-instruct -p "The sun is" -n 40')
@OPTIONAL_BUNDLE
@option("-p", "--prompt", metavar="TEXT", help="Text to continue.")
@option(
    "-f",
    "--prompt-file",
    type=click.File("rb"),
    metavar="FILE",
    help="The same from a file; - is stdin.",
)
@option("--ids", metavar="1,2,3", help="Token ids to continue; the answer is printed as ids too.")
@option(
    "--chat", is_flag=True, help="Send the prompt as a user's message through the chat template."
)
@option("--system", metavar="TEXT", help="The system message of --chat.")
@option("--no-echo", is_flag=True, help="Print the answer without the prompt.")
@option(
    "--session",
    "session_file",
    type=FILE,
    metavar="FILE",
    help="Go on with a saved session; its bundle is found where it was, or given as BUNDLE.",
)
@option("--save", type=FILE, metavar="FILE", help="Save the session behind the answer.")
@key
@sampling
@placement
@as_json
@common
def run(bundle: Path | None, **given: Any) -> None:
    """Continue a prompt with a bundle's model, streaming the text.

    The answer goes to stdout, a line about its speed to stderr. The defaults of --temperature and
    the options below it are the bundle's own, where it has any. With --session and no prompt, the
    saved answer goes on with its own settings and seed, token for token as if never interrupted.
    """
    _need_one(bundle, given)
    options, keys = sampling_options(given), key_options(given)
    quiet, json_out = given["quiet"], given["as_json"]
    prompt = _prompt(given)
    with _session(bundle, given, keys) as session:
        model = session.model
        if given["chat"]:
            system = [{"role": "system", "content": given["system"]}] if given["system"] else []
            prompt = model.chat_ids([*system, {"role": "user", "content": str(prompt)}])
        stream = session.stream(prompt, **options)
        if json_out:
            with stopped_by_ctrl_c(stream) as interrupted:
                result = stream.result()
            print_json(_run_json(session, result, _save(session, given["save"], keys)))
        else:
            if isinstance(prompt, str) and not given["no_echo"]:
                sys.stdout.write(prompt)
                sys.stdout.flush()
            with stopped_by_ctrl_c(stream) as interrupted:
                finish = print_pieces(stream, as_ids=given["ids"] is not None)
            saved = _save(session, given["save"], keys)
            finish = "interrupted" if interrupted() else finish
            note(closing_line(stream, finish, saved), quiet=quiet)
            note(f"── {model.placement}", quiet=quiet)
    if interrupted():
        raise KeyboardInterrupt


def _need_one(bundle: Path | None, given: dict[str, Any]) -> None:
    if bundle is None and given["session_file"] is None:
        raise click.UsageError("Missing argument 'BUNDLE': give one, or --session FILE")


def _prompt(given: dict[str, Any]) -> str | list[int]:
    ways = ("prompt", "prompt_file", "ids")
    count = len([name for name in ways if given[name] is not None])
    if count > 1 or (count == 0 and given["session_file"] is None):
        raise click.UsageError("give exactly one of --prompt, --prompt-file and --ids")
    if given["system"] and not given["chat"]:
        raise click.UsageError("--system goes with --chat")
    if count == 0:
        if given["chat"]:
            raise click.UsageError("--chat needs a prompt")
        return []
    if given["ids"] is not None:
        if given["chat"]:
            raise click.UsageError("--chat needs text, not --ids")
        return parse_ids(given["ids"])
    if given["prompt"] is not None:
        return _utf8(str(given["prompt"]))
    from edgert.files import read_at_most

    data = read_at_most(given["prompt_file"], MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise click.UsageError(f"the prompt file is larger than {size(MAX_PROMPT_BYTES)}")
    try:
        return str(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the prompt file is not UTF-8: {error}") from None


def _utf8(text: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):  # Python's stand-ins for stray bytes
        raise click.UsageError("the prompt is not UTF-8")
    return text


def load_bundle(bundle: Path, given: dict[str, Any]) -> Model:
    """Load with the options of `placement`, with a bar while it is hashed for the first time."""
    from edgert.bundle import read_manifest
    from edgert.model import load

    total = sum(entry.bytes for entry in read_manifest(bundle).files.values())
    with hashing(total, quiet=given["quiet"]) as advance:
        return load(bundle, progress=advance, **load_options(given))


@contextmanager
def _session(bundle: Path | None, given: dict[str, Any], keys: dict[str, Any]) -> Iterator[Session]:
    """A new session of a bundle, or the saved one; it and its model are closed at the end."""
    if given["session_file"] is None:
        if bundle is None:
            raise click.UsageError("that session is not there yet: give a BUNDLE to begin it with")
        with load_bundle(bundle, given) as model, model.session() as session:
            yield session
        return
    with resumed(given["session_file"], bundle, given, keys) as session:
        yield session


def _save(session: Session, file: Path | None, keys: dict[str, Any]) -> tuple[Path, int] | None:
    return None if file is None else (file, session.save(file, **keys))


@contextmanager
def stopped_by_ctrl_c(work: Stream | Solving) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C ends the work behind its step, so that it stays sound and can be saved; a
    second one interrupts at once. Yields a function that tells whether it was pressed."""
    pressed = False

    def stop(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        work.cancel()

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not the main thread: the application's own affair
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def print_pieces(pieces: Iterable[Piece], *, as_ids: bool = False) -> str:
    """Stream to stdout; the finish reason."""
    reason = "cancelled"
    out = sys.stdout
    for piece in pieces:
        out.write(f"{piece.token} " if as_ids and piece.token is not None else "")
        out.write("" if as_ids else piece.text)
        out.flush()
        reason = piece.finish_reason or reason
    click.echo()
    return reason


def closing_line(
    stream: Stream, finish: str, saved: tuple[Path, int] | None, read: str = ""
) -> str:
    t = stream.timings
    parts = [f"{len(stream.tokens)} tokens", *([read] if read else [])]
    if stream.tokens:
        parts.append(f"first after {t.first_token_s * 1e3:.0f} ms")
    if t.token_s:
        parts.append(f"then {t.decode_tokens_per_s:.1f} tok/s")
    if t.guesses.accepted:
        parts.append(f"{100 * t.guesses.accepted / len(stream.tokens):.0f} % guessed")
    parts.append(finish)
    if not stream.params.greedy:
        parts.append(f"seed {stream.seed}")
    if saved is not None:
        parts.append(f"saved {saved[0]} ({size(saved[1])})")
    return "── " + " · ".join(parts)


def _run_json(
    session: Session, result: Generation, saved: tuple[Path, int] | None
) -> dict[str, Any]:
    t, model = result.timings, session.model
    return {
        "text": result.text,
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
        "logprobs": None if result.logprobs is None else list(result.logprobs),
        "alternatives": [[list(pair) for pair in row] for row in result.alternatives],
        "seed": result.seed,
        "model_id": model.manifest.model_id,
        "variant": model.runner.variant_name,
        "variant_id": model.runner.variant.variant_id,
        "placement": model.placement,
        "n_prompt": t.prompt_tokens,
        "n_gen": len(result.tokens),
        "n_session": len(session.tokens),
        "prefill_ms": t.prefill_s * 1e3,
        "ttft_ms": t.first_token_s * 1e3,
        "decode_tokens_per_s": t.decode_tokens_per_s,
        "graph_ms": t.graph_s * 1e3,
        "guesses": {"checked": t.guesses.checked, "accepted": t.guesses.accepted},
        "saved": None if saved is None else str(saved[0]),
        "session_bytes": None if saved is None else saved[1],
        "notes": list(session.notes),
    }


CHAT_HELP = """/retry   another answer to the newest message
/undo    take back the newest message and its answer
/clear   start over
/exit    leave (so does Ctrl-D); with --session everything is saved"""


@click.command(epilog="example: edgert chat bundles/smollm2-135m-instruct --session talk.session")
@OPTIONAL_BUNDLE
@option("--system", metavar="TEXT", help="The system message.")
@option(
    "--session",
    "session_file",
    type=FILE,
    metavar="FILE",
    help="Resume this conversation if the file is there, and save it behind every answer.",
)
@key
@sampling
@placement
@common
def chat(bundle: Path | None, **given: Any) -> None:
    """Talk with a bundle's model; a line is a message.

    Answers go to stdout, everything else to stderr, so a file of messages can be piped through.
    Only what is new in a turn is read; Ctrl-C stops an answer, /help lists what else can be said.
    """
    from edgert.conversation import Conversation

    _need_one(bundle, given)
    options, keys = sampling_options(given), key_options(given)
    file: Path | None = given["session_file"]
    given_file = file if file is not None and file.exists() else None
    with _session(bundle, given | {"session_file": given_file}, keys) as session:
        talk = Conversation(session, given["system"])
        note(f"── {session.model.placement}", quiet=given["quiet"])
        if given_file is not None:
            turns = sum(m["role"] == "user" for m in talk.messages)
            text = f"── resumed {given_file}: {turns} turns, {len(session.tokens)} tokens"
            note(text, quiet=given["quiet"])
        for message in _messages(talk, quiet=given["quiet"]):
            answer = talk.say(message, **options)
            assert talk.stream is not None
            with stopped_by_ctrl_c(talk.stream):
                finish = print_pieces(answer)
            saved = _save(session, file, keys)
            if talk.dropped:
                note(f"── dropped the {talk.dropped} oldest messages: the context is full")
            read = f"read {talk.read} new, kept {talk.reused}"
            note(closing_line(talk.stream, finish, saved, read), quiet=given["quiet"])
        _save(session, file, keys)


def _messages(talk: Conversation, *, quiet: bool) -> Iterator[str]:
    """What the user says, line by line; what starts with a slash is obeyed here."""
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401  line editing and history for input()

        note("── /help for what can be said besides messages", quiet=quiet)
    while True:
        line = _line(asks)
        if line is None or line in ("/exit", "/quit"):
            return
        if line == "/help":
            note(CHAT_HELP)
        elif line == "/clear":
            talk.clear()
            note("── cleared")
        elif line == "/undo":
            note("── nothing to take back" if talk.undo() is None else "── taken back")
        elif line == "/retry":
            again = talk.undo()
            if again is None:
                note("── nothing to answer again")
            else:
                yield again
        elif line.startswith("/"):
            note(f"── there is no {line.split()[0]}; /help lists what there is")
        elif line:
            yield line


def _line(asks: bool) -> str | None:
    """The next line without its end; None at the end of the input."""
    if asks:
        try:
            sys.stderr.write("> ")
            sys.stderr.flush()
            return _utf8(input().strip())
        except EOFError:
            note("")
            return None
    data = sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1)
    if not data:
        return None
    if len(data) > MAX_PROMPT_BYTES:
        raise click.UsageError(f"a message is larger than {size(MAX_PROMPT_BYTES)}")
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"a message is not UTF-8: {error}") from None
