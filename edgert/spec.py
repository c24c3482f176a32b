"""What a bundle declares, as frozen values: tensors, states, graphs, variants, the program.

A model is a small program of graphs over named state: prologue, then body until halt, then
epilogue. These classes say it; `bundle.py` reads and writes them; the runner executes them.

Endpoints name what a graph is wired to, as `<kind>.<name>`:
    input.ids      written by the host before a step
    state.k.0      outlives the step
    value.h        produced by one graph, consumed by a later one in the same step
    result.logits  read by the host after a step
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FORMAT_VERSION = 1

DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
StateKind = Literal["append", "carry", "ring", "counter"]
STATE_KINDS: tuple[StateKind, ...] = ("append", "carry", "ring", "counter")
Lowering = Literal["ort", "portable", "modern"]
LOWERINGS: tuple[Lowering, ...] = ("ort", "portable", "modern")

Axis = int | str
"""A size, or the name of an axis that is bound when a session opens ('batch', 'capacity') or at
each step ('tokens', 'select')."""


@dataclass(frozen=True)
class TensorSpec:
    dtype: str
    shape: tuple[Axis, ...]


DECODER_INPUTS = {
    "ids": TensorSpec("int64", ("batch", "tokens")),
    "select": TensorSpec("int64", ("batch", "select")),
}
"""What the decode loop writes: the tokens of a step, and the positions whose results it reads."""


def decoder_results(vocab_size: int) -> dict[str, TensorSpec]:
    """What the decode loop reads: logits at the selected positions, and their argmax."""
    return {
        "logits": TensorSpec("float32", ("batch", "select", vocab_size)),
        "token": TensorSpec("int64", ("batch", "select")),
    }


@dataclass(frozen=True)
class StateSpec:
    """A named array that outlives a step.

    append   grows along `axis` up to a capacity; `counter` names the state that counts its rows
    carry    replaced as a whole by each step
    ring     a fixed window along `axis`
    counter  rows filled so far, int64 [batch]; the runtime advances it, a graph only reads it
    """

    kind: StateKind
    dtype: str
    shape: tuple[Axis, ...]
    axis: str | None = None
    counter: str | None = None
    init: str = "zeros"  # or the path of a .npy file in the bundle


@dataclass(frozen=True)
class GraphSpec:
    """One exported computation: its file, the weight files it maps, and its wiring."""

    file: str
    data: tuple[str, ...]
    inputs: dict[str, str]  # graph input name -> endpoint it is read from
    outputs: dict[str, str]  # graph output name -> endpoint it is written to


@dataclass(frozen=True)
class VariantSpec:
    """The same program in one precision and one lowering."""

    precision: str
    lowering: Lowering
    opsets: dict[str, int]
    graphs: dict[str, GraphSpec]
    variant_id: str = ""


@dataclass(frozen=True)
class ProgramSpec:
    """Which graph plays which part; a part that the model lacks is None."""

    epilogue: str
    prologue: str | None = None
    body: str | None = None


@dataclass(frozen=True)
class TokenizerSpec:
    """file: a Hugging Face `tokenizer.json`. bytes: id = byte + `offset`, no vocabulary file."""

    kind: Literal["file", "bytes"]
    file: str | None = None
    offset: int = 0


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The whole of `manifest.json`. docs/bundle.md is its reference."""

    name: str
    summary: str
    model_id: str
    weights_id: str
    parameters: int
    vocab_size: int
    context: int
    program: ProgramSpec
    inputs: dict[str, TensorSpec]
    results: dict[str, TensorSpec]
    states: dict[str, StateSpec]
    variants: dict[str, VariantSpec]
    eos: tuple[int, ...] = ()
    bos: int | None = None
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, str] = field(default_factory=dict)
    reports: tuple[str, ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
