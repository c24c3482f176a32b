"""`run --session`, `chat` and `session`: an answer cut in two, a conversation over processes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat

import pytest
from bundles import tiny_bundle as hand_made_bundle

import edgert
from edgert.errors import BadSession, SessionMismatch, UsageError

PROMPT = ("-p", "the star", "-t", "4", "--seed", "5")  # hot enough to say different things


@pytest.fixture
def say(monkeypatch):
    """Put text on stdin, as a pipe would."""

    def put(text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    return put


@pytest.fixture
def story(saved_session, tmp_path):
    return shutil.copy(saved_session, tmp_path / "story.session")


def test_an_answer_in_two_processes_is_the_answer_in_one(run, tiny_bundle, tmp_path) -> None:
    """Saved after 10 tokens and continued without any setting: the same text, sampled."""
    whole = run("run", tiny_bundle, *PROMPT, "-n", "30", "--quiet")
    file = tmp_path / "story.session"
    first = run("run", tiny_bundle, *PROMPT, "-n", "10", "--save", file)
    assert re.search(rf"· saved {file} \([\d.]+ kB\)\n", first.err)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    rest = run("run", "--session", file, "-n", "20", "--quiet")
    assert first.out[:-1] + rest.out == whole.out
    assert len(set(whole.out)) > 10
    assert (first.code, rest.code) == (0, 0)


def test_a_session_is_saved_only_when_asked(run, story) -> None:
    before = story.read_bytes()
    assert run("run", "--session", story, "-n", "5").code == 0
    assert story.read_bytes() == before
    assert run("run", "--session", story, "-n", "5", "--save", story).code == 0
    assert story.read_bytes() != before


def test_a_moved_bundle_is_named(run, tiny_bundle, copied, story) -> None:
    """The identity proves it, wherever it is."""
    there = copied(tiny_bundle)
    assert run("run", there, "--session", story, "-n", "5").code == 0


def test_another_bundle_is_refused(run, story, tmp_path) -> None:
    other = hand_made_bundle(tmp_path)
    before = story.read_bytes()
    got = run("run", other, "--session", story)
    assert got.code == SessionMismatch.exit_code == 4
    assert "this session belongs to another bundle" in got.err
    assert "where" in got.err
    assert story.read_bytes() == before


def test_json_says_where_it_was_saved(run, tiny_bundle, tmp_path) -> None:
    file = tmp_path / "a.session"
    value = json.loads(run("run", tiny_bundle, *PROMPT, "-n", "4", "--save", file, "--json").out)
    assert (value["saved"], value["session_bytes"]) == (str(file), file.stat().st_size)
    assert value["n_session"] == value["n_prompt"] + 4
    assert value["notes"] == []


def test_other_threads_are_announced(run, story) -> None:
    """Bit for bit is promised where nothing differs, and only there."""
    got = run("run", "--session", story, "-n", "3", "--threads", "3", "--low-memory")
    assert got.code == 0
    assert re.search(r"within tolerance, not bit for bit: prepack true → false, threads", got.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "BUNDLE"),
        (["run", "--session", "FILE", "-p", "a", "--ids", "1"], "exactly one of"),
        (["run", "--session", "FILE", "--chat"], "--chat needs a prompt"),
        (["run", "--session", "FILE", "--precision", "fp32"], "precision cannot be chosen"),
        (["chat", "--session", "nowhere.session"], "not there yet"),
        (["session", "trim", "FILE", "999", "-o", "x"], "there is no position 999"),
    ],
)
def test_wrong_use_is_2(run, story, arguments, message) -> None:
    got = run(*[story if argument == "FILE" else argument for argument in arguments])
    assert (got.code, got.out) == (UsageError.exit_code, "")
    assert message in got.err


def test_a_broken_session_is_3(run, story) -> None:
    data = bytearray(story.read_bytes())
    data[-40] ^= 1
    story.write_bytes(data)
    for arguments in (["run", "--session"], ["session", "info"], ["session", "verify"]):
        got = run(*arguments, story)
        assert (got.code, got.out) == (BadSession.exit_code, "")
        assert "SHA-256" in got.err
        assert str(story) in got.err


def test_an_output_that_cannot_be_written_is_1(run, tiny_bundle) -> None:
    """The answer is there; the message says what could not be done, and where."""
    got = run("run", tiny_bundle, *PROMPT, "-n", "3", "--save", "/proc/nothing/a.session")
    assert got.code == 1
    assert got.out.startswith("the star")
    assert re.search(r"cannot write: .*\n  where  /proc/nothing/a.session\n  do ", got.err)


# Look, check, cut, copy


def test_info_says_what_it_holds(run, story) -> None:
    got = run("session", "info", story)
    assert got.code == 0
    for word in ("tokens", "fp32-ort", "threads", "greedy", "written"):
        assert word in got.out
    facts = json.loads(run("session", "info", story, "--json").out)
    assert facts["n_session"] > 20
    assert facts["pending"] is False
    assert facts["request"]["n_gen"] == 20
    assert facts["request"]["finish_reason"] == "length"


def test_verify_resumes_it(run, story, tiny_bundle) -> None:
    got = run("session", "verify", story)
    assert re.fullmatch(r"ok  tiny fp32-ort · \d+ tokens · [\d.]+ kB · .*\n", got.out)
    facts = json.loads(run("session", "verify", story, "--json").out)
    assert facts["verified"] is True
    assert facts["bundle"] == os.path.realpath(tiny_bundle)


def test_trim_cuts_and_leaves_the_file(run, story, tmp_path) -> None:
    before = story.read_bytes()
    out = tmp_path / "start.session"
    assert run("session", "trim", story, "7", "-o", out).code == 0
    assert json.loads(run("session", "info", out, "--json").out)["n_session"] == 7
    assert story.read_bytes() == before


def test_forks_differ_from_each_other(run, tiny_bundle, tmp_path) -> None:
    """Each goes on with draws of its own; the original's are not touched."""
    file = tmp_path / "a.session"
    run("run", tiny_bundle, *PROMPT, "-n", "4", "--save", file)
    want = run("run", "--session", file, "-n", "24", "-q").out
    answers = []
    for name in ("b.session", "c.session"):
        assert run("session", "fork", file, "-o", tmp_path / name).code == 0
        answers.append(run("run", "--session", tmp_path / name, "-n", "24", "-q").out)
    assert len({want, *answers}) == 3
    assert run("run", "--session", file, "-n", "24", "-q").out == want


