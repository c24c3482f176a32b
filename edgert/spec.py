"""What a bundle declares, as frozen values: tensors, states, graphs, variants, the program.

A model is a small program of graphs over named state: prologue, then body until halt, then
epilogue. These classes say it; `bundle.py` reads and writes them; the runner executes them.

Endpoints name what a graph is wired to, as `<kind>.<name>`:
    input.ids       written by the host before a step
    loop.iteration  which iteration of the body this is, int64 [], from 0; written by the host
    loop.steps      how many iterations each row has behind it, int64 [batch]; the same where rows
                    come and go by themselves
    state.k.0       outlives the step
    value.h         handed from graph to graph within a step; one that the body reads and writes
                    goes round the loop
    signal.change   read by the host after each iteration of the body
    result.logits   read by the host after a step
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

FORMAT_VERSION = 4
"""The newest that is read. Each bundle states the oldest that has what it needs: 2 has loops, 3
has models that refine an answer until they are done with it, 4 has variants whose keys and values
are of fewer bits."""

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


Wire = str | tuple[str, ...]
"""An endpoint; in the body, or one for each iteration: its states differ from one to the next."""


def endpoints(wire: Wire) -> tuple[str, ...]:
    return (wire,) if isinstance(wire, str) else wire


def endpoint_at(wire: Wire, iteration: int) -> str:
    return wire if isinstance(wire, str) else wire[iteration]


@dataclass(frozen=True)
class GraphSpec:
    """One exported computation: its file, the weight files it maps, and its wiring."""

    file: str
    data: tuple[str, ...]
    inputs: dict[str, Wire]  # graph input name -> endpoint it is read from
    outputs: dict[str, Wire]  # graph output name -> endpoint it is written to


@dataclass(frozen=True)
class VariantSpec:
    """The same program in one precision and one lowering.

    Where a program has a loop, a variant with the epilogue alone has all of it unrolled in there.

    append_dtype  of its append states, where that is not the declared one
    """

    precision: str
    lowering: Lowering
    opsets: dict[str, int]
    graphs: dict[str, GraphSpec]
    variant_id: str = ""
    append_dtype: str | None = None


Fill = Literal["copy", "none"]
FILLS: tuple[Fill, ...] = ("copy", "none")


@dataclass(frozen=True)
class HaltSpec:
    """The rule by which the model was trained to end the loop of a row: behind iteration `least`,
    or a later one, in which `signal` is above `threshold`.

    cumulative  it is the sum of the signal over the row's iterations that is compared
    """

    signal: str
    threshold: float
    least: int
    cumulative: bool


@dataclass(frozen=True)
class LoopSpec:
    """How the body repeats.

    iterations  of the body, where nothing ends it earlier: what the model was trained with
    values      tensors handed from graph to graph: within a step of a decoder [batch, tokens, ...],
                while a puzzle is being solved [batch, ...]
    signals     float32 [batch, tokens] or [batch], by which the host may end the loop
    fill        what later tokens find at iterations that an earlier token skipped: `copy`, the
                rows of the last one it computed; `none`, nothing, so that none may be skipped
    halt        the model's own rule, of a model that has one
    """

    iterations: int
    values: dict[str, TensorSpec]
    signals: dict[str, TensorSpec]
    fill: Fill
    halt: HaltSpec | None = None


@dataclass(frozen=True)
class ProgramSpec:
    """Which graph plays which part; a part that the model lacks is None."""

    epilogue: str
    prologue: str | None = None
    body: str | None = None
    loop: LoopSpec | None = None

    @property
    def parts(self) -> dict[str, str | None]:
        """Part -> graph, in the order in which a step runs them."""
        return {"prologue": self.prologue, "body": self.body, "epilogue": self.epilogue}


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
    format_version: int = 1
    task: str | None = None  # what its puzzles are, such as 'sudoku-4x4'
    tables: dict[str, str] = field(default_factory=dict)  # input -> .npy file with its rows

    @property
    def solves(self) -> bool:
        """Whether it refines answers to whole inputs, instead of decoding token by token."""
        return self.program.loop is not None and not self.states

    def bytes_of(self, variant: str) -> int:
        """Size of the files of a variant's graphs."""
        graphs = self.variants[variant].graphs.values()
        names = {name for graph in graphs for name in (graph.file, *graph.data)}
        return sum(entry.bytes for name, entry in self.files.items() if name in names)

    def of(self, variant: str) -> Manifest:
        """The same manifest, its append states in the dtype that a variant keeps them in."""
        dtype = self.variants[variant].append_dtype
        if dtype is None:
            return self
        states = {
            name: replace(spec, dtype=dtype) if spec.kind == "append" else spec
            for name, spec in self.states.items()
        }
        return replace(self, states=states)

    def parts(self, variant: str) -> dict[str, str | None]:
        """Part -> graph, as the variant has them: all in the epilogue, if it is unrolled."""
        program = self.program
        if program.loop and self.variants[variant].graphs.keys() == {program.epilogue}:
            return {"prologue": None, "body": None, "epilogue": program.epilogue}
        return program.parts
