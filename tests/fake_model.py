"""A model without files: Python functions as its graph, so that tests of the runtime take no time.

The graph keeps every id in an append state and answers from the whole stored history, so wrong
state handling changes the answer. Ids are bytes behind an end token (0) and a spare one (1).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.backends.base import Buffer
from edgert.backends.fake import FakeBackend
from edgert.bundle import Bundle
from edgert.model import Model
from edgert.runner import Runner
from edgert.spec import (
    DECODER_INPUTS,
    GraphSpec,
    Manifest,
    ProgramSpec,
    StateSpec,
    TokenizerSpec,
    VariantSpec,
    decoder_results,
)

EOS, OFFSET = 0, 2
VOCAB = OFFSET + 256
CONTEXT = 5000  # over the first buckets, so that sessions grow
TABLE = np.random.default_rng(11).standard_normal((257, VOCAB)).astype(np.float32)
TABLE[:, EOS] = -9.0  # these models end only where a test says so

A = ord("a") + OFFSET
PROMPT = [A, A + 1, A + 2]
SAMPLED = {"temperature": 1.0, "max_tokens": 12}

Logits = NDArray[np.float32]


def hashed(history: NDArray[np.int64]) -> Logits:
    """Logits [V] that any change of the history changes."""
    return TABLE[zlib.crc32(history.tobytes()) % len(TABLE)]


def script(*ids: int, after: int = 1) -> Callable[[NDArray[np.int64]], Logits]:
    """Say exactly these ids behind `after` tokens of prompt, then end."""

    def logits(history: NDArray[np.int64]) -> Logits:
        place = len(history) - after
        out = np.zeros(VOCAB, np.float32)
        out[ids[place] if 0 <= place < len(ids) else EOS] = 9.0
        return out

    return logits


def says(text: str | bytes, after: int = 1) -> Callable[[NDArray[np.int64]], Logits]:
    data = text.encode() if isinstance(text, str) else text
    return script(*(byte + OFFSET for byte in data), after=after)


@dataclass
class Graph:
    """The decode graph. `calls` has (tokens, rows) of every step; `hook` runs before each.

    `kept` [B, capacity] is the append state: ids at rows lens .. lens + tokens.
    """

    answer: Callable[[NDArray[np.int64]], Logits] = hashed
    hook: Callable[[], None] = lambda: None
    calls: list[tuple[int, int]] = field(default_factory=list)

    def __call__(
        self,
        ids: NDArray[np.int64],
        select: NDArray[np.int64],
        lens: NDArray[np.int64],
        kept: NDArray[np.int64],
    ) -> dict[str, NDArray[Any]]:
        self.calls.append((ids.shape[1], ids.shape[0]))
        self.hook()
        kept = kept.copy()
        for row, start in enumerate(lens):
            kept[row, start : start + ids.shape[1]] = ids[row]
        logits = np.stack(
            [
                np.stack([self.answer(kept[row, : lens[row] + place + 1]) for place in places])
                for row, places in enumerate(select)
            ]
        )
        return {"logits": logits, "token": logits.argmax(-1), "kept_next": kept}


def manifest(**changes: Any) -> Manifest:
    decode = GraphSpec(
        file="decode",
        data=(),
        inputs={
            "ids": "input.ids",
            "select": "input.select",
            "lens": "state.lens",
            "kept": "state.kept",
        },
        outputs={"logits": "result.logits", "token": "result.token", "kept_next": "state.kept"},
    )
    made = Manifest(
        name="fake",
        summary="answers from a hash of all it has read",
        model_id="ab" * 32,
        weights_id="",
        parameters=0,
        vocab_size=VOCAB,
        context=CONTEXT,
        program=ProgramSpec(epilogue="decode"),
        inputs=DECODER_INPUTS,
        results=decoder_results(VOCAB),
        states={
            "lens": StateSpec("counter", "int64", ("batch",)),
            "kept": StateSpec("append", "int64", ("batch", "capacity"), "capacity", "lens"),
        },
        variants={
            "fp32-ort": VariantSpec("fp32", "ort", {"ai.onnx": 20}, {"decode": decode}, "cd" * 32)
        },
        eos=(EOS,),
        tokenizer=TokenizerSpec("bytes", offset=OFFSET),
    )
    return replace(made, **changes)


def fake_runner(graph: Callable[..., Any] | None = None, **changes: Any) -> Runner:
    bundle = Bundle(Path("fake"), manifest(**changes))
    return Runner(bundle, "fp32-ort", FakeBackend({"decode": graph or Graph()}))


def fake_model(graph: Callable[..., Any] | None = None, **changes: Any) -> Model:
    """`changes` are those of the manifest."""
    runner = fake_runner(graph, **changes)
    return Model(Bundle(runner.root, runner.manifest), runner)


def kept(buffer: Buffer, row: int, length: int) -> list[int]:
    """The ids that the append state holds in one row."""
    return [int(token) for token in buffer.host[row, :length]]


def speaking(text: str | bytes, **changes: object) -> Model:
    """A model that answers the one-token prompt [A] with this text."""
    return fake_model(Graph(says(text)), **changes)


def greedy(history: list[int], count: int) -> list[int]:
    """What a model that answers with `hashed` says, one token after the other."""
    said = list(history)
    for _ in range(count):
        said.append(int(hashed(np.array(said)).argmax()))
    return said[len(history) :]


def ids(text: str) -> list[int]:
    return [byte + OFFSET for byte in text.encode()]
