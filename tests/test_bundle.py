"""Manifest, wiring, identities, files and hashes: every way a bundle can be wrong."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import edgert.bundle as bundle
from edgert import cache
from edgert.bundle import (
    Bundle,
    check_wiring,
    list_files,
    manifest_to_json,
    model_id,
    read_manifest,
    seal,
    variant_id,
    write_manifest,
)
from edgert.errors import BadBundle, EdgertError, Incompatible
from edgert.spec import (
    FileEntry,
    GraphSpec,
    Manifest,
    ProgramSpec,
    StateSpec,
    TensorSpec,
    TokenizerSpec,
    VariantSpec,
)

# Apart, since an output folder bundles/ beside it would change how the linter sorts this name.
# isort: split
from bundles import DATA, GRAPH, OFFSET, TABLE, external, tiny_bundle, tiny_manifest, tiny_model

DECODE = "variants.fp32-ort.graphs.decode"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A tiny bundle that no test changes."""
    return tiny_bundle(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def root(shared, tmp_path) -> Path:
    """A tiny bundle that the test may break."""
    return Path(shutil.copytree(shared, tmp_path / "bundle"))


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


# --- the manifest's fields, one by one --------------------------------------------------------

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
    manifest = {**reference(), "format_version": 2, "news": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Incompatible, match="made by a newer edgert: format version 2"):
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


# --- wiring -----------------------------------------------------------------------------------


def looped() -> Manifest:
    """prologue -> body -> epilogue over one carry, with values flowing forward."""

    def graph(inputs: dict[str, str], outputs: dict[str, str]) -> GraphSpec:
        return GraphSpec("g.onnx", (), inputs, outputs)

    graphs = {
        "enter": graph({"ids": "input.ids"}, {"h": "value.h", "z": "state.z"}),
        "think": graph({"h": "value.h", "z": "state.z"}, {"z": "state.z", "score": "value.score"}),
        "leave": graph({"z": "state.z", "score": "value.score", "h": "value.h"}, {"y": "result.y"}),
    }
    return replace(
        tiny_manifest(),
        program=ProgramSpec("leave", "enter", "think"),
        inputs={"ids": TensorSpec("int64", ("batch",))},
        results={"y": TensorSpec("float32", ("batch",))},
        states={"z": StateSpec("carry", "float32", ("batch", 4))},
        variants={"fp32-ort": VariantSpec("fp32", "ort", {"ai.onnx": 20}, graphs)},
    )


def wired(manifest: Manifest, graph: str, side: str, port: str, end: str | None) -> Manifest:
    """The manifest with one connection changed, or removed."""
    variant = manifest.variants["fp32-ort"]
    spec = variant.graphs[graph]
    ports = {**getattr(spec, side), port: end}
    ports = {name: to for name, to in ports.items() if to is not None}
    graphs = {**variant.graphs, graph: replace(spec, **{side: ports})}
    return replace(manifest, variants={"fp32-ort": replace(variant, graphs=graphs)})


def without(manifest: Manifest, graph: str) -> Manifest:
    variant = manifest.variants["fp32-ort"]
    graphs = {name: spec for name, spec in variant.graphs.items() if name != graph}
    return replace(manifest, variants={"fp32-ort": replace(variant, graphs=graphs)})


def with_graph(manifest: Manifest, name: str) -> Manifest:
    variant = manifest.variants["fp32-ort"]
    graphs = {**variant.graphs, name: variant.graphs["leave"]}
    return replace(manifest, variants={"fp32-ort": replace(variant, graphs=graphs)})


WIRING: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "unknown input": (
        lambda m: wired(m, "enter", "inputs", "x", "input.x"),
        "graphs.enter.inputs.x: there is no input 'x'",
    ),
    "unknown state read": (
        lambda m: wired(m, "think", "inputs", "q", "state.q"),
        "graphs.think.inputs.q: there is no state 'q'",
    ),
    "unknown state written": (
        lambda m: wired(m, "think", "outputs", "q", "state.q"),
        "graphs.think.outputs.q: there is no state 'q'",
    ),
    "unknown result": (
        lambda m: wired(m, "leave", "outputs", "q", "result.q"),
        "graphs.leave.outputs.q: there is no result 'q'",
    ),
    "result read": (
        lambda m: wired(m, "leave", "inputs", "y", "result.y"),
        "graphs.leave.inputs.y: result.y is a result, a graph cannot read it",
    ),
    "input written": (
        lambda m: wired(m, "enter", "outputs", "ids", "input.ids"),
        "graphs.enter.outputs.ids: input.ids is an input, a graph cannot write it",
    ),
    "input read by nobody": (
        lambda m: wired(m, "enter", "inputs", "ids", None),
        "inputs.ids: no graph reads it",
    ),
    "result without producer": (
        lambda m: wired(m, "leave", "outputs", "y", "state.z"),
        "no graph writes result.y",
    ),
    "result of two graphs": (
        lambda m: wired(m, "think", "outputs", "y", "result.y"),
        "result.y is written by leave and think",
    ),
    "result twice by one graph": (
        lambda m: wired(m, "leave", "outputs", "y2", "result.y"),
        "result.y is written by leave and leave",
    ),
    "value without producer": (
        lambda m: wired(m, "leave", "inputs", "q", "value.q"),
        "graphs.leave.inputs.q: no graph writes value.q",
    ),
    "value of two graphs": (
        lambda m: wired(m, "think", "outputs", "h", "value.h"),
        "value.h is written by enter and think",
    ),
    "value from the future": (
        lambda m: wired(m, "enter", "inputs", "score", "value.score"),
        "graphs.enter.inputs.score: value.score is written by 'think', which runs no earlier",
    ),
    "body feeds itself": (
        lambda m: wired(m, "think", "inputs", "score", "value.score"),
        "graphs.think.inputs.score: value.score is written by 'think', which runs no earlier",
    ),
    "value read by nobody": (
        lambda m: wired(m, "think", "outputs", "x", "value.x"),
        "value.x is written and never read",
    ),
    "state read by nobody": (
        lambda m: replace(m, states={**m.states, "w": m.states["z"]}),
        "no graph reads state.w",
    ),
    "state written and not read": (
        lambda m: wired(
            replace(m, states={**m.states, "w": m.states["z"]}),
            "think",
            "outputs",
            "w",
            "state.w",
        ),
        "no graph reads state.w",
    ),
    "state twice by one graph": (
        lambda m: wired(m, "think", "outputs", "z2", "state.z"),
        "graphs.think.outputs.z2: state.z is written twice by one graph",
    ),
    "counter written": (
        lambda m: wired(
            wired(
                replace(m, states={**m.states, "n": StateSpec("counter", "int64", ("batch",))}),
                "think",
                "inputs",
                "n",
                "state.n",
            ),
            "think",
            "outputs",
            "n",
            "state.n",
        ),
        "graphs.think.outputs.n: state.n is a counter, only the runtime writes it",
    ),
    "part missing": (lambda m: without(m, "think"), "graphs.think: missing, program.body names it"),
    "graph without part": (lambda m: with_graph(m, "extra"), "graphs.extra: plays no part"),
    "graph in two parts": (
        lambda m: replace(m, program=ProgramSpec("leave", "leave", "think")),
        "program.prologue: the graph 'leave' plays two parts",
    ),
}


