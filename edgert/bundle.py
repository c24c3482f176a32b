"""The bundle on disk: manifest, identities, files and hashes, checked before anything opens them.

    read_manifest    the manifest alone, valid in itself: schema, wiring, file list, identities
    Bundle.open      the whole directory: no stray file, sizes, graphs' own claims, hashes
    seal             what an exporter calls last: fills in the identities

docs/bundle.md is the format's reference; manifest.py knows its JSON keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgert.cache import read_stamp, write_stamp
from edgert.errors import BadBundle
from edgert.files import (
    MANIFEST,
    list_tree,
    open_regular,
    read_regular,
    sha256_stream,
    write_atomic,
)
from edgert.manifest import MAX_BYTES, manifest_from_bytes, manifest_to_json, report
from edgert.onnxfile import OnnxFacts, read_onnx_facts
from edgert.spec import FileEntry, GraphSpec, Manifest, VariantSpec
from edgert.wiring import wiring_problems

__all__ = [
    "Bundle",
    "check_wiring",
    "list_files",
    "manifest_to_json",
    "model_id",
    "read_manifest",
    "seal",
    "variant_id",
    "write_manifest",
]

CHECKS = 1  # raised when a check is added: stamps of fewer checks are no longer believed
_SETTLE_NS = 2_000_000_000  # a file changed later than this before hashing is not stamped

_FOREIGN_OPS = ("EPContext",)
"""Operators that embed or name a compiled engine: loading one is running native code."""


def model_id(manifest: Manifest) -> str:
    """The identity of the model whatever its precision, as 64 hex digits.

    SHA-256 over canonical JSON of the program, inputs, results, context, vocabulary, weights,
    tokenizer, chat template, and end and start tokens.
    Raises BadBundle if the tokenizer or chat template is not listed in `files`.
    """
    tokenizer = manifest.tokenizer
    program = asdict(manifest.program)
    later: dict[str, Any] = {}  # identities are older than these
    if manifest.program.loop is None:
        del program["loop"]
    elif manifest.program.loop.halt is None:
        del program["loop"]["halt"]
    if manifest.task is not None:
        later["task"] = manifest.task
    if manifest.tables:
        later["tables"] = {n: _hash_of(manifest, file) for n, file in manifest.tables.items()}
    return _identity(
        later
        | {
            "edgert": "model 1",
            "program": program,
            "inputs": {name: asdict(spec) for name, spec in manifest.inputs.items()},
            "results": {name: asdict(spec) for name, spec in manifest.results.items()},
            "context": manifest.context,
            "vocab_size": manifest.vocab_size,
            "weights": manifest.weights_id,
            "tokenizer": tokenizer
            and [tokenizer.kind, tokenizer.offset, _hash_of(manifest, tokenizer.file)],
            "chat_template": _hash_of(manifest, manifest.chat_template),
            "eos": manifest.eos,
            "bos": manifest.bos,
        }
    )


def variant_id(manifest: Manifest, name: str) -> str:
    """The identity of one variant, to which sessions bind, as 64 hex digits.

    SHA-256 over canonical JSON of the model's identity, precision, lowering, operator sets,
    each graph's wiring and the hashes of its files, and the states in order.
    Raises BadBundle if a file is not listed in `files`.
    """
    variant = manifest.variants[name]
    return _identity(
        {
            "edgert": "variant 1",
            "model": model_id(manifest),
            "precision": variant.precision,
            "lowering": variant.lowering,
            "opsets": variant.opsets,
            "graphs": {
                part: {
                    "file": _hash_of(manifest, graph.file),
                    "data": [_hash_of(manifest, data) for data in graph.data],
                    "inputs": graph.inputs,
                    "outputs": graph.outputs,
                }
                for part, graph in variant.graphs.items()
            },
            "states": [  # a list: their order is part of a session's layout
                [state, {**asdict(spec), "init": _init(manifest, spec.init)}]
                for state, spec in manifest.of(name).states.items()
            ],
        }
    )


def seal(manifest: Manifest) -> Manifest:
    """The manifest with `model_id` and every `variant_id` computed from its other fields.

    Raises BadBundle if it names a file that `files` does not list.
    """
    variants = {
        name: replace(variant, variant_id=variant_id(manifest, name))
        for name, variant in manifest.variants.items()
    }
    return replace(manifest, model_id=model_id(manifest), variants=variants)


def _init(manifest: Manifest, init: str) -> str | None:
    return init if init == "zeros" else _hash_of(manifest, init)


def _hash_of(manifest: Manifest, file: str | None) -> str | None:
    if file is None:
        return None
    if file not in manifest.files:
        raise BadBundle(f"{file!r} is not listed in files", where=MANIFEST)
    return manifest.files[file].sha256


def _identity(parts: dict[str, Any]) -> str:
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_wiring(manifest: Manifest, where: str = MANIFEST) -> None:
    """Raise BadBundle naming every input without a source and output without a destination."""
    problems = wiring_problems(manifest)
    if problems:
        raise report(problems, where)


def read_manifest(root: Path) -> Manifest:
    """The manifest of the bundle at `root`, valid in itself; no other file is opened.

    Raises BadBundle with every problem of schema, or of wiring, file list and identities;
    Incompatible if a newer edgert made the bundle.
    """
    return _checked(_manifest_bytes(root), str(root / MANIFEST))


def _manifest_bytes(root: Path) -> bytes:
    path = root / MANIFEST
    if not os.path.lexists(path):
        what = f"it has no {MANIFEST}" if root.is_dir() else "there is no such directory"
        raise BadBundle(
            f"not a bundle: {what}",
            where=str(root),
            do="give the directory that `edgert export` wrote",
        )
    return read_regular(path, MAX_BYTES)


def _checked(data: bytes, where: str) -> Manifest:
    manifest = manifest_from_bytes(data, where)
    problems = wiring_problems(manifest) + _unlisted(manifest)
    if not problems:
        sealed = seal(manifest)
        if sealed.model_id != manifest.model_id:
            problems.append(f"model_id: is not that of the content, {sealed.model_id}")
        for name, variant in sealed.variants.items():
            if variant.variant_id != manifest.variants[name].variant_id:
                path = f"variants.{name}.variant_id"
                problems.append(f"{path}: is not that of the content, {variant.variant_id}")
    if problems:
        raise report(problems, where)
    return manifest


def _unlisted(manifest: Manifest) -> list[str]:
    """Where the manifest names files that its list does not have."""
    named: list[tuple[str, str | None]] = [("chat_template", manifest.chat_template)]
    if manifest.tokenizer is not None:
        named.append(("tokenizer.file", manifest.tokenizer.file))
    named += [(f"reports.{i}", file) for i, file in enumerate(manifest.reports)]
    named += [
        (f"states.{name}.init", state.init)
        for name, state in manifest.states.items()
        if state.init != "zeros"
    ]
    named += [(f"tables.{name}", file) for name, file in manifest.tables.items()]
    for path, graph in _graphs(manifest):
        named.append((f"{path}.file", graph.file))
        named += [(f"{path}.data.{i}", file) for i, file in enumerate(graph.data)]
    return [
        f"{path}: {file!r} is not listed in files"
        for path, file in named
        if file is not None and file not in manifest.files
    ]


def _graphs(manifest: Manifest) -> list[tuple[str, GraphSpec]]:
    return [
        (f"variants.{name}.graphs.{part}", graph)
        for name, variant in manifest.variants.items()
        for part, graph in variant.graphs.items()
    ]


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write manifest.json, in one piece and only if `read_manifest` would accept it.

    Raises BadBundle with every problem (`seal` the manifest first), EdgertError if the file
    cannot be written.
    """
    text = json.dumps(manifest_to_json(manifest), indent=1, ensure_ascii=True) + "\n"
    data = text.encode()
    _checked(data, str(root / MANIFEST))
    write_atomic(root / MANIFEST, data)


