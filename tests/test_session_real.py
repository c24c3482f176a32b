"""The demo's real model: paused anywhere, resumed bit for bit, also in new processes."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import finished, python
from smollm2 import BOTH, NEEDS_MODEL, exported

import edgert
from edgert.errors import BadSession
from edgert.generate import Piece
from edgert.model import Model
from edgert.runner import PREFILL_CHUNK
from edgert.session import Session
from edgert.sessionfile import read_session

pytestmark = NEEDS_MODEL

LENGTH = 64  # tokens of the answer that is paused at each of its positions
PROMPT = "The sun is a star that"
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 7},
}
COMMON: dict[str, Any] = {"max_tokens": LENGTH, "logprobs": 2, "ignore_eos": True}
SAMPLED_FLIPS = 1000

IN_ANOTHER_PROCESS = """
import json, sys, edgert
with edgert.resume(sys.argv[1]) as session:
    pieces = list(session.stream())
    print(json.dumps({
        "tokens": [p.token for p in pieces],
        "logprobs": [p.logprob.hex() for p in pieces],
        "alternatives": [[[t, l.hex()] for t, l in p.alternatives] for p in pieces],
        "text": "".join(p.text for p in pieces),
        "notes": session.notes,
    }))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return exported(tmp_path_factory)


@pytest.fixture(scope="module", params=BOTH)
def model(request, tmp_path_factory) -> Iterator[Model]:
    bundle = exported(tmp_path_factory, request.param)
    with edgert.load(bundle, lowering=request.param) as model:
        yield model


def said(pieces: list[Piece]) -> list[tuple[Any, ...]]:
    return [(p.token, p.logprob, p.alternatives, p.finish_reason) for p in pieces]


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def bits(session: Session) -> dict[str, str]:
    """The SHA-256 of the filled part of each state."""
    states = session.execution.states.export()
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in states.items()}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("to_the_end", [16, pytest.param(1, marks=pytest.mark.full)])
def test_an_answer_paused_at_each_of_its_64_positions_goes_on_bitwise(
    model, tmp_path, name, to_the_end
):
    """64 files of one answer; each is resumed, and says the next 2 tokens; every 16th, all the
    rest; with the long tests, all of them all the rest.

    Tokens, log-probabilities, alternatives and text, and every state, are compared bit for bit: at
    each of the 64 the state taken up is that of the uninterrupted answer at the same position.
    """
    whole, session = model.session(), model.session()
    want, states = [], []
    for piece in whole.stream(PROMPT, **COMMON, **SETTINGS[name]):
        want.append(piece)
        states.append(bits(whole))
    assert len(want) == LENGTH
    stream = session.stream(PROMPT, **COMMON, **SETTINGS[name])
    got: list[Piece] = []
    for position in range(1, LENGTH + 1):
        got.append(next(stream))
        session.save(tmp_path / "s")
        with edgert.resume(tmp_path / "s", model) as resumed:
            assert resumed.notes == ()
            assert bits(resumed) == states[position - 1], position
            until = LENGTH if position % to_the_end == 0 else min(LENGTH, position + 2)
            more = resumed.stream()
            rest = [next(more) for _ in range(until - position)]
            assert said(got + rest) == said(want[:until]), position
            assert text(got + rest) == text(want[:until]), position
            assert bits(resumed) == states[until - 1], position


@pytest.mark.parametrize("name", SETTINGS)
def test_three_pauses_resumed_in_new_processes_go_on_bitwise(model, tmp_path, name):
    """At tokens 1, 31 and 63: the bundle is found, loaded as it was, and the bits are the same."""
    session = model.session()
    pieces: list[Piece] = []
    for piece in session.stream(PROMPT, **COMMON, **SETTINGS[name]):
        pieces.append(piece)
        if len(pieces) in (1, 31, 63):
            session.save(tmp_path / f"{len(pieces)}")
    assert len(pieces) == LENGTH
    for position in (1, 31, 63):
        result = finished(python("-c", IN_ANOTHER_PROCESS, tmp_path / f"{position}"))
        assert result.code == 0, result.err
        other = json.loads(result.out)
        rest = pieces[position:]
        assert other["tokens"] == [p.token for p in rest]
        assert [float.fromhex(x) for x in other["logprobs"]] == [p.logprob for p in rest]
        assert [
            tuple((token, float.fromhex(x)) for token, x in each) for each in other["alternatives"]
        ] == [p.alternatives for p in rest]
        assert text(pieces[:position]) + other["text"] == text(pieces)
        assert other["notes"] == []