@pytest.mark.parametrize("case", WIRING)
def test_wrong_wiring_is_refused(case):
    """Every input has one source that exists and runs earlier, every output one destination."""
    break_it, message = WIRING[case]
    with pytest.raises(BadBundle) as caught:
        check_wiring(break_it(looped()))
    assert message in caught.value.what


@pytest.mark.parametrize("manifest", [looped(), tiny_manifest()], ids=["looped", "decoder"])
def test_right_wiring_is_accepted(manifest):
    """A looped and a one-graph program pass."""
    check_wiring(manifest)


def test_each_variant_is_checked():
    """A fault in the second variant is found and named."""
    good = tiny_manifest()
    spec = good.variants["fp32-ort"]
    broken = replace(spec.graphs["decode"], inputs={"ids": "input.ids"})
    both = {**good.variants, "fp32-portable": replace(spec, graphs={"decode": broken})}
    with pytest.raises(BadBundle, match=r"variants.fp32-portable.graphs: no graph reads state.k.0"):
        check_wiring(replace(good, variants=both))


# --- identities -------------------------------------------------------------------------------


def ids(manifest: Manifest) -> tuple[str, str]:
    return model_id(manifest), variant_id(manifest, "fp32-ort")


def sealed() -> Manifest:
    names = (GRAPH, DATA, "chat_template.jinja", "reports/parity.json", "k.npy")
    files = {name: FileEntry(f"{i}c" * 32, 5) for i, name in enumerate(names)}
    return seal(replace(tiny_manifest(), files=files))


