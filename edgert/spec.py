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

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

FORMAT_VERSION = 4
"""The newest that is read. Each bundle states the oldest that has what it needs: 2 has loops, 3
has models that refine an answer until they are done with it, 4 has variants that keep states in
another dtype than the program's, and bounds the drift of sessions that move."""

DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
SHORT = {"float32": "fp32", "float16": "fp16"}
"""What users call a dtype, where that is not its name."""
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


def resolve(shape: tuple[Axis, ...], axes: Mapping[str, int]) -> tuple[int, ...]:
    """Replace axis names by their sizes."""
    return tuple(axes[axis] if isinstance(axis, str) else axis for axis in shape)


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

    @property
    def keeps_history(self) -> bool:
        """Whether an earlier position is still there behind a step."""
        return self.kind in ("append", "counter")


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

    state_dtypes  of the states that it keeps in another dtype than the program's

    Where a program has a loop, a variant with the epilogue alone has all of it unrolled in there.
    """

    precision: str
    lowering: Lowering
    opsets: dict[str, int]
    graphs: dict[str, GraphSpec]
    variant_id: str = ""
    state_dtypes: dict[str, str] = field(default_factory=dict)


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


def endpoint_spec(
    wire: Wire,
    inputs: Mapping[str, TensorSpec],
    results: Mapping[str, TensorSpec],
    states: Mapping[str, StateSpec],
    loop: LoopSpec | None,
) -> TensorSpec:
    """dtype and shape of what an endpoint carries."""
    kind, _, name = endpoint_at(wire, 0).partition(".")
    if kind == "state":
        return TensorSpec(states[name].dtype, states[name].shape)
    if kind == "loop":
        return TensorSpec("int64", ("batch",) if name == "steps" else ())
    values, signals = (loop.values, loop.signals) if loop else ({}, {})
    declared = {"input": inputs, "result": results, "value": values, "signal": signals}
    return declared[kind][name]


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
    max_drift: float | None = None  # of a session that another variant takes over, in nats

    @property
    def solves(self) -> bool:
        """Whether it refines answers to whole inputs, instead of decoding token by token."""
        return self.program.loop is not None and not self.states

    def states_of(self, variant: str) -> dict[str, StateSpec]:
        """The states as a variant keeps them."""
        other = self.variants[variant].state_dtypes
        states = self.states.items()
        return {n: replace(s, dtype=other[n]) if n in other else s for n, s in states}

    def kv_of(self, variant: str) -> str:
        """How a variant keeps keys and values, and whatever else grows: 'fp32' or 'int8'; more
        than one with '/' between, '' where nothing grows."""
        states = self.states_of(variant).values()
        dtypes = {state.dtype for state in states if state.kind == "append"}
        return "/".join(sorted(SHORT.get(dtype, dtype) for dtype in dtypes))

    def like(self, variant: str) -> list[str]:
        """The variants that compute with the same numbers: of its precision and state dtypes."""
        numbers = (self.variants[variant].precision, self.variants[variant].state_dtypes)
        return [n for n, v in self.variants.items() if (v.precision, v.state_dtypes) == numbers]

    def tensor_of(self, wire: Wire, variant: str | None = None) -> TensorSpec:
        """dtype and shape of what a port is wired to; of a state, as a variant keeps it."""
        states = self.states if variant is None else self.states_of(variant)
        return endpoint_spec(wire, self.inputs, self.results, states, self.program.loop)

    def hashes_of(self, graph: GraphSpec) -> tuple[str, ...]:
        """SHA-256 of a graph's file, then of its data files; of those that are listed."""
        listed = (self.files.get(name) for name in (graph.file, *graph.data))
        return tuple(entry.sha256 for entry in listed if entry is not None)

    def bytes_of(self, variant: str) -> int:
        """Size of the files of a variant's graphs."""
        graphs = self.variants[variant].graphs.values()
        names = {name for graph in graphs for name in (graph.file, *graph.data)}
        return sum(entry.bytes for name, entry in self.files.items() if name in names)

    def parts(self, variant: str) -> dict[str, str | None]:
        """Part -> graph, as the variant has them: all in the epilogue, if it is unrolled."""
        program = self.program
        if program.loop and self.variants[variant].graphs.keys() == {program.epilogue}:
            return {"prologue": None, "body": None, "epilogue": program.epilogue}
        return program.parts
