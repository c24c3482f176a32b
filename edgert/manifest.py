"""manifest.json <-> Manifest: the only file that knows the JSON keys. docs/bundle.md explains them.

Reading is strict: every key is required, an unknown one is an error, and all problems of a file
are reported at once, each with its JSON path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from edgert.errors import BadBundle, Incompatible
from edgert.files import MANIFEST, safe_relative
from edgert.spec import (
    DTYPES,
    FILLS,
    FORMAT_VERSION,
    LOWERINGS,
    STATE_KINDS,
    Axis,
    FileEntry,
    GraphSpec,
    HaltSpec,
    LoopSpec,
    Manifest,
    ProgramSpec,
    StateSpec,
    TensorSpec,
    TokenizerSpec,
    VariantSpec,
    Wire,
)

MAX_BYTES = 4 << 20
MAX_NESTING = 16
MAX_SIZE = (1 << 31) - 1  # a dimension, a vocabulary, a context, an operator set version
MAX_COUNT = (1 << 53) - 1  # parameters, bytes of a file: exact in every JSON reader
MAX_PROBLEMS = 50  # shown; the rest is counted

SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*")
HEX = re.compile(r"[0-9a-f]{64}")
KINDS = ("input", "loop", "state", "value", "signal", "result")
MAX_ITERATIONS = 1024

SINCE = {"loop": 2, "halt": 3, "task": 3, "tables": 3, "append_dtype": 4}
"""Keys that the first version of the format did not have, and the one that has them."""

_T = TypeVar("_T")
_ABSENT: Any = object()
"""Stands for a key that is missing: reported once, by the object that lacks it."""


def manifest_from_bytes(data: bytes, where: str) -> Manifest:
    """Parse and validate the content of a manifest.json, field by field.

    `where` names the file in messages. Wiring, identities and files on disk are checked by
    `bundle.read_manifest` and `Bundle.open`.
    Raises Incompatible for a newer format_version, BadBundle naming every problem otherwise.
    """
    if len(data) > MAX_BYTES:
        raise BadBundle(f"the manifest has {len(data):,} bytes, {MAX_BYTES:,} allowed", where=where)
    value = _load(data, where)
    if not isinstance(value, dict):
        raise BadBundle("the manifest is not a JSON object", where=where)
    version = value.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        problem = f"format_version: {_show(version)} is not a format version"
        raise report([problem if "format_version" in value else "format_version: missing"], where)
    if version > FORMAT_VERSION:
        raise Incompatible(
            f"the bundle was made by a newer edgert: format version {version}, "
            f"this one reads up to {FORMAT_VERSION}",
            where=where,
            do="pip install --upgrade edgert, or export the bundle with this version",
        )
    reader = _Reader(version)
    reader.survey("", value, 0)
    manifest = None if reader.problems else reader.manifest(value)
    if reader.problems or manifest is None:
        raise report(reader.problems, where)
    return manifest


def report(problems: Collection[str], where: str) -> BadBundle:
    """One error for all problems ('json.path: what is wrong'), sorted."""
    listed = sorted(problems)
    lines = listed[:MAX_PROBLEMS]
    if len(listed) > MAX_PROBLEMS:
        lines.append(f"and {len(listed) - MAX_PROBLEMS} more")
    count = "1 problem" if len(listed) == 1 else f"{len(listed)} problems"
    return BadBundle(
        "\n    ".join([f"the bundle has {count}", *lines]),
        where=where,
        do="export the bundle again, or copy it again from its source",
    )


def _load(data: bytes, where: str) -> Any:
    def refuse(what: str) -> NoReturn:
        raise ValueError(what)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                refuse(f"the key {_show(key)} is given twice")
            found[key] = value
        return found

    def integer(digits: str) -> int:
        # Long ones take quadratic time to convert.
        return int(digits) if len(digits) <= 20 else refuse(f"a number has {len(digits)} digits")

    def real(digits: str) -> float:
        value = float(digits)
        return value if abs(value) != float("inf") else refuse(f"{digits[:20]} is too large")

    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=pairs,
            parse_int=integer,
            parse_float=real,
            parse_constant=lambda name: refuse(f"{name} is not JSON"),
        )
    except RecursionError:
        what = f"it is nested more than {MAX_NESTING} deep"
    except ValueError as error:
        what = str(error)
    raise BadBundle(
        f"{MANIFEST} is not sound JSON: {what}",
        where=where,
        do="export the bundle again, or copy it again from its source",
    )


def _show(value: object) -> str:
    """A value for a message: short, ASCII, no terminal control sequences."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_space(c: str) -> bool:
    """Line feed, tab, and Unicode's blanks; not the control characters that count as space."""
    return c in "\n\t" or (c.isspace() and c >= "\xa0")