def with_variant(manifest: Manifest, **changes: Any) -> Manifest:
    variant = replace(manifest.variants["fp32-ort"], **changes)
    return replace(manifest, variants={"fp32-ort": variant})


def with_hash(manifest: Manifest, name: str) -> Manifest:
    return replace(manifest, files={**manifest.files, name: FileEntry("ee" * 32, 5)})


OF_THE_MODEL: dict[str, Callable[[Manifest], Manifest]] = {
    "weights": lambda m: replace(m, weights_id="cd" * 32),
    "context": lambda m: replace(m, context=65),
    "vocabulary": lambda m: replace(m, vocab_size=301),
    "inputs": lambda m: replace(m, inputs={**m.inputs, "x": m.inputs["ids"]}),
    "results": lambda m: replace(m, results={**m.results, "x": m.results["token"]}),
    "program": lambda m: replace(m, program=ProgramSpec("decode", "enter")),
    "eos": lambda m: replace(m, eos=(256, 258)),
    "bos": lambda m: replace(m, bos=None),
    "tokenizer": lambda m: replace(m, tokenizer=TokenizerSpec("bytes", None, 3)),
    "no tokenizer": lambda m: replace(m, tokenizer=None),
    "template": lambda m: with_hash(m, "chat_template.jinja"),
    "no template": lambda m: replace(m, chat_template=None),
}
OF_THE_VARIANT: dict[str, Callable[[Manifest], Manifest]] = {
    "precision": lambda m: with_variant(m, precision="fp16"),
    "lowering": lambda m: with_variant(m, lowering="portable"),
    "opsets": lambda m: with_variant(m, opsets={"ai.onnx": 21}),
    "graph": lambda m: with_hash(m, GRAPH),
    "data": lambda m: with_hash(m, DATA),
    "wiring": lambda m: wired(m, "decode", "inputs", "ids2", "input.ids"),
    "state order": lambda m: replace(m, states=dict(reversed(m.states.items()))),
    "state shape": lambda m: replace(
        m, states={**m.states, "k.0": replace(m.states["k.0"], shape=("batch", 2, "capacity", 1))}
    ),
    "state init": lambda m: replace(
        m, states={**m.states, "k.0": replace(m.states["k.0"], init="k.npy")}
    ),
}
OF_NEITHER: dict[str, Callable[[Manifest], Manifest]] = {
    "name": lambda m: replace(m, name="other", summary="other"),
    "reports": lambda m: with_hash(replace(m, reports=()), "reports/parity.json"),
    "sampling": lambda m: replace(m, sampling={}),
    "provenance": lambda m: replace(m, provenance={}),
    "requires": lambda m: replace(m, requires={}),
}