def list_files(root: Path, progress: Callable[[int], None] | None = None) -> dict[str, FileEntry]:
    """Size and hash of every file below `root` but the manifest, sorted: an exporter's `files`.

    `progress` is called with the number of bytes of each chunk hashed.
    Raises BadBundle if something is not a regular file or has a name a bundle cannot have.
    """
    found, problems = list_tree(root)
    if problems:
        raise report(problems, str(root))
    entries = {}
    for name in sorted(found.keys() - {MANIFEST}):
        with open_regular(root, name) as file:
            entries[name] = FileEntry(sha256_stream(file, progress), found[name].st_size)
    return entries


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed its checks. `root` is its real path."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        verify: bool | Literal["stamp"] = "stamp",
        progress: Callable[[int], None] | None = None,
    ) -> Bundle:
        """Check the bundle directory at `path` and return it.

        Always: the manifest, no stray or missing file, no links, exact sizes. Then the hashes,
        and what each graph says of itself (names, operator sets, external data):
            "stamp"  unless this user's cache has a stamp that the same files passed
            True     whatever the stamp says
            False    graphs only, no hashes
        `progress` is called with the number of bytes of each chunk hashed.
        Raises BadBundle naming every problem; Incompatible if a newer edgert made the bundle.
        """
        root = Path(os.path.realpath(path))
        data = _manifest_bytes(root)
        manifest = _checked(data, str(root / MANIFEST))
        looks = _check_tree(root, manifest)
        digest = hashlib.sha256(data).hexdigest()
        stamp = read_stamp(root) if verify == "stamp" else None
        known = stamp if stamp and stamp.get("checks") == CHECKS else {}
        trusted = known.get("files") if isinstance(known.get("files"), dict) else {}
        wanted = {name: [entry.sha256, *looks[name]] for name, entry in manifest.files.items()}
        if known.get("manifest") == digest and trusted == wanted:
            return cls(root, manifest)
        if verify is not False:
            assert trusted is not None
            todo = [name for name in manifest.files if trusted.get(name) != wanted[name]]
            _check_hashes(root, manifest, todo, progress)
        _check_graphs(root, manifest)
        if verify is not False:
            _stamp(root, manifest, digest, wanted)
        return cls(root, manifest)

    def path(self, file: str) -> Path:
        """The path of a listed file, checked again: still a regular file, no link on the way.

        Raises BadBundle if it is not listed or no longer there.
        """
        if file not in self.manifest.files:
            raise BadBundle(f"{file!r} is not listed in files", where=str(self.root / MANIFEST))
        with open_regular(self.root, file):
            return self.root / file