class _Reader:
    """Collects the problems of one manifest while its values are turned into specs.

    Every method takes the JSON path and the value found there, notes what is wrong, and returns
    something of the right type, so that reading goes on and finds the next problem.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self.problems: list[str] = []

    def bad(self, path: str, what: str) -> None:
        self.problems.append(f"{path}: {what}")

    def survey(self, path: str, value: object, depth: int) -> None:
        """Bounds that hold everywhere, also in free-form parts: nesting, control characters."""
        if depth > MAX_NESTING:
            self.bad(path[:80], f"nested more than {MAX_NESTING} deep")
        elif isinstance(value, dict):
            for key, item in value.items():
                plain = key if len(key) <= 128 and key.isascii() and key.isprintable() else None
                if plain is None:
                    self.bad(path or "the manifest", f"{_show(key)} is not a usable key")
                else:
                    self.survey(f"{path}.{plain}" if path else plain, item, depth + 1)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                self.survey(f"{path}.{i}", item, depth + 1)
        elif isinstance(value, str):
            odd = next((c for c in value if not (c.isprintable() or _is_space(c))), None)
            if odd is not None:
                self.bad(path, f"has the character {ascii(odd)}, which is not printable")

    def record(self, path: str, value: object, keys: Collection[str]) -> dict[str, Any]:
        """An object with exactly these keys; what is missing reads as _ABSENT."""
        prefix = path + "." if path else ""
        if not isinstance(value, dict):
            if value is not _ABSENT:
                self.bad(path, f"{_show(value)} is not an object")
            return dict.fromkeys(keys, _ABSENT)
        for key in value:
            if key not in keys:
                self.bad(prefix + key, "unknown key")
        for key in keys:
            if key not in value:
                self.bad(prefix + key, "missing")
        return {key: value.get(key, _ABSENT) for key in keys}

    def table(
        self,
        path: str,
        value: object,
        names: re.Pattern[str] | None,
        most: int,
        read: Callable[[str, Any], _T],
        *,
        least: int = 0,
    ) -> dict[str, _T]:
        """An object whose keys are names; each value is read by `read(path, value)`."""
        if value is _ABSENT:
            return {}
        if not isinstance(value, dict):
            self.bad(path, f"{_show(value)} is not an object")
            return {}
        if not least <= len(value) <= most:
            self.bad(path, f"has {len(value)} entries, {least} to {most} are allowed")
            return {}
        for key in value:
            if names is not None and (len(key) > 64 or not names.fullmatch(key)):
                self.bad(path, f"{_show(key)} is not a usable name")
        return {key: read(f"{path}.{key}", item) for key, item in value.items()}

    def array(
        self, path: str, value: object, most: int, read: Callable[[str, Any], _T]
    ) -> tuple[_T, ...]:
        if value is _ABSENT:
            return ()
        if not isinstance(value, list) or len(value) > most:
            self.bad(path, f"{_show(value)} is not a list of at most {most}")
            return ()
        return tuple(read(f"{path}.{i}", item) for i, item in enumerate(value))

    def integer(self, path: str, value: object, least: int, most: int) -> int:
        if value is _ABSENT:
            return least
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.bad(path, f"{_show(value)} is not an integer from {least} to {most}")
            return least
        return value

    def choice(self, path: str, value: object, allowed: Collection[str]) -> Any:
        if value is not _ABSENT and (not isinstance(value, str) or value not in allowed):
            self.bad(path, f"{_show(value)} is not one of {', '.join(allowed)}")
        return value

    def match(self, path: str, value: object, pattern: re.Pattern[str], what: str) -> str:
        if value is _ABSENT:
            return ""
        if not isinstance(value, str) or len(value) > 64 or not pattern.fullmatch(value):
            self.bad(path, f"{_show(value)} is not {what}")
            return ""
        return value

    def line(self, path: str, value: object, most: int) -> str:
        if value is _ABSENT:
            return ""
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            self.bad(path, f"{_show(value)} is not one line of at most {most} characters")
            return ""
        return value

    def file(self, path: str, value: object) -> str:
        if value is _ABSENT:
            return ""
        if not isinstance(value, str):
            self.bad(path, f"{_show(value)} is not a file name")
            return ""
        try:
            safe_relative(value)
        except BadBundle as error:
            self.bad(path, error.what)
        return value

    def optional(self, path: str, value: Any, read: Callable[[str, Any], _T]) -> _T | None:
        return None if value is None else read(path, value)

    def axis(self, path: str, value: object) -> Axis:
        if isinstance(value, str):
            return self.match(path, value, IDENTIFIER, "the name of an axis")
        return self.integer(path, value, 1, MAX_SIZE)

    def tensor(self, path: str, value: object) -> TensorSpec:
        got = self.record(path, value, _keys(TensorSpec))
        return TensorSpec(
            dtype=self.choice(f"{path}.dtype", got["dtype"], DTYPES),
            shape=self.array(f"{path}.shape", got["shape"], 8, self.axis),
        )

    def state(self, path: str, value: object) -> StateSpec:
        got = self.record(path, value, _keys(StateSpec))
        shape = self.array(f"{path}.shape", got["shape"], 8, self.axis)
        kind = self.choice(f"{path}.kind", got["kind"], STATE_KINDS)
        axis, counter = got["axis"], got["counter"]
        if axis is not _ABSENT and axis is not None:
            if kind not in ("append", "ring", _ABSENT):
                self.bad(f"{path}.axis", f"a state of kind {_show(kind)} has no axis")
            elif not isinstance(axis, str) or shape.count(axis) != 1:
                self.bad(f"{path}.axis", f"{_show(axis)} is not one axis of the shape")
        if counter is not _ABSENT and counter is not None:
            counter = self.match(f"{path}.counter", counter, DOTTED, "the name of a state")
            if kind not in ("append", _ABSENT):
                self.bad(f"{path}.counter", f"a state of kind {_show(kind)} has no counter")
        if kind == "append":
            for key, item in (("axis", axis), ("counter", counter)):
                if item is None:
                    self.bad(f"{path}.{key}", "an append state needs it")
        init = got["init"]
        if init not in ("zeros", _ABSENT) and (
            not self.file(f"{path}.init", init).endswith(".npy") or kind == "counter"
        ):
            allowed = "'zeros'" if kind == "counter" else "'zeros' or a .npy file"
            self.bad(f"{path}.init", f"{_show(init)} is not {allowed}")
        dtype = self.choice(f"{path}.dtype", got["dtype"], DTYPES)
        if kind == "counter" and (dtype, shape) != ("int64", ("batch",)):
            self.bad(path, "a counter is int64 [batch]")
        return StateSpec(kind, dtype, shape, axis, counter, init)

    def endpoint(self, path: str, value: object) -> str:
        if value is _ABSENT:
            return ""
        kind, _, name = value.partition(".") if isinstance(value, str) else ("", "", "")
        if kind not in KINDS or len(name) > 64 or not DOTTED.fullmatch(name):
            self.bad(path, f"{_show(value)} is not an endpoint such as 'state.k.0'")
        return str(value)

    def wire(self, path: str, value: object) -> Wire:
        if not isinstance(value, list):
            return self.endpoint(path, value)
        if not value:
            self.bad(path, "an empty list is no endpoint")
        return self.array(path, value, MAX_ITERATIONS, self.endpoint)

    def graph(self, path: str, value: object) -> GraphSpec:
        got = self.record(path, value, _keys(GraphSpec))
        return GraphSpec(
            file=self.file(f"{path}.file", got["file"]),
            data=self.array(f"{path}.data", got["data"], 16, self.file),
            inputs=self.table(f"{path}.inputs", got["inputs"], DOTTED, 8192, self.wire),
            outputs=self.table(f"{path}.outputs", got["outputs"], DOTTED, 8192, self.wire, least=1),
        )

    def variant(self, path: str, value: object) -> VariantSpec:
        got = self.record(path, value, _keys(VariantSpec, self.version))
        return VariantSpec(
            precision=self.match(f"{path}.precision", got["precision"], SLUG, "a precision"),
            lowering=self.choice(f"{path}.lowering", got["lowering"], LOWERINGS),
            opsets=self.table(
                f"{path}.opsets",
                got["opsets"],
                SLUG,
                16,
                lambda at, version: self.integer(at, version, 1, MAX_SIZE),
                least=1,
            ),
            graphs=self.table(f"{path}.graphs", got["graphs"], IDENTIFIER, 3, self.graph, least=1),
            variant_id=self.match(f"{path}.variant_id", got["variant_id"], HEX, "a SHA-256"),
            append_dtype=self.optional(
                f"{path}.append_dtype",
                got.get("append_dtype"),
                lambda at, dtype: self.choice(at, dtype, DTYPES),
            ),
        )

    def program(self, path: str, value: object) -> ProgramSpec:
        got = self.record(path, value, _keys(ProgramSpec, self.version))

        def graph(at: str, name: object) -> str:
            return self.match(at, name, IDENTIFIER, "the name of a graph")

        return ProgramSpec(
            epilogue=graph(f"{path}.epilogue", got["epilogue"]),
            prologue=self.optional(f"{path}.prologue", got["prologue"], graph),
            body=self.optional(f"{path}.body", got["body"], graph),
            loop=self.optional(f"{path}.loop", got.get("loop"), self.loop),
        )

    def loop(self, path: str, value: object) -> LoopSpec:
        got = self.record(path, value, _keys(LoopSpec, self.version))
        return LoopSpec(
            iterations=self.integer(f"{path}.iterations", got["iterations"], 1, MAX_ITERATIONS),
            values=self.table(f"{path}.values", got["values"], DOTTED, 64, self.tensor),
            signals=self.table(f"{path}.signals", got["signals"], DOTTED, 64, self.tensor),
            fill=self.choice(f"{path}.fill", got["fill"], FILLS),
            halt=self.optional(f"{path}.halt", got.get("halt"), self.halt),
        )

    def halt(self, path: str, value: object) -> HaltSpec:
        got = self.record(path, value, _keys(HaltSpec))
        threshold, cumulative = got["threshold"], got["cumulative"]
        if threshold is not _ABSENT and type(threshold) not in (int, float):
            self.bad(f"{path}.threshold", f"{_show(threshold)} is not a number")
            threshold = 0.0
        if cumulative is not _ABSENT and not isinstance(cumulative, bool):
            self.bad(f"{path}.cumulative", f"{_show(cumulative)} is not true or false")
        return HaltSpec(
            signal=self.match(f"{path}.signal", got["signal"], DOTTED, "the name of a signal"),
            threshold=0.0 if threshold is _ABSENT else float(threshold),
            least=self.integer(f"{path}.least", got["least"], 1, MAX_ITERATIONS),
            cumulative=cumulative is True,
        )

    def tokenizer(self, path: str, value: object) -> TokenizerSpec:
        got = self.record(path, value, _keys(TokenizerSpec))
        kind = self.choice(f"{path}.kind", got["kind"], ("file", "bytes"))
        offset = self.integer(f"{path}.offset", got["offset"], 0, MAX_SIZE)
        file = self.optional(f"{path}.file", got["file"], self.file)
        if kind == "file" and got["file"] is None:
            self.bad(f"{path}.file", "a tokenizer of kind 'file' needs it")
        if kind == "file" and offset != 0:
            self.bad(f"{path}.offset", "a tokenizer of kind 'file' has offset 0")
        if kind == "bytes" and file:
            self.bad(f"{path}.file", "a tokenizer of kind 'bytes' has no file")
        return TokenizerSpec(kind, file, offset)

    def setting(self, path: str, value: object) -> Any:
        """A sampling default: a number, text, true or false, null, or a list of those."""
        items = value if isinstance(value, list) else [value]
        if len(items) > 64 or any(isinstance(item, dict | list) for item in items):
            self.bad(path, f"{_show(value)} is not a plain value or a short list of them")
        return value

    def entry(self, path: str, value: object) -> FileEntry:
        got = self.record(path, value, _keys(FileEntry))
        return FileEntry(
            sha256=self.match(f"{path}.sha256", got["sha256"], HEX, "a SHA-256"),
            bytes=self.integer(f"{path}.bytes", got["bytes"], 0, MAX_COUNT),
        )

    def manifest(self, value: object) -> Manifest:
        got = self.record("", value, _keys(Manifest, self.version))
        files = self.table("files", got["files"], None, 1024, self.entry)
        for name in files:
            self.file(f"files.{name}", name)
        if MANIFEST in files:
            self.bad(f"files.{MANIFEST}", "the manifest does not list itself")
        vocab_size = self.integer("vocab_size", got["vocab_size"], 0, MAX_SIZE)

        def token(at: str, item: object) -> int:
            return self.integer(at, item, 0, vocab_size - 1)

        def anything(at: str, item: object) -> Any:
            return item

        return Manifest(
            format_version=got["format_version"],
            name=self.match("name", got["name"], SLUG, "a name of letters, digits, . _ -"),
            summary=self.line("summary", got["summary"], 500),
            model_id=self.match("model_id", got["model_id"], HEX, "a SHA-256"),
            weights_id=self.match("weights_id", got["weights_id"], HEX, "a SHA-256"),
            parameters=self.integer("parameters", got["parameters"], 0, MAX_COUNT),
            vocab_size=vocab_size,
            context=self.integer("context", got["context"], 0, MAX_SIZE),
            program=self.program("program", got["program"]),
            inputs=self.table("inputs", got["inputs"], DOTTED, 64, self.tensor),
            results=self.table("results", got["results"], DOTTED, 64, self.tensor, least=1),
            states=self.table("states", got["states"], DOTTED, 4096, self.state),
            variants=self.table("variants", got["variants"], SLUG, 32, self.variant, least=1),
            eos=self.array("eos", got["eos"], 64, token),
            bos=self.optional("bos", got["bos"], token),
            tokenizer=self.optional("tokenizer", got["tokenizer"], self.tokenizer),
            chat_template=self.optional("chat_template", got["chat_template"], self.file),
            sampling=self.table("sampling", got["sampling"], IDENTIFIER, 64, self.setting),
            provenance=self.table("provenance", got["provenance"], IDENTIFIER, 64, anything),
            requires=self.table(
                "requires", got["requires"], SLUG, 16, lambda at, v: self.line(at, v, 80)
            ),
            reports=self.array("reports", got["reports"], 64, self.file),
            files=files,
            task=self.optional(
                "task", got.get("task"), lambda at, v: self.match(at, v, SLUG, "the name of a task")
            ),
            tables=self.table("tables", got.get("tables", _ABSENT), DOTTED, 64, self.rows),
        )

    def rows(self, path: str, value: object) -> str:
        name = self.file(path, value)
        if value is not _ABSENT and not name.endswith(".npy"):
            self.bad(path, f"{_show(value)} is not a .npy file")
        return name


def _keys(spec: type, version: int = FORMAT_VERSION) -> tuple[str, ...]:
    names = (field.name for field in fields(spec))
    return tuple(name for name in names if SINCE.get(name, 1) <= version)


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON values, in the order in which the file is written."""
    first = ("format_version", "name", "summary", "model_id")
    version = manifest.format_version
    keys = [*first, *(key for key in _keys(Manifest, version) if key not in first)]
    return {key: _plain(getattr(manifest, key), version) for key in keys}


def _plain(value: Any, version: int) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item, version) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, version) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(getattr(value, key), version) for key in _keys(type(value), version)}
    return value