@pytest.mark.parametrize("case", OF_THE_MODEL)
def test_model_identity_changes_with_the_model(case):
    """What defines the model changes both identities."""
    before, after = ids(sealed()), ids(OF_THE_MODEL[case](sealed()))
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("case", OF_THE_VARIANT)
def test_variant_identity_changes_with_the_variant(case):
    """What defines the variant alone changes its identity alone."""
    before, after = ids(sealed()), ids(OF_THE_VARIANT[case](sealed()))
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("case", OF_NEITHER)
def test_identities_do_not_depend_on_the_rest(case):
    """Names, reports, defaults and history are outside: they can change later."""
    assert ids(OF_NEITHER[case](sealed())) == ids(sealed())


def test_identity_depends_on_initial_content_not_on_its_path():
    """An initial state counts by its hash."""
    with_init = OF_THE_VARIANT["state init"](sealed())
    assert ids(with_hash(with_init, "k.npy"))[1] != ids(with_init)[1]


def test_identities_are_stable():
    """Pinned: a change of these strings orphans every saved session."""
    assert ids(sealed()) == (
        "27326478a4f915691dec677622e9f0d151113e02957a647ca5ee3fa63cbeb4f5",
        "02a2ff1e22456ee2f2b25b92f59cc8887e2249a537583b0a013149b905b80f14",
    )


def test_seal_needs_the_files_listed():
    """An exporter that forgot to list a file is told which."""
    with pytest.raises(BadBundle, match="is not listed in files"):
        seal(tiny_manifest())


@pytest.mark.parametrize("path", ["model_id", "variants.fp32-ort.variant_id"])
def test_stored_identity_must_be_that_of_the_content(root, path):
    """A manifest edited by hand does not keep the old name."""
    steps = path.split(".")
    rewrite(root, lambda m: parent_of(m, steps).update({steps[-1]: "00" * 32}))
    assert f"{path}: is not that of the content" in refusal(root)


# --- the directory ----------------------------------------------------------------------------


def open_refusal(root: Path, verify: Any = "stamp") -> str:
    with pytest.raises(BadBundle) as caught:
        Bundle.open(root, verify=verify)
    assert str(root) in (caught.value.where or "")
    return caught.value.what


def test_open_returns_manifest_and_paths(root):
    """A sound bundle opens; its files have paths, others have none."""
    opened = Bundle.open(str(root))
    assert opened.root == root
    assert opened.manifest == read_manifest(root)
    assert opened.path(GRAPH) == root / GRAPH
    with pytest.raises(BadBundle, match="'none' is not listed"):
        opened.path("none")
    (root / GRAPH).unlink()
    (root / GRAPH).symlink_to("/etc/hostname")
    with pytest.raises(BadBundle, match="symbolic link"):
        opened.path(GRAPH)


@pytest.mark.parametrize("name", ["x", ".manifest.json.swp", "variants/fp32/model.plan", ".git/x"])
@pytest.mark.parametrize("verify", [True, False, "stamp"])
def test_stray_file_is_refused_by_name(root, name, verify):
    """What the manifest does not list has no business in the directory."""
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"")
    assert repr(name.partition("/x")[0]) in open_refusal(root, verify)


def _delete(path: Path) -> None:
    path.unlink()


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _link(path: Path) -> None:
    shutil.copy(path, path.parent.parent / "elsewhere")
    path.unlink()
    path.symlink_to(path.parent.parent / "elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [GRAPH, DATA, "chat_template.jinja", "reports/parity.json"])
@pytest.mark.parametrize("damage", [_delete, _grow, _cut, _link, _pipe])
def test_listed_file_must_be_there_as_listed(root, name, damage):
    """Missing, longer, shorter, linked or special: refused, naming the file, hashes or not."""
    damage(root / name)
    assert name in open_refusal(root, False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no such directory"),
        (lambda p: p.mkdir(), "it has no manifest.json"),
        (lambda p: p.write_text(""), "there is no such directory"),
        (lambda p: (p / "manifest.json").mkdir(parents=True), "a directory stands where"),
    ],
)
def test_path_that_is_no_bundle(tmp_path, make, message):
    """A wrong path is told from a broken bundle."""
    make(tmp_path / "b")
    assert message in open_refusal(tmp_path / "b")


