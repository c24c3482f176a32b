"""A variant that keeps states in another dtype than the program's: checked, identified, run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import tiny_bundle, tiny_manifest, with_variant
from fake_loop import looped_manifest
from fake_model import PROMPT, fake_model, manifest

import edgert
from edgert.bundle import read_manifest, write_manifest
from edgert.errors import BadBundle, Incompatible
from edgert.model import choose_variant
from edgert.spec import Manifest, StateSpec, VariantSpec
from edgert.wiring import wiring_problems

DTYPES = "variants.fp32-ort.state_dtypes"


def halved(made: Manifest, **other: str) -> Manifest:
    """The tiny manifest, whose variant keeps `k.0` in half precision."""
    changed = with_variant(made, state_dtypes={"k.0": "float16"} | other)
    return replace(changed, format_version=4)


def rewrite(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON without any check."""
    value = json.loads((root / "manifest.json").read_text())
    edit(value)
    (root / "manifest.json").write_text(json.dumps(value))


def test_the_states_of_a_variant_are_those_of_the_program_but_for_their_dtype(tmp_path) -> None:
    """Any known dtype, whatever backend will keep it; read back as it was written."""
    root = tiny_bundle(tmp_path, edit=halved)
    made = read_manifest(root)
    assert json.loads((root / "manifest.json").read_text())["format_version"] == 4
    want = made.states | {"k.0": replace(made.states["k.0"], dtype="float16")}
    assert made.states_of("fp32-ort") == want
    assert list(made.states_of("fp32-ort")) == list(made.states)
    assert made.kv_of("fp32-ort") == "fp16"


def test_identity_of_the_variant_changes_and_that_of_the_model_does_not(tmp_path) -> None:
    plain = read_manifest(tiny_bundle(tmp_path, name="plain"))
    half = read_manifest(tiny_bundle(tmp_path, name="half", edit=halved))
    assert plain.model_id == half.model_id
    assert plain.variants["fp32-ort"].variant_id != half.variants["fp32-ort"].variant_id


def test_a_bundle_without_such_a_variant_is_written_as_before(tmp_path) -> None:
    """Neither a key nor a version more: what older versions wrote and read."""
    root = tiny_bundle(tmp_path)
    text = (root / "manifest.json").read_text()
    assert json.loads(text)["format_version"] == 1
    assert "state_dtypes" not in text
    write_manifest(root, read_manifest(root))
    assert (root / "manifest.json").read_text() == text


def test_only_version_4_has_the_key_and_it_must_have_it(tmp_path) -> None:
    root = tiny_bundle(tmp_path, edit=halved)
    rewrite(root, lambda value: value.update(format_version=3))
    with pytest.raises(BadBundle, match=rf"{DTYPES}: unknown key"):
        read_manifest(root)
    rewrite(root, lambda value: value.update(format_version=4))
    read_manifest(root)
    rewrite(root, lambda value: value["variants"]["fp32-ort"].pop("state_dtypes"))
    with pytest.raises(BadBundle, match=rf"{DTYPES}: missing"):
        read_manifest(root)


