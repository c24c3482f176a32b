"""The manifest as a file: each field, each rule and every damage is refused in its own words."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import DATA, DECODE, GRAPH, tiny_bundle, tiny_manifest

from edgert.bundle import manifest_to_json, read_manifest, seal, write_manifest
from edgert.errors import BadBundle, Incompatible
from edgert.spec import FORMAT_VERSION, FileEntry


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A tiny bundle that no test changes."""
    return tiny_bundle(tmp_path_factory.mktemp("shared"))


def rewrite(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON without any check."""
    path = root / "manifest.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def refusal(root: Path) -> str:
    with pytest.raises(BadBundle) as caught:
        read_manifest(root)
    assert caught.value.where == str(root / "manifest.json")
    return caught.value.what


def parent_of(value: Any, path: list[str | int]) -> Any:
    for step in path[:-1]:
        value = value[step]
    return value


FREE = ("provenance", "sampling")  # free-form parts: any key, any plain value


def reference() -> dict[str, Any]:
    """The tiny manifest's JSON with hashes made up: what the mutations start from."""
    entry = FileEntry("cd" * 32, 5)
    names = (GRAPH, DATA, "chat_template.jinja", "reports/parity.json")
    return manifest_to_json(seal(replace(tiny_manifest(), files=dict.fromkeys(names, entry))))


def paths(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON value, except inside the free-form parts."""
    if at:
        yield at
    if isinstance(value, dict | list) and at[:1] not in [(name,) for name in FREE]:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*at, key))


ALL = list(paths(reference()))
NAMED_BY_USER = (  # tables whose keys are names, not fields
    {("files",), ("inputs",), ("results",), ("states",), ("variants",), ("requires",)}
    | {("variants", "fp32-ort", "graphs"), ("variants", "fp32-ort", "opsets")}
    | {("variants", "fp32-ort", "graphs", "decode", side) for side in ("inputs", "outputs")}
)


def dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(str(step) for step in path)


def mutated(path: tuple[str | int, ...], value: Any) -> bytes:
    manifest = reference()
    parent_of(manifest, list(path))[path[-1]] = value
    return json.dumps(manifest).encode()


def problems_of(data: bytes, tmp_path: Path) -> str:
    (tmp_path / "manifest.json").write_bytes(data)
    return refusal(tmp_path)


def test_the_reference_is_sound(tmp_path):
    """What the mutations start from is accepted, so each refusal is the mutation's."""
    (tmp_path / "manifest.json").write_text(json.dumps(reference()))
    assert read_manifest(tmp_path).name == "tiny"
    assert len(ALL) > 100


FIELDS = [p for p in ALL if p[:-1] not in NAMED_BY_USER and isinstance(p[-1], str)]


@pytest.mark.parametrize("path", FIELDS, ids=dotted)
def test_missing_field_is_refused(tmp_path, path):
    """Every key is required."""
    manifest = reference()
    del parent_of(manifest, list(path))[path[-1]]
    assert f"{dotted(path)}: missing" in problems_of(json.dumps(manifest).encode(), tmp_path)


OBJECTS = [
    path
    for path in [(), *ALL]
    if isinstance(parent_of(reference(), [*path, ""]), dict)
    and path not in NAMED_BY_USER
    and path[:1] not in [(name,) for name in FREE]
]


@pytest.mark.parametrize("path", OBJECTS, ids=dotted)
def test_unknown_key_is_refused(tmp_path, path):
    """A key that this version does not know is an error at every level."""
    manifest = reference()
    parent_of(manifest, [*path, ""])["surprise"] = 1
    assert f"{dotted((*path, 'surprise'))}: unknown key" in problems_of(
        json.dumps(manifest).encode(), tmp_path
    )


WRONG: list[Any] = [True, 1.5, -1, 2**60, "\x1b[2J", [[]], {"x": {}}]
PAIRS = [
    (path, wrong)
    for path in ALL
    for wrong in WRONG
    if not (path in [(name,) for name in FREE] and isinstance(wrong, dict))
    and not (path == ("format_version",) and wrong == 2**60)  # a newer format: Incompatible
]


@pytest.mark.parametrize(
    ("path", "wrong"), PAIRS, ids=[f"{dotted(path)}-{wrong!r}" for path, wrong in PAIRS]
)
def test_wrong_value_is_refused_with_its_path(tmp_path, path, wrong):
    """No field takes a value of another type or out of range; the message names its path."""
    text = problems_of(mutated(path, wrong), tmp_path)
    assert dotted(path) in text
    assert text.isascii()
    assert "\x1b" not in text


NULLABLE = {("program", "prologue"), ("program", "body"), ("bos",), ("tokenizer",)} | {
    ("chat_template",),
    ("tokenizer", "file"),
    ("states", "lens", "axis"),
    ("states", "lens", "counter"),
}


@pytest.mark.parametrize("path", [p for p in ALL if p not in NULLABLE], ids=dotted)
def test_null_is_refused_where_a_value_is_needed(tmp_path, path):
    """Only what a model may lack is null."""
    assert dotted(path) in problems_of(mutated(path, None), tmp_path)


RULES: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "name with spaces": (("name",), "a b", "name: 'a b' is not a name"),
    "name too long": (("name",), "a" * 65, "name: "),
    "summary of two lines": (("summary",), "a\nb", "summary: .* is not one line"),
    "summary too long": (("summary",), "a" * 501, "at most 500 characters"),
    "summary turns around": (("summary",), "a\u202eb", "is not printable"),
    "carriage return": (("provenance", "x"), "a\rb", "provenance.x: has the character '.*r'"),
    "hidden in a list": (("provenance", "x"), [{"y": "\x9b"}], r"provenance.x.0.y: has the"),
    "lone surrogate": (("summary",), "\udc00", "is not printable"),
    "model_id in capitals": (("model_id",), "AB" * 32, "is not a SHA-256"),
    "weights_id too short": (("weights_id",), "ab", "is not a SHA-256"),
    "eos beyond the vocabulary": (("eos",), [300], "eos.0: 300 is not an integer from 0 to 299"),
    "too many eos": (("eos",), [1] * 65, "a list of at most 64"),
    "bos beyond the vocabulary": (("bos",), 300, "bos: 300"),
    "no results": (("results",), {}, "results: has 0 entries, 1 to 64"),
    "no variants": (("variants",), {}, "variants: has 0 entries, 1 to 32"),
    "no graphs": (("variants", "fp32-ort", "graphs"), {}, "has 0 entries, 1 to 3"),
    "no opsets": (("variants", "fp32-ort", "opsets"), {}, "has 0 entries, 1 to 16"),
    "unknown dtype": (("inputs", "ids", "dtype"), "float64", "not one of float32, float16"),
    "unknown lowering": (("variants", "fp32-ort", "lowering"), "fast", "not one of ort, portable"),
    "axis of size 0": (("inputs", "ids", "shape"), ["batch", 0], "shape.1: 0 is not an integer"),
    "axis with a dash": (("inputs", "ids", "shape"), ["a-b"], "is not the name of an axis"),
    "nine axes": (("inputs", "ids", "shape"), [1] * 9, "a list of at most 8"),
    "append without axis": (("states", "k.0", "axis"), None, "an append state needs it"),
    "append without counter": (("states", "k.0", "counter"), None, "an append state needs it"),
    "axis not of the shape": (("states", "k.0", "axis"), "rows", "is not one axis of the shape"),
    "axis twice in the shape": (
        ("states", "k.0", "shape"),
        ["batch", "capacity", "capacity"],
        "is not one axis of the shape",
    ),
    "counter that is no state": (("states", "k.0", "counter"), "none", "'none' is no state"),
    "counter that is none": (("states", "k.0", "counter"), "k.0", "is of kind append"),
    "counter with an axis": (("states", "lens", "axis"), "batch", "kind 'counter' has no axis"),
    "counter with a counter": (("states", "lens", "counter"), "lens", "has no counter"),
    "counter in int32": (("states", "lens", "dtype"), "int32", "a counter is int64 .batch."),
    "counter per row": (("states", "lens", "shape"), ["batch", 1], "a counter is int64 .batch."),
    "counter with content": (("states", "lens", "init"), "a.npy", "'a.npy' is not 'zeros'"),
    "carry with a counter": (("states", "k.0", "kind"), "carry", "'carry' has no counter"),
    "init of another type": (("states", "k.0", "init"), "k.bin", "not 'zeros' or a .npy file"),
    "init not listed": (("states", "k.0", "init"), "k.npy", "'k.npy' is not listed in files"),
    "init outside": (("states", "k.0", "init"), "../k.npy", "the part '..'"),
    "graph outside": (("variants", "fp32-ort", "graphs", "decode", "file"), "/g", "is absolute"),
    "graph not listed": (
        ("variants", "fp32-ort", "graphs", "decode", "file"),
        "g.onnx",
        "decode.file: 'g.onnx' is not listed",
    ),
    "data not listed": (
        ("variants", "fp32-ort", "graphs", "decode", "data"),
        ["w"],
        "decode.data.0: 'w' is not listed",
    ),
    "template not listed": (("chat_template",), "t.jinja", "chat_template: 't.jinja' is not"),
    "report not listed": (("reports",), ["r.json"], "reports.0: 'r.json' is not listed"),
    "tokenizer not listed": (
        ("tokenizer",),
        {"kind": "file", "file": "t.json", "offset": 0},
        "tokenizer.file: 't.json' is not listed",
    ),
    "tokenizer without file": (
        ("tokenizer",),
        {"kind": "file", "file": None, "offset": 0},
        "tokenizer.file: a tokenizer of kind 'file' needs it",
    ),
    "tokenizer with offset": (
        ("tokenizer",),
        {"kind": "file", "file": GRAPH, "offset": 3},
        "tokenizer.offset: a tokenizer of kind 'file' has offset 0",
    ),
    "byte tokenizer with file": (
        ("tokenizer",),
        {"kind": "bytes", "file": GRAPH, "offset": 0},
        "a tokenizer of kind 'bytes' has no file",
    ),
    "manifest lists itself": (
        ("files", "manifest.json"),
        {"sha256": "cd" * 32, "bytes": 5},
        "files.manifest.json: the manifest does not list itself",
    ),
    "file outside": (
        ("files", "../x"),
        {"sha256": "cd" * 32, "bytes": 5},
        "files.../x: '../x' is not a file name",
    ),
    "state with a bad name": (("states", "k 0"), {}, "states: 'k 0' is not a usable name"),
    "key with a control character": (("states", "\x1b"), {}, "is not a usable key"),
    "endpoint of no kind": ((*DECODE.split("."), "inputs", "ids"), "ids", "is not an endpoint"),
    "endpoint of odd kind": (
        (*DECODE.split("."), "inputs", "ids"),
        "weight.ids",
        "inputs.ids: 'weight.ids' is not an endpoint",
    ),
    "sampling object": (("sampling", "x"), {"a": 1}, "sampling.x: an object is not a plain value"),
    "deep provenance": (
        ("provenance", "x"),
        json.loads("[" * 20 + "]" * 20),
        "nested more than 16 deep",
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_rule_of_the_format(tmp_path, case):
    """Each rule of docs/bundle.md is enforced, in its own words."""
    path, value, message = RULES[case]
    assert re.search(message, problems_of(mutated(path, value), tmp_path))


def test_all_problems_are_reported_sorted_and_bounded(tmp_path):
    """One error for the whole file, in order of path; a flood is counted, not shown."""
    manifest = reference()
    manifest["vocab_size"] = "many"
    manifest["bos"] = "x"
    manifest["zeta"] = 0
    del manifest["context"]
    text = problems_of(json.dumps(manifest).encode(), tmp_path)
    assert text.startswith("the bundle has 5 problems\n")
    lines = [line.strip().partition(":")[0] for line in text.splitlines()[1:]]
    assert lines == ["bos", "context", "eos.0", "vocab_size", "zeta"]
    manifest |= {f"x{i}": 0 for i in range(500)}
    text = problems_of(json.dumps(manifest).encode(), tmp_path)
    assert len(text.splitlines()) == 52
    assert text.endswith("and 455 more")


RAW = {
    "empty": (b"", "not sound JSON"),
    "cut": (b'{"format_version": 1', "not sound JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not sound JSON"),
    "UTF-16": ('{"format_version": 1}'.encode("utf-16"), "not sound JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not sound JSON"),
    "NaN": (b'{"format_version": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"format_version": -Infinity}', "-Infinity is not JSON"),
    "overflow": (b'{"format_version": 1e999}', "1e999 is too large"),
    "long number": (b'{"format_version": ' + b"1" * 100_000 + b"}", "a number has 100000 digits"),
    "key twice": (b'{"format_version": 1, "format_version": 1}', "'format_version' is given twice"),
    "very deep": (b'{"format_version": ' + b"[" * 1_000_000, "nested more than 16 deep"),
    "a list": (b"[]", "not a JSON object"),
    "no version": (b"{}", "format_version: missing"),
    "version 0": (b'{"format_version": 0}', "format_version: 0 is not a format version"),
    "version true": (b'{"format_version": true}', "format_version: true is not"),
    "too large": (b" " * ((4 << 20) + 1), "4,194,304 are allowed"),
}


@pytest.mark.parametrize("case", RAW)
def test_unsound_json_is_refused(tmp_path, case):
    """What is not plain, bounded JSON is refused before any field is looked at."""
    data, message = RAW[case]
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(BadBundle) as caught:
        read_manifest(tmp_path)
    assert message in caught.value.what


def test_newer_format_is_incompatible_not_broken(tmp_path):
    """The version comes first: a newer bundle is not reported as full of unknown keys."""
    manifest = {**reference(), "format_version": FORMAT_VERSION + 1, "news": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Incompatible, match="made by a newer edgert: format version"):
        read_manifest(tmp_path)


def test_truncated_manifest_is_refused(tmp_path):
    """Every truncation of a manifest is refused."""
    data = json.dumps(reference()).encode()
    for size in range(0, len(data), 7):
        (tmp_path / "manifest.json").write_bytes(data[:size])
        with pytest.raises(BadBundle):
            read_manifest(tmp_path)


def test_damaged_manifest_is_refused_or_the_same_model(shared, tmp_path):
    """Flip a bit anywhere: refused, or a change to what identities leave out on purpose."""
    good = (shared / "manifest.json").read_bytes()
    known, rng, accepted = read_manifest(shared), random.Random(2), 0
    for _ in range(3000):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "manifest.json").write_bytes(data)
        try:
            manifest = read_manifest(tmp_path)
        except (BadBundle, Incompatible):
            continue
        accepted += 1
        assert manifest.model_id == known.model_id
        assert manifest.program == known.program
        assert list(manifest.states.items()) == list(known.states.items())
        graphs = manifest.variants.popitem()[1].graphs
        assert graphs == known.variants["fp32-ort"].graphs
    assert 0 < accepted < 1500


def test_manifest_survives_writing_and_reading(shared, tmp_path):
    """Reading what was written gives an equal manifest, order of states included."""
    manifest = read_manifest(shared)
    write_manifest(tmp_path, manifest)
    again = read_manifest(tmp_path)
    assert again == manifest
    assert list(again.states) == list(manifest.states)
    assert (tmp_path / "manifest.json").read_bytes() == (shared / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "two words"}, "name: 'two words'"),
        ({"model_id": "00" * 32}, "model_id: is not that of the content"),
        ({"sampling": {"temperature": float("nan")}}, "NaN is not JSON"),
        ({"files": {}}, "is not listed in files"),
    ],
)
def test_nothing_that_would_be_refused_is_written(shared, tmp_path, change, message):
    """The writer applies the reader's rules first."""
    with pytest.raises(BadBundle, match=message):
        write_manifest(tmp_path, replace(read_manifest(shared), **change))
    assert os.listdir(tmp_path) == []