def _look(info: os.stat_result) -> list[int]:
    # The change time cannot be set back by a program, unlike the modification time.
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]


def _check_tree(root: Path, manifest: Manifest) -> dict[str, list[int]]:
    """Compare the directory with the manifest's list; what each file looks like now."""
    found, problems = list_tree(root)
    for name in found.keys() - manifest.files.keys() - {MANIFEST}:
        problems.append(f"{name!r} is in the directory but not listed in files")
    for name, entry in manifest.files.items():
        if name not in found:
            problems.append(f"files.{name}: there is no such file")
        elif found[name].st_size != entry.bytes:
            size = found[name].st_size
            problems.append(f"files.{name}: has {size:,} bytes, {entry.bytes:,} are listed")
    if problems:
        raise report(problems, str(root))
    return {name: _look(found[name]) for name in manifest.files}


def _check_hashes(
    root: Path, manifest: Manifest, names: list[str], progress: Callable[[int], None] | None
) -> None:
    problems = []
    for name in names:
        with open_regular(root, name) as file:
            if sha256_stream(file, progress) != manifest.files[name].sha256:
                problems.append(f"files.{name}: the content does not have the listed SHA-256")
    if problems:
        raise report(problems, str(root))


def _check_graphs(root: Path, manifest: Manifest) -> None:
    problems: list[str] = []
    facts: dict[str, OnnxFacts] = {}
    for name, variant in manifest.variants.items():
        imported: set[str] = set()
        for part, graph in variant.graphs.items():
            if graph.file not in facts:
                facts[graph.file] = read_onnx_facts(root / graph.file)
            fact, path = facts[graph.file], f"variants.{name}.graphs.{part}"
            problems += _graph_problems(manifest, path, graph, fact)
            problems += _opset_problems(path, variant, fact)
            imported |= fact.opsets.keys()
        for domain in variant.opsets.keys() - imported:
            problems.append(f"variants.{name}.opsets.{domain}: no graph imports it")
    if problems:
        raise report(problems, str(root))


def _graph_problems(manifest: Manifest, path: str, graph: GraphSpec, fact: OnnxFacts) -> list[str]:
    problems = []
    for side, wired, actual in (
        ("inputs", graph.inputs, fact.inputs),
        ("outputs", graph.outputs, fact.outputs),
    ):
        for name in wired.keys() - set(actual):
            problems.append(f"{path}.{side}.{name}: the graph file has no such name")
        for name in set(actual) - wired.keys():
            problems.append(f"{path}.{side}: {ascii(name)} of the graph file is not wired")
    for op in fact.op_types:
        if op.rpartition("::")[2] in _FOREIGN_OPS:
            problems.append(f"{path}: {ascii(op)} holds a compiled engine, which is refused")
    folder = graph.file.rpartition("/")[0]
    for ref in fact.external:
        tensor, at = ascii(ref.tensor_name), ascii(ref.location)
        data = f"{folder}/{ref.location}" if folder else ref.location
        if "/" in ref.location or data not in graph.data:
            problems.append(
                f"{path}.data: tensor {tensor} is stored in {at}, "
                "which is not a listed data file beside the graph"
            )
        elif ref.offset + ref.length > manifest.files[data].bytes:
            problems.append(
                f"{path}.data: tensor {tensor} ends at byte {ref.offset + ref.length:,} of {at}, "
                f"which has {manifest.files[data].bytes:,}"
            )
    return problems


def _opset_problems(path: str, variant: VariantSpec, fact: OnnxFacts) -> list[str]:
    problems = []
    for domain, version in fact.opsets.items():
        declared = variant.opsets.get(domain)
        if declared != version:
            says = "not declared" if declared is None else f"declared as {declared}"
            problems.append(f"{path}: imports {ascii(domain)} {version}, {says} in opsets")
    return problems


def _stamp(root: Path, manifest: Manifest, digest: str, wanted: dict[str, list[Any]]) -> None:
    """Remember the verdict, unless a file changed while it was formed or just before."""
    found, _ = list_tree(root)
    settled = time.time_ns() - _SETTLE_NS
    for name, (_, *look) in wanted.items():
        if name not in found or _look(found[name]) != look or max(look[1:3]) > settled:
            return
    write_stamp(root, {"checks": CHECKS, "manifest": digest, "files": wanted})