def test_manifest_that_is_a_link_is_refused(root):
    """The manifest itself is held to the same rule."""
    (root / "manifest.json").rename(root.parent / "m.json")
    (root / "manifest.json").symlink_to(root.parent / "m.json")
    assert "a symbolic link" in open_refusal(root)


def test_every_bit_of_the_graph_counts(tmp_path):
    """Each single-bit flip of a small graph file is caught by its hash."""
    root = tiny_bundle(tmp_path)
    manifest = read_manifest(root)
    good = (root / GRAPH).read_bytes()
    (root / GRAPH).chmod(0o644)
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (root / GRAPH).write_bytes(bad)
        with pytest.raises(BadBundle, match="does not have the listed SHA-256"):
            bundle._check_hashes(root, manifest, [GRAPH], None)
    (root / GRAPH).write_bytes(good)
    Bundle.open(root, verify=True)


def flip(path: Path) -> None:
    """Change one bit and keep the size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_all_differing_files_are_listed(root):
    """One error names every file whose content differs."""
    for name in (DATA, "reports/parity.json", "chat_template.jinja"):
        flip(root / name)
    text = open_refusal(root)
    assert text.startswith("the bundle has 3 problems")
    for name in (DATA, "reports/parity.json", "chat_template.jinja"):
        assert f"files.{name}: the content does not have the listed SHA-256" in text
    assert Bundle.open(root, verify=False).root == root


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """Bytes hashed, chunk by chunk; files count as settled at once."""
    monkeypatch.setattr(bundle, "_SETTLE_NS", 0)
    return []


def test_stamp_spares_the_second_hashing(root, hashed):
    """Verified once, opened from the stamp afterwards; `True` hashes again."""
    total = sum(entry.bytes for entry in read_manifest(root).files.values())
    Bundle.open(root, progress=hashed.append)
    assert sum(hashed) == total
    Bundle.open(root, progress=hashed.append)
    assert sum(hashed) == total
    Bundle.open(root, verify=True, progress=hashed.append)
    assert sum(hashed) == 2 * total


@pytest.mark.parametrize("name", [GRAPH, DATA])
def test_change_after_the_stamp_is_noticed(root, hashed, name):
    """A flipped bit is found although size and modification time are put back."""
    Bundle.open(root)
    before = (root / name).stat()
    flip(root / name)
    os.utime(root / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert f"files.{name}" in open_refusal(root)


def test_only_the_changed_file_is_hashed_again(root, hashed):
    """A file that was touched is hashed; the others keep their verdict."""
    Bundle.open(root)
    os.utime(root / DATA)
    Bundle.open(root, progress=hashed.append)
    assert sum(hashed) == read_manifest(root).files[DATA].bytes


def test_fresh_file_is_not_stamped(root, monkeypatch):
    """A file changed within the clock's grain of its hashing could change again unseen."""
    monkeypatch.setattr(bundle, "_SETTLE_NS", 10**15)
    Bundle.open(root)
    assert cache.read_stamp(root) is None


def test_file_that_changes_during_hashing_is_not_stamped(root, hashed):
    """The stamp is for the files as they were hashed."""
    Bundle.open(root, progress=lambda n: os.utime(root / DATA))
    assert cache.read_stamp(root) is None


@pytest.mark.parametrize(
    "forge",
    [
        lambda s: {**s, "checks": 0},
        lambda s: {**s, "files": None},
        lambda s: {**s, "files": []},
        lambda s: {**s, "files": dict.fromkeys(s["files"])},
        lambda s: {},
    ],
)
def test_stamp_that_does_not_fit_is_ignored(root, hashed, forge):
    """Older checks, other types, missing parts: hashed as if there were no stamp."""
    Bundle.open(root)
    stamp = cache.read_stamp(root)
    assert stamp is not None
    assert cache.write_stamp(root, forge(stamp))
    Bundle.open(root, progress=hashed.append)
    assert sum(hashed) > 0