# Conversations


def test_chat_answers_line_by_line(run, say, tiny_bundle) -> None:
    """Answers on stdout, one after the other; how much was read on stderr."""
    say("hello\nand now\n")
    got = run("chat", tiny_bundle, "-n", "6")
    assert got.code == 0
    assert len(got.out.splitlines()) == 2
    first, second = re.findall(r"read (\d+) new, kept (\d+)", got.err)
    assert (int(first[1]), int(second[1]) > 0) == (0, True)


def test_chat_is_saved_and_goes_on(run, say, tiny_bundle, tmp_path) -> None:
    """In two processes as in one."""
    say("hello\nand now\n")
    want = run("chat", tiny_bundle, "-n", "6", "-q").out
    file = tmp_path / "talk.session"
    say("hello\n")
    first = run("chat", tiny_bundle, "-n", "6", "--session", file, "-q").out
    say("and now\n")
    got = run("chat", "--session", file, "-n", "6")
    assert first + got.out == want
    assert re.search(r"resumed .*talk.session: 1 turns, \d+ tokens", got.err)
    with edgert.resume(file) as session:
        assert [m["role"] for m in session.data["messages"]] == ["user", "assistant"] * 2


def test_chat_obeys_what_starts_with_a_slash(run, say, tiny_bundle) -> None:
    say("/help\n/undo\n/retry\nhello\n/retry\n/undo\n/undo\n/clear\n/dance\n/exit\nnever\n")
    got = run("chat", tiny_bundle, "-n", "4")
    lines = got.out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    wanted = ["/retry", "nothing to take back", "nothing to answer", "taken back", "cleared"]
    for text in [*wanted, "there is no /dance"]:
        assert text in got.err


@pytest.mark.parametrize("data", [b"\xff\xfe\n", b"hello\n\xc3\n"])
def test_chat_refuses_what_is_no_text(run, say, tiny_bundle, data) -> None:
    say(data)
    got = run("chat", tiny_bundle, "-n", "2")
    assert got.code == 2
    assert "a message is not UTF-8" in got.err


# Keys


def test_an_encrypted_session_on_the_command_line(run, tiny_bundle, tmp_path, monkeypatch) -> None:
    """With a passphrase in the environment, or a key file; refused without."""
    pytest.importorskip("cryptography", reason="the crypto extra is not installed")
    monkeypatch.setenv("EDGERT_PASSPHRASE", "open sesame")
    file = tmp_path / "a.session"
    whole = run("run", tiny_bundle, *PROMPT, "-n", "8", "-q").out
    first = run("run", tiny_bundle, *PROMPT, "-n", "4", "-q", "--save", file).out
    assert first[:-1] + run("run", "--session", file, "-n", "4", "-q").out == whole
    monkeypatch.setenv("EDGERT_PASSPHRASE", "another")
    assert run("session", "verify", file).code == 4
    monkeypatch.delenv("EDGERT_PASSPHRASE")
    got = run("session", "verify", file)
    assert got.code == 4
    assert "needs its passphrase" in got.err
    key_file = tmp_path / "key"
    key_file.write_bytes(os.urandom(32))
    run("run", tiny_bundle, *PROMPT, "-n", "4", "--save", file, "--key-file", key_file)
    assert run("session", "verify", file, "--key-file", key_file).code == 0