def test_text_of_any_language_is_kept(shared, tmp_path):
    """Free text may have lines, tabs, blanks of any width and any script."""
    text = "one\n\ttwo\u00a0three\u3000四 ñ 🙂"
    write_manifest(tmp_path, replace(read_manifest(shared), provenance={"license": text}))
    assert read_manifest(tmp_path).provenance == {"license": text}


def test_the_documented_example_is_sound(tmp_path):
    """The worked example of docs/bundle.md, identities included."""
    page = (Path(__file__).parents[1] / "docs/bundle.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "manifest.json").write_text(example)
    manifest = read_manifest(tmp_path)
    assert list(manifest.states) == ["k.0", "v.0", "lens"]
    for number in ("64", "1024", "4096"):  # caps that the page states
        assert number in page


@pytest.mark.parametrize("path", ["model_id", "variants.fp32-ort.variant_id"])
def test_stored_identity_must_be_that_of_the_content(tmp_path, path):
    """A manifest edited by hand does not keep the old name."""
    root = tiny_bundle(tmp_path)
    steps = path.split(".")
    rewrite(root, lambda m: parent_of(m, steps).update({steps[-1]: "00" * 32}))
    assert f"{path}: is not that of the content" in refusal(root)


def _with_drift(value: Any, version: int = 4) -> bytes:
    manifest = manifest_to_json(replace(tiny_manifest(), format_version=4))
    sealed = reference() | {key: manifest[key] for key in ("task", "tables")}
    sealed["program"] = manifest["program"]
    if version == 4:
        for variant in sealed["variants"].values():
            variant["state_dtypes"] = {}
    return json.dumps(sealed | {"format_version": version, "max_drift": value}).encode()


@pytest.mark.parametrize("value", [None, 0, 0.25, 3])
def test_a_bundle_may_bound_the_drift_of_sessions(tmp_path, value):
    (tmp_path / "manifest.json").write_bytes(_with_drift(value))
    assert read_manifest(tmp_path).max_drift == value


@pytest.mark.parametrize("value", [-0.1, True, "0.1", [0.1]])
def test_a_bound_that_is_none_is_refused(tmp_path, value):
    assert "max_drift: " in problems_of(_with_drift(value), tmp_path)


def test_the_bound_is_of_version_4(tmp_path):
    """Earlier versions have no such key, and version 4 needs it."""
    assert "max_drift: unknown key" in problems_of(_with_drift(0.1, 3), tmp_path)
    manifest = json.loads(_with_drift(0.1))
    del manifest["max_drift"]
    assert problems_of(json.dumps(manifest).encode(), tmp_path).endswith("max_drift: missing")