def test_a_prefill_cancelled_between_chunks_goes_on_bitwise(model, tmp_path):
    """A prompt of three chunks, the first of them in the state, saved and resumed."""
    prompt = [5 + i * 37 % 40000 for i in range(2 * PREFILL_CHUNK + 188)]
    options = {**COMMON, "max_tokens": 8}
    want = list(model.session().stream(prompt, **options))
    session = model.session()
    stream = session.stream(prompt, **options)
    run = session.execution.run

    def then_cancel(io: Any, halt: Any = None) -> None:
        run(io, halt)
        stream.cancel()

    session.execution.run = then_cancel  # type: ignore[method-assign]
    assert [p.finish_reason for p in stream] == ["cancelled"]
    session.save(tmp_path / "s")
    with edgert.resume(tmp_path / "s", model) as resumed:
        assert int(resumed.execution.lens[0]) == PREFILL_CHUNK
        assert said(list(resumed.stream())) == said(want)


def test_characters_and_stop_strings_survive_every_pause(model, tmp_path):
    """Emoji of several tokens and a stop string that begins before the pause, put in its mouth.

    The answer is forced by a bias one token at a time, so that it is known; the tokens that a
    character is split into are the tokenizer's own.
    """
    said_text = "café 🤖🦾 日本 and then stop here, please"
    tokens = model.encode(said_text)
    stop = ("stop here",)
    session = model.session()
    session.append(PROMPT)
    shown, pieces = "", []
    for token in tokens:
        options: dict[str, Any] = {"logit_bias": {token: 1e9}, "max_tokens": len(tokens) + 1}
        stream = session.stream(stop=stop, **options)
        pieces.append(next(stream))
        shown += pieces[-1].text
        session.save(tmp_path / "s")
        session.close()
        session = edgert.resume(tmp_path / "s", model)
        if pieces[-1].finish_reason:
            break
    assert pieces[-1].finish_reason == "stop"
    assert shown == said_text.split("stop here")[0]
    assert "" in [p.text for p in pieces]


def short_session(bundle: Path, path: Path) -> Session:
    """A few tokens, paused in mid-answer: half a megabyte."""
    with edgert.load(bundle) as model:
        session = model.session()
        next(session.stream(PROMPT, **COMMON, temperature=0.9, seed=1))
        session.save(path)
    return session


def test_every_bit_of_the_header_and_1000_of_the_rest_is_refused(bundle, tmp_path):
    """Each flip alone, in the file itself: BadSession, and the file is as it was before reading.

    All 8 x (8 + header) bits of length and header, then 1,000 bits drawn with a seed from tensors
    and seal. It prints how many, and how long it took.
    """
    path = tmp_path / "s"
    short_session(bundle, path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(7)
    chosen = [*range(8 * header)]
    chosen += rng.sample(range(8 * header, 8 * len(data)), SAMPLED_FLIPS)
    start = time.perf_counter()
    with path.open("r+b", buffering=0) as file:
        for bit in chosen:
            byte = bit // 8
            file.seek(byte)
            file.write(bytes([data[byte] ^ 1 << bit % 8]))
            with pytest.raises(BadSession) as caught:
                read_session(path)
            assert type(caught.value) is BadSession
            file.seek(byte)
            assert file.read(1) == bytes([data[byte] ^ 1 << bit % 8])
            file.seek(byte)
            file.write(data[byte : byte + 1])
    assert len(chosen) == 8 * header + SAMPLED_FLIPS
    assert path.read_bytes() == data
    print(
        f"{len(chosen):,} flips of {len(data):,} bytes, header {header:,}: "
        f"{time.perf_counter() - start:.1f} s"
    )
    read_session(path)


def test_cut_anywhere_it_is_refused(bundle, tmp_path):
    """At each byte of the header, and at 200 places of the rest."""
    path = tmp_path / "s"
    short_session(bundle, path)
    size = path.stat().st_size
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    sizes = sorted([*random.Random(8).sample(range(header, size), 200), *range(header)])
    for cut in reversed(sizes):
        with path.open("r+b") as file:
            file.truncate(cut)
        with pytest.raises(BadSession):
            read_session(path)
        assert path.stat().st_size == cut


def test_tokens_are_the_same_on_another_number_of_threads(bundle, tmp_path):
    """Noted, and equal as far as the best token is clear."""
    with edgert.load(bundle, threads=2) as model:
        session = model.session()
        stream = session.stream(PROMPT, **COMMON)
        pieces = [next(stream) for _ in range(8)]
        session.save(tmp_path / "s")
        pieces += list(stream)
    margins = [p.alternatives[0][1] - p.alternatives[1][1] for p in pieces]
    until = next((i for i, margin in enumerate(margins) if margin < 1e-3), LENGTH)
    assert until > 16
    with edgert.resume(tmp_path / "s", threads=1) as resumed:
        assert resumed.notes == ("threads 2 → 1",)
        rest = list(resumed.stream())
    assert [p.token for p in rest][: until - 8] == [p.token for p in pieces[8:until]]
