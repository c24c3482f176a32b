"""How tests/frozen/v1/ was made: a small bundle, two sessions of format version 1, what they hold.

    python tests/frozen/make.py NEW_FOLDER

The files of v1/ are never made again: they stand for those that users have on their disks, and
tests/test_frozen.py holds their hashes. A change that cannot open them breaks users' sessions. A
new format version gets a folder of its own beside v1/, made by a version of this script of its own.
The script refuses to write into a folder that exists. On the same versions of torch, onnx and
onnxruntime and the same kind of processor it gives the same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny_decoder as tiny

import edgert
from edgert.export.write import ExportOptions, export_bundle
from edgert.session import Session
from edgert.sessionfile import write_session
from edgert.snapshot import snapshot
from edgert.vault import key_from

CREATED = "2026-01-02T03:04:05Z"
PROMPT = "the start, then "
ANSWER: dict[str, Any] = {
    "max_tokens": 24,
    "temperature": 4.0,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "logit_bias": {70: 1.5, 9: -1e9},
    "logprobs": 2,
    "seed": 20260102,
    "stop": ("never said",),
    "ignore_eos": True,
}
AFTER_APPEND: dict[str, Any] = {
    "max_tokens": 12,
    "temperature": 3.0,
    "seed": 5,
    "logprobs": 0,
    "ignore_eos": True,
}


def write_bundle(folder: Path) -> None:
    """108 kB: two blocks of 16 channels, a tokenizer of bytes and a few merges, both lowerings."""
    model = tiny.decoder(
        seed=17,
        vocab_size=len(tiny.SPECIALS) + 256 + len(tiny.MERGES),
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=24,
        context=96,
    )
    loud = [
        len(tiny.SPECIALS) + i
        for i, c in enumerate(sorted(tiny.vocabulary_alphabet()))
        if c.isascii() and c.isalnum()
    ]
    quiet = [token for token in range(model.config.vocab_size) if token not in loud]
    model.embed[quiet] *= 0.01  # the tied head says letters and digits
    imported = tiny.imported(
        model,
        name="frozen",
        tokenizer_json=tiny.tokenizer_json(),
        chat_template=tiny.TEMPLATE,
        eos=(0,),
        sampling={"temperature": 0.0},
        provenance={"source": "tests/frozen/make.py"},
    )
    export_bundle(imported, folder, ExportOptions())


def paused(model: edgert.Model) -> Session:
    """In the middle of an answer of 24 drawn tokens, after 7; one fork was made."""
    session = model.session()
    session.data = {"note": "Zoë \U0001f600", "turns": [1, 2.5, None, {"a": True}]}
    stream = session.stream(PROMPT, **ANSWER)
    for _ in range(7):
        next(stream)
    session.fork().close()
    return session


def appended(model: edgert.Model) -> Session:
    """The second fork of a fork, behind an append: logits are pending, no request is open."""
    session = paused(model).fork().fork()
    session.append(" more")
    return session


def write_frozen(session: Session, path: Path, **key: Any) -> dict[str, Any]:
    """Save it without a trace of this machine's paths; what it holds and how it goes on."""
    saved = snapshot(session)
    hint = replace(saved.bundle, path=None, relative="bundle")
    saved = replace(saved, bundle=hint, created=CREATED, written_by="edgert 0.1.0")
    write_session(path, saved, key_from(None, key.get("key_file")))
    position = len(session.tokens)
    made = session.generate(**({} if session.request else AFTER_APPEND))
    return {
        "bundle": asdict(saved.bundle),
        "place": saved.place,
        "tokens": saved.tokens.tolist(),
        "capacity": saved.capacity,
        "states": {
            name: [str(array.dtype), list(array.shape), float(array.astype("float64").sum())]
            for name, array in saved.states.items()
        },
        "pending": saved.pending
        and [saved.pending[1], float(saved.pending[0].astype("float64").sum())],
        "request": saved.request and asdict(saved.request),
        "stream": saved.stream,
        "forks": saved.forks,
        "data": saved.data,
        "written_by": saved.written_by,
        "created": saved.created,
        "continuation": {
            "tokens": session.tokens[position:],
            "logprobs": made.logprobs,
            "text": made.text,
            "finish_reason": made.finish_reason,
        },
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_bundle(folder / "bundle")
    (folder / "key").write_bytes(bytes(range(32)))
    rng = random.Random(1)  # in place of the system's: salt, nonce, names of temporary files
    with (
        edgert.load(folder / "bundle", lowering="ort", threads=1) as model,
        mock.patch("os.urandom", rng.randbytes),
    ):
        expected = {
            "plain-session": write_frozen(paused(model), folder / "plain-session"),
            "locked-session": write_frozen(
                appended(model), folder / "locked-session", key_file=folder / "key"
            ),
        }
    (folder / "expected.json").write_text(
        json.dumps(expected, indent=1, ensure_ascii=True) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
