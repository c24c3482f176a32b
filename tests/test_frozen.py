"""Files of format version 1 that must open for ever: a bundle, a plain and an encrypted session.

They stand for those that users have on their disks. They are NEVER made again for version 1: if a
test here fails, the change is wrong, not the file. tests/frozen/make.py says how they were made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import HERE, assert_close

import edgert
from edgert.bundle import Bundle
from edgert.errors import WrongKey
from edgert.sessionfile import SavedSession, read_session, write_session
from edgert.vault import Key, key_from

V1 = HERE.parent / "frozen" / "v1"
SESSIONS = ("plain-session", "locked-session")
AFTER_APPEND: dict[str, Any] = {
    "max_tokens": 12,
    "temperature": 3.0,
    "seed": 5,
    "logprobs": 0,
    "ignore_eos": True,
}
TOLERANCE = {"atol": 1e-3, "rtol": 1e-4}  # of log-probabilities in fp32, on any processor

SHA256 = {  # the first 32 hex digits
    "bundle/chat_template.jinja": "f2b777fc1706d77d44ce10390a67b458",
    "bundle/manifest.json": "0a5a9c22bb158e4ebe0844a159024505",
    "bundle/parity.json": "3b061357961d962d866ce2c276d7609e",
    "bundle/tokenizer.json": "c5791c607104176244cb5b83c298b024",
    "bundle/variants/fp32/decode-ort.onnx": "586b4bfc04f2be9c2eabb157a341ba9e",
    "bundle/variants/fp32/decode-portable.onnx": "f2eb8e3b755844830051ae63cc9631e2",
    "bundle/variants/fp32/weights.data": "eaff0e39281c482b5b04f172e2b147ea",
    "expected.json": "c03cc9e9cacaf5faa8d0db4c12aa0cc4",
    "key": "630dcd2966c4336691125448bbb25b4f",
    "locked-session": "9795937b6b0e40534b3853e86b6ae71e",
    "plain-session": "063caf09053799a9c20624ca288c6f7b",
}


def key_of(name: str) -> dict[str, Path]:
    return {"key_file": V1 / "key"} if name == "locked-session" else {}


def opened(name: str) -> SavedSession:
    return read_session(V1 / name, key_from(None, key_of(name).get("key_file")))


@pytest.fixture(params=SESSIONS)
def name(request) -> str:
    return str(request.param)


@pytest.fixture
def expected(name) -> dict[str, Any]:
    return dict(json.loads((V1 / "expected.json").read_text(encoding="utf-8"))[name])


@pytest.fixture
def model() -> Iterator[edgert.Model]:
    with edgert.load(V1 / "bundle", lowering="ort", threads=1) as model:
        yield model


def test_the_frozen_files_are_those_of_version_1():
    """Nobody has made them again, changed one, or added one."""
    found = {
        str(path.relative_to(V1)): hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        for path in sorted(V1.rglob("*"))
        if path.is_file()
    }
    assert found == SHA256, "files of version 1 are never regenerated: restore them from history"


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_the_frozen_bundle_is_verified_and_loads(lowering):
    Bundle.open(V1 / "bundle", verify=True)
    with edgert.load(V1 / "bundle", lowering=lowering) as model:
        assert model.manifest.name == "frozen"
        assert model.generate("the", max_tokens=3, ignore_eos=True).tokens


def test_every_field_of_a_frozen_session_is_read(name, expected):
    """Against what was written down when it was made; states by dtype, shape and sum."""
    saved = opened(name)
    assert dataclasses.asdict(saved.bundle) == expected["bundle"]
    assert saved.tokens.tolist() == expected["tokens"]
    for key in ("place", "capacity", "stream", "forks", "data", "written_by", "created"):
        assert getattr(saved, key) == expected[key], key
    request = saved.request and json.loads(json.dumps(dataclasses.asdict(saved.request)))
    if request is not None:
        for younger, unset in {"halt": None, "speculate": "auto"}.items():
            assert request["params"].pop(younger) == unset, "younger than the file"
    assert request == expected["request"]
    assert saved.states.keys() == expected["states"].keys()
    for state, (dtype, shape, total) in expected["states"].items():
        array = saved.states[state]
        assert (str(array.dtype), list(array.shape)) == (dtype, shape), state
        assert float(array.astype(np.float64).sum()) == pytest.approx(total, rel=1e-12), state
    if expected["pending"] is None:
        assert saved.pending is None
    else:
        assert saved.pending is not None
        token, total = expected["pending"]
        assert saved.pending[1] == token == int(saved.pending[0].argmax())
        assert float(saved.pending[0].astype(np.float64).sum()) == pytest.approx(total, rel=1e-12)


def goes_on(session: edgert.Session, expected: dict[str, Any]) -> None:
    """The recorded continuation: each token, the text, and log-probabilities within tolerance."""
    want, position = expected["continuation"], len(session.tokens)
    made = session.generate(**({} if expected["request"] else AFTER_APPEND))
    assert session.tokens[position:] == want["tokens"]
    assert (made.text, made.finish_reason) == (want["text"], want["finish_reason"])
    assert_close(made.logprobs, want["logprobs"], **TOLERANCE)


def test_a_frozen_session_goes_on_as_it_did(name, expected, model):
    """Through `edgert.resume` on a loaded model."""
    with edgert.resume(V1 / name, model, **key_of(name)) as session:
        goes_on(session, expected)


def test_a_frozen_session_finds_its_bundle(name, expected, tmp_path):
    """Through `edgert.resume` alone: the bundle lies beside the file, wherever both are copied."""
    for folder in (V1, shutil.copytree(V1, tmp_path / "copy")):
        with edgert.resume(folder / name, **key_of(name)) as session:
            assert session.model.bundle.root.parent == folder
            goes_on(session, expected)


def test_the_frozen_key_opens_the_locked_one_alone():
    with pytest.raises(WrongKey, match="needs its key file"):
        read_session(V1 / "locked-session")
    with pytest.raises(WrongKey, match="this is not its key file"):
        read_session(V1 / "locked-session", Key(bytes(32), 1))


def test_version_1_is_still_written_as_it_was(tmp_path):
    """Read and written again, the plain session is the same file, to the byte."""
    write_session(tmp_path / "s", opened("plain-session"))
    assert (tmp_path / "s").read_bytes() == (V1 / "plain-session").read_bytes()


def test_a_frozen_session_saved_again_goes_on_the_same(name, expected, model, tmp_path):
    """Old file, resumed, saved by today's code, resumed again."""
    with edgert.resume(V1 / name, model, **key_of(name)) as session:
        session.save(tmp_path / "s")
    with edgert.resume(tmp_path / "s", model) as session:
        assert session.notes == ()
        goes_on(session, expected)