WRONG: list[tuple[Any, str]] = [
    ({"k.9": "int8"}, r"\.k\.9: there is no such state"),
    ({"lens": "int32"}, r"\.lens: a counter is int64 in every variant"),
    ({"k.0": "float8"}, r"\.k\.0: 'float8' is not one of"),
    ({"k.0": 8}, r"\.k\.0: 8 is not one of"),
    ({"k 0": "int8"}, "is not a usable name"),
    (["k.0"], "a list is not an object"),
    (None, "null is not an object"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_dtypes_that_cannot_be_are_refused(given, message, tmp_path) -> None:
    root = tiny_bundle(tmp_path, edit=halved)
    rewrite(root, lambda value: value["variants"]["fp32-ort"].update(state_dtypes=given))
    with pytest.raises(BadBundle, match=message):
        read_manifest(root)


def test_an_initial_value_has_one_dtype() -> None:
    """The file could be of one of the two only."""
    carry = StateSpec("carry", "float32", ("batch", 4), init="z.npy")
    made = tiny_manifest()
    made = replace(halved(made, z="float16"), states=made.states | {"z": carry})
    assert f"{DTYPES}.z: its initial value is a file, which has one dtype" in wiring_problems(made)


def test_states_that_take_turns_must_be_alike_in_the_variant() -> None:
    """Iterations of a body read one graph's input: it has one dtype."""
    made = looped_manifest()
    kept = [name for name, state in made.states.items() if state.kind == "append"]
    for names, alike in ((kept[:1], False), (kept, True)):
        changed = with_variant(made, state_dtypes=dict.fromkeys(names, "float16"))
        found = [p for p in wiring_problems(changed) if "its states are not alike" in p]
        assert bool(found) != alike


def test_the_runtime_keeps_states_as_the_variant_has_them() -> None:
    """Allocated, and refused where a saved session has another dtype."""
    plain = manifest().variants["fp32-ort"]
    narrow = {"fp32-ort": replace(plain, state_dtypes={"kept": "int32"})}
    model = fake_model(variants=narrow)
    execution = model.runner.open()
    states = execution.states
    assert states.buffers["kept"].dtype == np.int32
    next(iter(execution.feed(np.array(PROMPT))))
    saved = states.export()
    assert saved["kept"].tolist() == [PROMPT]
    with pytest.raises(ValueError, match="'kept' is int64.*, not int32"):
        states.restore(saved | {"kept": saved["kept"].astype(np.int64)})
    states.restore(saved)


def variants(**kept: str) -> dict[str, VariantSpec]:
    """Name with '_' for '-' -> a variant whose keys are kept like that."""
    made = {}
    for name, dtype in kept.items():
        precision, lowering = name.split("_")[0], name.split("_")[-1]
        dtypes = {} if dtype == "float32" else {"k.0": dtype}
        made[name.replace("_", "-")] = VariantSpec(
            precision,
            lowering,  # type: ignore[arg-type]
            {},
            {},
            state_dtypes=dtypes,
        )
    return made


KV = {"k.0": StateSpec("append", "float32", ("batch", "capacity"), "capacity", "lens")}


@pytest.mark.parametrize(
    ("kept", "precision", "kv", "chosen"),
    [
        ({"fp32_kv8_ort": "int8", "fp32_ort": "float32"}, None, None, "fp32-ort"),
        ({"fp32_kv8_ort": "int8", "fp32_portable": "float32"}, None, None, "fp32-portable"),
        ({"fp32_kv8_ort": "int8", "fp32_kv16_ort": "float16"}, None, None, "fp32-kv16-ort"),
        ({"fp32_kv8_ort": "int8"}, None, None, "fp32-kv8-ort"),
        ({"fp32_kv8_ort": "int8", "fp32_ort": "float32"}, None, "int8", "fp32-kv8-ort"),
        ({"fp32_ort": "float32", "int4_kv8_ort": "int8"}, None, "int8", "int4-kv8-ort"),
        ({"int4_ort": "float32", "int4_kv8_ort": "int8"}, "int4", "int8", "int4-kv8-ort"),
    ],
)
def test_keys_and_values_in_float32_are_the_default(kept, precision, kv, chosen) -> None:
    """Precision before keys and values, and these before speed."""
    made = manifest(variants=variants(**kept), states=KV)
    assert choose_variant(made, "cpu", precision, kv=kv) == chosen


def test_what_is_not_there_is_said() -> None:
    made = manifest(variants=variants(fp32_ort="float32"), states=KV)
    with pytest.raises(Incompatible, match="no variant fp32 with int8 keys and values") as caught:
        choose_variant(made, "cpu", "fp32", kv="int8")
    assert "fp32-ort" in str(caught.value.do)


def test_room_for_a_session_is_made_at_once() -> None:
    """And not more than the model's context."""
    model = fake_model()
    context = model.manifest.context
    with model.session(room=context) as session:
        assert session.execution.states.capacity == context
    with pytest.raises(edgert.CapacityExceeded):
        model.session(room=context + 1)
