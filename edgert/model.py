"""A loaded bundle: what applications hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgert.backends import lowerings, open_backend
from edgert.beside import Beside
from edgert.bundle import Bundle
from edgert.chat import MAX_TEMPLATE, encode_chat
from edgert.errors import BadBundle, BadTokenizer, Incompatible, OutOfMemory, UsageError
from edgert.files import read_regular
from edgert.generate import Generation, Stream, check_ids
from edgert.halting import AUTO, REPORT, parse_halt
from edgert.programs import solves_puzzles
from edgert.puzzles import BATCH, checked_ids, checked_rows, open_tables
from edgert.runner import Runner
from edgert.sampler import SamplingParams
from edgert.session import Prompt, Session
from edgert.spec import Manifest
from edgert.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # and as they are needed: a decoder's start does not wait for them
    from edgert.direct import Call
    from edgert.solving import Look, Solving
    from edgert.tasks import Task
    from edgert.tracing import TraceStep

MAX_REPORT = 1 << 20
PRECISIONS = ("fp32", "fp16", "int8", "int4")
"""Best accuracy first: what `precision=None` prefers on a CPU."""
KVS = ("fp32", "fp16", "int8")
"""The same for `kv=None`: how keys and values are kept."""


class Model:
    """Graphs loaded on a device, a tokenizer, and the defaults of a bundle.

    Make it with `edgert.load`; close it, or use it as a context manager.
    """

    def __init__(
        self, bundle: Bundle, runner: Runner, tokenizer: Beside[Tokenizer | None] | None = None
    ) -> None:
        """`tokenizer`: the bundle's, where its reading has begun already."""
        self.bundle = bundle
        self.runner = runner
        self.manifest: Manifest = bundle.manifest
        self.tokenizer = (tokenizer or tokenizer_beside(bundle)).result()
        self.tables = open_tables(bundle)

    @property
    def placement(self) -> str:
        """What runs where: variant, backend and version, device, threads."""
        return f"{self.runner.variant_name} · {self.runner.backend.placement}"

    def encode(self, prompt: Prompt) -> list[int]:
        """Text or token ids -> checked token ids."""
        if self.manifest.solves:
            raise solves_puzzles(str(self.bundle.root))
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError(
                    "this bundle has no tokenizer, so it cannot read text",
                    where=str(self.bundle.root),
                    do="give token ids (--ids), or export again with --tokenizer FILE",
                )
            prompt = self.tokenizer.encode(prompt)
        return check_ids(prompt, self.manifest.vocab_size, self.manifest.context)

    def sampling(
        self, params: SamplingParams | None = None, options: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """The parameters of a request: the bundle's defaults, or `params`, changed by `options`.

        Raises UsageError for what this model cannot do, too: a bias on a token beyond its
        vocabulary, stop strings without a tokenizer.
        """
        options = options or {}
        if params is None:
            chosen = SamplingParams.from_mapping(self.manifest.sampling, options)
        elif isinstance(params, SamplingParams):
            chosen = params.replace(**options) if options else params
        else:
            raise UsageError(
                f"params is {type(params).__name__}, not SamplingParams",
                do="give settings by name, such as max_tokens=40",
            )
        if chosen.halt == AUTO:
            chosen = chosen.replace(halt=_recommended(self.bundle, parse_halt))
        if chosen.halt is not None:
            self.runner.check_halt(parse_halt(chosen.halt))
        if isinstance(chosen.speculate, int):
            self.runner.check_speculation(None if chosen.halt is None else parse_halt(chosen.halt))
        beyond = [t for t in chosen.logit_bias or () if t >= self.manifest.vocab_size]
        if beyond:
            raise UsageError(
                f"logit_bias names token {beyond[0]}, the model has tokens 0 to "
                f"{self.manifest.vocab_size - 1}"
            )
        if chosen.stop and self.tokenizer is None:
            raise UsageError(
                "this bundle has no tokenizer, so it cannot look for stop strings",
                where=str(self.bundle.root),
                do="give stop_tokens instead",
            )
        return chosen

    def session(self, *, room: int = 1) -> Session:
        """A new, empty sequence, with room for so many tokens from the beginning: where more come,
        its state is copied into a larger one.

        Raises UsageError if the model is closed, CapacityExceeded beyond its context, OutOfMemory.
        """
        return Session(self, room=room)

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Generation:
        """Continue a prompt in a session of its own. Arguments as `Session.stream`."""
        with self.session() as session:
            return session.generate(prompt, params, **options)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Stream:
        """`generate`, piece by piece."""
        return self.session().stream(prompt, params, **options)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages ({'role', 'content'}) -> the ids of the prompt that the chat template makes.

        Special-token text inside a message stays text: a message cannot end its own turn.
        """
        file = self.manifest.chat_template
        if file is None or self.tokenizer is None:
            raise UsageError(
                "this bundle has no chat template",
                where=str(self.bundle.root),
                do="give the whole prompt as text instead",
            )
        bos, eos = self.manifest.bos, self.manifest.eos
        return encode_chat(
            self.tokenizer,
            _template(self.bundle.path(file)),
            messages,
            bos_token="" if bos is None else self.tokenizer.decode([bos], skip_special=False),
            eos_token="" if not eos else self.tokenizer.decode(eos[:1], skip_special=False),
        )

    @property
    def task(self) -> Task:
        """What its puzzles are. Raises UsageError of a model that says nothing about it, or names
        what this version does not know; BadBundle if they have not its size."""
        from edgert.tasks import find

        if self.manifest.task is None:
            raise UsageError(
                "this bundle does not say what its puzzles are",
                where=str(self.bundle.root),
                do="give token ids instead of text",
            )
        task = find(self.manifest.task)
        cells, vocab = self.manifest.context, self.manifest.vocab_size
        if (task.seq_len, task.vocab_size) != (cells, vocab):
            raise BadBundle(
                f"its puzzles are said to be {task.name}, of {task.seq_len} cells of "
                f"{task.vocab_size} tokens, and the model has {cells} of {vocab}",
                where=str(self.bundle.root),
                do="export it again, with the right --task",
            )
        return task

    def solving(
        self,
        puzzles: ArrayLike | str | Sequence[str],
        *,
        number: ArrayLike = 0,
        halt: str | None = None,
        batch: int = BATCH,
        deadline_ms: float | None = None,
        on_step: Callable[[Look], object] | None = None,
        logits: bool = False,
    ) -> Solving:
        """Puzzles for a model that solves: iterate for answers as they are found, or `run()`.

        puzzles  cells int [n, S] or [S]; or text as people write the model's kind of puzzle
        number   of each puzzle in the model's own table of puzzles, or one for all
        halt     full, fixed:N, trained[:THRESHOLD[:MIN[:MAX]]], or auto: as the bundle's halting
                 report recommends; None: as the model was trained
        batch    puzzles in the loop at once; answers do not depend on it
        The rest as `Solving`. Raises UsageError for what this model cannot do.
        """
        from edgert.solving import Solving

        self.check_solves()
        if isinstance(puzzles, str):
            puzzles = [puzzles]
        if isinstance(puzzles, Sequence) and puzzles and isinstance(puzzles[0], str):
            puzzles = [self.task.parse(str(text)) for text in puzzles]
        ids = checked_ids(self, puzzles)
        rows = checked_rows(self, number, len(ids))
        if halt == AUTO:
            halt = _recommended(self.bundle, self.runner.exit)
        policy = self.runner.exit(halt)
        return Solving(
            self,
            ids,
            rows,
            policy,
            batch=batch,
            deadline_ms=deadline_ms,
            on_step=on_step,
            logits=logits,
        )

    def check_solves(self) -> None:
        """Raise UsageError unless this is an open model that solves, in a stepped variant."""
        self.runner.check_open()
        if not self.manifest.solves:
            raise UsageError(
                "this model decodes text, it does not solve puzzles",
                where=str(self.bundle.root),
                do=f"give it a prompt:  edgert run {self.bundle.root} -p TEXT   (in Python: "
                "model.generate)",
            )
        if self.runner.loop is None:
            raise UsageError(
                f"variant {self.runner.variant_name} has its loop unrolled, so that no puzzle can "
                "end before another",
                where=str(self.bundle.root),
                do="load a stepped variant: leave --variant out",
            )

    def solve(self, puzzles: ArrayLike | str | Sequence[str], **options: Any) -> Any:
        """The answer to one puzzle (cells [S], or text), or a list for several. Arguments as
        `solving`."""
        found = self.solving(puzzles, **options).run()
        texts = isinstance(puzzles, Sequence) and puzzles and isinstance(puzzles[0], str)
        one = isinstance(puzzles, str) or (not texts and np.ndim(puzzles) == 1)
        return found[0] if one else found

    def logits(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Score whole sequences: ids int [B, T] -> logits float32 [B, T, V], every position.

        Raises UsageError (ids), CapacityExceeded (T beyond the context), OutOfMemory.
        """
        rows = self._sequences(ids)
        (batch, tokens), vocab = rows.shape, self.manifest.vocab_size
        try:
            out = np.empty((batch, tokens, vocab), np.float32)
        except (MemoryError, ValueError) as error:
            raise OutOfMemory(
                f"cannot allocate {4e-6 * batch * tokens * vocab:.0f} MB for the logits",
                do="score fewer or shorter sequences at once",
            ) from error
        execution = self.runner.open(tokens=tokens)
        for row, logits in zip(rows, out, strict=True):
            execution.reset()
            execution.score(row, logits)
        return out

    def _sequences(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Checked ids int64 [B, T]. Raises UsageError, CapacityExceeded."""
        try:
            array = np.asarray(ids)
        except Exception as error:  # ragged, or whatever a caller's own type can raise
            raise UsageError(f"ids must be [batch, tokens]: {error}") from error
        if array.ndim != 2 or not array.size:
            raise UsageError(
                f"ids must be [batch, tokens] and not empty, not of shape {array.shape}"
            )
        vocab, context = self.manifest.vocab_size, self.manifest.context
        return np.array([check_ids(row, vocab, context) for row in array], np.int64)

    def trace(
        self, inputs: ArrayLike, steps: int | None = None, *, number: ArrayLike = 0
    ) -> list[TraceStep]:
        """What the loop holds behind each of its first `steps` iterations (None: all of them).

        inputs  cells int [n, S] of a model that solves; ids int [B, T] of one that decodes
        number  of puzzles in the model's own table, as in `solving`
        Nothing ends early. Raises UsageError, CapacityExceeded, OutOfMemory.
        """
        from edgert.tracing import trace_puzzles, trace_tokens

        if self.manifest.solves:
            return trace_puzzles(self, inputs, number, steps)
        return trace_tokens(self, self._sequences(inputs), steps)

    def bind(self, part: str, inputs: Mapping[str, object], outputs: Mapping[str, object]) -> Call:
        """One graph of the model over arrays of the caller's, which are read and written in place:
        numpy arrays on a CPU, on a device any with `__cuda_array_interface__`.

        part     prologue, body or epilogue
        inputs, outputs  an array for each of the graph's, by the names that `edgert inspect` lists
        Raises UsageError (a name, type or shape that is not the graph's), Incompatible (an array
        of the other memory, or a shape that no engine takes).
        """
        from edgert.direct import Call

        return Call(self.runner, part, inputs, outputs)

    def close(self) -> None:
        """Let go of the graphs. Its sessions raise UsageError from then on; `tokens` stay."""
        self.runner.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load(
    path: str | os.PathLike[str],
    device: str = "auto",
    *,
    precision: str | None = None,
    kv: str | None = None,
    lowering: str | None = None,
    variant: str | None = None,
    threads: int = 0,
    prepack: bool = True,
    verify: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Model:
    """Open a bundle and load its graphs.

    device     'auto' (the CPU), 'cpu', 'cuda' (ONNX Runtime's provider) or 'tensorrt' (engines that
               `edgert build` has made on this device)
    precision  one that the bundle holds ('fp32'); None takes the best one
    kv         how keys and values are kept, 'fp32' or 'int8'; None takes the most accurate
    lowering   'ort', 'portable' or 'modern'; None takes the fastest the device runs
    variant    the name of one that the bundle holds, such as 'fp32-ort-unrolled'
    threads    0: one per physical core (a single one for a model of a few megabytes), or the
               pool that the application has made for all its ONNX Runtime sessions
    prepack    False maps the weights instead of copying them into ONNX Runtime's own layout:
               less memory and a load in no time, for slower steps
    verify     hash every file again, even if this bundle was verified before
    progress   called with the size of each chunk hashed, in bytes

    Raises BadBundle (broken or tampered), UnsupportedModel (sound, and not for this version),
    Incompatible (no such device or variant, or a number of threads where the application has
    one pool for all), MissingDependency.
    """
    bundle = Bundle.open(Path(path), True if verify else "stamp", progress)
    tokenizer = tokenizer_beside(bundle)
    backend = open_backend(device, threads=threads, prepack=prepack)
    try:
        asked = precision, lowering, variant, kv
        chosen = choose_variant(bundle.manifest, device, *asked, ready=backend.ready)
        return Model(bundle, Runner(bundle, chosen, backend), tokenizer)
    except BaseException:
        backend.close()
        raise


def tokenizer_beside(bundle: Bundle) -> Beside[Tokenizer | None]:
    """A bundle's tokenizer, read while its graphs are loaded: both take long, and ONNX Runtime
    packs weights on one core and without Python's lock."""

    def read() -> Tokenizer | None:
        spec = bundle.manifest.tokenizer
        if spec is None:
            return None
        return load_tokenizer(spec, bundle.path(spec.file) if spec.file else None)

    return Beside(read)


def choose_variant(
    manifest: Manifest,
    device: str,
    precision: str | None = None,
    lowering: str | None = None,
    variant: str | None = None,
    kv: str | None = None,
    *,
    ready: Callable[[str], bool] = lambda variant_id: True,
) -> str:
    """The best variant for a device that fits what was asked for, or Incompatible saying why.

    ready  of a variant's id: whether what it needs on the device is at hand. Those come first
    A loop that is unrolled cannot end early: such a variant is taken only by its name, or where
    there is no other.
    """
    usable = lowerings(device)
    unrolled = {n for n in manifest.variants if manifest.parts(n) != manifest.program.parts}
    fitting = [
        (
            not ready(v.variant_id),
            name in unrolled,
            _rank(PRECISIONS, v.precision),
            _rank(KVS, manifest.kv_of(name)),
            usable.index(v.lowering),
            name,
        )
        for name, v in manifest.variants.items()
        if v.lowering in usable
        and precision in (None, v.precision)
        and kv in (None, manifest.kv_of(name))
        and lowering in (None, v.lowering)
        and variant in (None, name)
    ]
    if not fitting:
        told = (precision, kv and f"with {kv} keys and values", lowering, variant)
        wanted = " ".join(filter(None, told)) or f"for device {device}"
        raise Incompatible(
            f"this bundle has no variant {wanted}",
            do=f"choose from what it has: {', '.join(manifest.variants)}",
        )
    return min(fitting)[-1]


def variant_at_hand(manifest: Manifest, device: str, *asked: str | None) -> str:
    """The variant that `load` takes, for whoever must know it before: precision, lowering, variant
    and kv as `choose_variant` has them, and what the device has at hand counts."""
    with closing(open_backend(device)) as backend:
        return choose_variant(manifest, device, *asked, ready=backend.ready)


def _rank(known: Sequence[str], name: str) -> int:
    """Its place among the known ones; one that this version does not know comes last."""
    return known.index(name) if name in known else len(known)


def _template(path: Path) -> str:
    try:
        return read_regular(path, 4 * MAX_TEMPLATE).decode("utf-8")  # four bytes a character
    except UnicodeDecodeError as error:
        raise BadTokenizer(
            f"the chat template is not UTF-8: {error}",
            where=str(path),
            do="export the bundle with another chat template",
        ) from error


def _recommended(bundle: Bundle, parse: Callable[[str], object]) -> str:
    """The halting policy that the bundle's report recommends, as `parse` reads it."""
    if REPORT not in bundle.manifest.reports:
        raise UsageError(
            "this bundle has no halting report that could recommend a policy",
            where=str(bundle.root),
            do=f"make one:  edgert halt {bundle.root} --data FILE",
        )
    try:
        found = json.loads(read_regular(bundle.path(REPORT), MAX_REPORT))["recommended"]
        return str(parse(found.strip()))  # refuses what is no text, too
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UsageError) as error:
        raise BadBundle(
            f"the halting report recommends no policy: {error}",
            where=str(bundle.root / REPORT),
            do="make it again with `edgert halt`",
        ) from error