def test_graphs_are_checked_again_when_only_the_manifest_changed(root, hashed):
    """A stamp vouches for files with their manifest, not for another manifest."""
    Bundle.open(root)
    manifest = read_manifest(root)
    write_manifest(root, seal(with_variant(manifest, opsets={"ai.onnx": 19})))
    assert "imports 'ai.onnx' 20, declared as 19" in open_refusal(root)


def test_unwritable_cache_does_not_fail_a_load(root, monkeypatch, tmp_path):
    """Without a usable cache a bundle is hashed each time."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "file"))
    assert Bundle.open(root).root == root


def test_listing_refuses_what_a_bundle_cannot_have(tmp_path):
    """The exporter's helper applies the reader's rules."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / ".b").write_text("")
    with pytest.raises(BadBundle, match="the bundle has 2 problems"):
        list_files(tmp_path)


# --- what the graphs say ----------------------------------------------------------------------


def graph_refusal(tmp_path: Path, model: onnx.ModelProto, **kwargs: Any) -> str:
    """The refusal of a sealed bundle, consistent in itself, whose graph is `model`."""
    root = tiny_bundle(tmp_path, model=model, **kwargs)
    texts = {open_refusal(root, verify) for verify in (True, False, "stamp")}
    assert len(texts) == 1
    return texts.pop()


LOCATIONS = [
    "/etc/passwd",
    "../fp32/weights.data",
    "../../manifest.json",
    "./weights.data",
    "weights.data/",
    "weights.data\0",
    "weights.data ",
    "weights\u200b.data",
    "wеights.data",
    "WEIGHTS.DATA",
    "unlisted.data",
    "decode-ort.onnx",
    "*/_ORT_MEM_ADDR_/*",
    "file:///etc/passwd",
    "C:\\x",
    ".",
    "..",
]


@pytest.mark.parametrize("location", LOCATIONS, ids=ascii)
def test_external_data_must_be_a_listed_file_beside_the_graph(tmp_path, location):
    """Absolute, upward, look-alike, memory-address and unlisted places are refused."""
    model = tiny_model()
    model.graph.initializer.append(external("w", [1], location=location, offset="0", length="4"))
    text = graph_refusal(tmp_path, model)
    assert f"{DECODE}.data: tensor 'w' is stored in {ascii(location)}" in text
    assert text.isascii()


def _in_subgraph(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["o"])],
        "inner",
        [],
        [helper.make_tensor_value_info("o", 1, [1])],
        initializer=[tensor],
    )
    model.graph.node.append(
        helper.make_node("If", ["c"], ["r"], then_branch=inner, else_branch=copy.deepcopy(inner))
    )


