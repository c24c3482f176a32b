"""Identities: what defines a model or a variant changes them, nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from bundles import DATA, GRAPH, tiny_manifest, wired, with_variant

from edgert.bundle import model_id, seal, variant_id
from edgert.errors import BadBundle
from edgert.spec import FileEntry, Manifest, ProgramSpec, TokenizerSpec


def ids(manifest: Manifest) -> tuple[str, str]:
    return model_id(manifest), variant_id(manifest, "fp32-ort")


def sealed() -> Manifest:
    names = (GRAPH, DATA, "chat_template.jinja", "reports/parity.json", "k.npy")
    files = {name: FileEntry(f"{i}c" * 32, 5) for i, name in enumerate(names)}
    return seal(replace(tiny_manifest(), files=files))


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