def _in_function(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    node = helper.make_node("Constant", [], ["b"], value=tensor)
    model.functions.append(
        helper.make_function("own", "f", [], ["b"], [node], [helper.make_opsetid("", 20)])
    )


def _in_attribute(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _in_sparse(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    indices = helper.make_tensor("i", 7, [1], [0])
    model.graph.sparse_initializer.append(
        onnx.SparseTensorProto(values=tensor, indices=indices, dims=[4])
    )


@pytest.mark.parametrize("hide", [_in_subgraph, _in_function, _in_attribute, _in_sparse])
def test_hidden_external_data_is_refused(tmp_path, hide):
    """No corner of the file lets a path through."""
    model = tiny_model()
    hide(model, external("w", [1], location="../../../x", length="4"))
    assert "tensor 'w' is stored in '../../../x'" in graph_refusal(tmp_path, model)


def test_external_data_in_a_folder_below_is_refused(tmp_path):
    """Libraries differ on paths in a location, so even a listed file below is refused."""
    root = tiny_bundle(tmp_path)
    model = tiny_model()
    model.graph.initializer.append(external("w", [1], location="sub/w.data", length="4"))
    (root / GRAPH).write_bytes(model.SerializeToString())
    (root / "variants/fp32/sub").mkdir()
    (root / "variants/fp32/sub/w.data").write_bytes(bytes(4))
    manifest = replace(read_manifest(root), files=list_files(root))
    decode = manifest.variants["fp32-ort"].graphs["decode"]
    decode = replace(decode, data=(DATA, "variants/fp32/sub/w.data"))
    write_manifest(root, seal(with_variant(manifest, graphs={"decode": decode})))
    assert "tensor 'w' is stored in 'sub/w.data'" in open_refusal(root)


@pytest.mark.parametrize("offset", [OFFSET + TABLE.nbytes - 3, 2**62])
def test_external_data_must_lie_inside_its_file(tmp_path, offset):
    """A tensor may not reach past the end of the weights."""
    model = tiny_model()
    model.graph.initializer.append(
        external("w", [1], location="weights.data", offset=str(offset), length="4")
    )
    assert f"tensor 'w' ends at byte {offset + 4:,}" in graph_refusal(tmp_path, model)


def test_external_data_may_be_shared(tmp_path):
    """Two tensors over the same bytes are wanted: lowerings share one weights file."""
    model = tiny_model()
    model.graph.initializer.append(
        external("w", [4], location="weights.data", offset=str(OFFSET), length="16")
    )
    Bundle.open(tiny_bundle(tmp_path, model=model))


def _renamed(side: str) -> onnx.ModelProto:
    model = tiny_model()
    getattr(model.graph, side)[0].name = "other"
    return model


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        (
            _renamed("input"),
            ["inputs.ids: the graph file has no such name", "inputs: 'other' of the graph file"],
        ),
        (
            _renamed("output"),
            ["outputs.logits: the graph file has no such", "outputs: 'other' of the graph file"],
        ),
    ],
    ids=["input", "output"],
)
def test_graph_names_must_be_the_wired_ones(tmp_path, model, messages):
    """Inputs and outputs of the file are exactly those of the wiring."""
    text = graph_refusal(tmp_path, model)
    for message in messages:
        assert message in text


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"ai.onnx": 21}, f"{DECODE}: imports 'ai.onnx' 20, declared as 21 in opsets"),
        ({"com.microsoft": 1}, f"{DECODE}: imports 'ai.onnx' 20, not declared in opsets"),
        (
            {"ai.onnx": 20, "com.microsoft": 1},
            "variants.fp32-ort.opsets.com.microsoft: no graph imports it",
        ),
    ],
)
def test_opsets_are_those_of_the_graphs(tmp_path, declared, message):
    """What the manifest promises to a backend is what its graphs need."""
    text = graph_refusal(tmp_path, tiny_model(), edit=lambda m: with_variant(m, opsets=declared))
    assert message in text


def test_compiled_engine_inside_a_graph_is_refused(tmp_path):
    """EPContext nodes carry native code, or the path of some."""
    model = tiny_model()
    model.graph.node.append(
        helper.make_node("EPContext", [], ["e"], domain="com.microsoft", ep_cache_context="/x")
    )
    assert "'com.microsoft::EPContext' holds a compiled engine" in graph_refusal(tmp_path, model)


def test_broken_graph_is_refused_naming_the_byte(tmp_path):
    """A sealed bundle around a broken graph: the walker's own message comes through."""
    root = tiny_bundle(tmp_path)
    (root / GRAPH).write_bytes((root / GRAPH).read_bytes()[:-1])
    manifest = replace(read_manifest(root), files=list_files(root))
    write_manifest(root, seal(manifest))
    with pytest.raises(EdgertError, match="not a sound ONNX file") as caught:
        Bundle.open(root)
    assert f"{root / GRAPH}, byte " in (caught.value.where or "")
