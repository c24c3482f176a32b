"""`edgert selfcheck`: sound bundles pass; one spoilt graph is found, and the check that finds it is
named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from wheels import ROOT

from edgert import selfcheck as package
from edgert.bench import power
from edgert.bundle import list_files, read_manifest, seal, write_manifest
from edgert.errors import GateFailed
from edgert.selfcheck import sessions, speed

SOLVER = ROOT / "examples" / "hrm-sudoku4"
NAMES = ["files", "parity", "halting", "session", "latency", "power"]


@pytest.fixture
def bundle(request) -> Path:
    """The bundle of the parameter's name."""
    if request.param == "solver":
        return SOLVER
    return Path(request.getfixturevalue(f"{request.param}_bundle"))


def changed(root: Path, variant: str, part: str, change: Callable[[Any, Any], None]) -> None:
    """Change one graph of one variant, and seal the bundle again, so that it loads."""
    manifest = read_manifest(root)
    name = getattr(manifest.program, part) or manifest.program.epilogue
    spec = manifest.variants[variant].graphs[name]
    model = onnx.load(root / spec.file)  # with its weights: they are its own from now on
    change(model, spec)
    onnx.save(model, root / spec.file)
    graphs = manifest.variants[variant].graphs | {name: replace(spec, data=())}
    variants = manifest.variants | {variant: replace(manifest.variants[variant], graphs=graphs)}
    write_manifest(root, seal(replace(manifest, variants=variants, files=list_files(root))))


def spoil_weights(model: Any, spec: Any) -> None:
    """The largest matrix of the graph a little off."""
    matrices = [i for i in model.graph.initializer if len(i.dims) == 2]
    largest = max(matrices, key=lambda i: int(np.prod(i.dims)))
    values = numpy_helper.to_array(largest).copy()
    if values.dtype.kind == "f":
        values += np.float32(0.5) * values.std() * np.sign(values)
    else:
        values = np.roll(values, 1, axis=0)
    largest.CopyFrom(numpy_helper.from_array(values, largest.name))


def spoil_signal(model: Any, spec: Any) -> None:
    """What the loop ends by is scaled; logits stay as they are."""
    port = next(p for p, to in spec.outputs.items() if "signal." in str(to))
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == port:
                node.output[index] = "unscaled"
    scale = numpy_helper.from_array(np.float32(-3.0), "scale")
    model.graph.initializer.append(scale)
    model.graph.node.append(helper.make_node("Mul", ["unscaled", "scale"], [port]))


def statuses(value: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in value["checks"]}


@pytest.mark.parametrize("bundle", ["tiny", "ladder", "looped", "solver"], indirect=True)
def test_a_sound_bundle_passes(bundle, run, tmp_path):
    """Every check but power, where there are no rails; halting where there is a loop."""
    result = run("selfcheck", bundle, "--json", "-q", "-o", tmp_path / "report.json")
    assert result.code == 0, result.err + result.out
    value = json.loads(result.out)
    assert json.loads((tmp_path / "report.json").read_text()) == value
    found = statuses(value)
    assert list(found) == NAMES
    loops = read_manifest(bundle).program.loop is not None
    assert found.pop("halting") == ("ok" if loops else "skipped")
    assert found.pop("power") == "skipped" or power.find_rails()
    assert set(found.values()) == {"ok"}
    assert value["ok"] is True
    assert value["bundle"]["model_id"] == read_manifest(bundle).model_id


def test_all_variants_are_compared(looped_bundle, run):
    """Four variants: each with itself step by step, and three with the first."""
    value = json.loads(run("selfcheck", looped_bundle, "--json", "-q").out)
    (parity,) = (check for check in value["checks"] if check["name"] == "parity")
    pairs = {(c["variant"], c["against"]) for c in parity["figures"]["comparisons"]}
    assert len(pairs) == 7
    assert ("fp32-portable-unrolled", "fp32-ort") in pairs
    (halting,) = (check for check in value["checks"] if check["name"] == "halting")
    steps = halting["figures"]["steps"]
    assert steps.keys() == {"fp32-ort", "fp32-portable"}
    settled, fixed = (found["iterations"] for found in steps["fp32-ort"].values())
    assert len(set(settled)) > 1  # the threshold tells tokens apart
    assert set(fixed) == {1}


@pytest.mark.parametrize(
    ("bundle", "variant", "part"),
    [
        ("tiny", "fp32-portable", "epilogue"),
        ("tiny", "fp32-ort", "epilogue"),
        ("ladder", "int8-ort", "epilogue"),
        ("looped", "fp32-portable", "body"),
        ("looped", "fp32-ort-unrolled", "epilogue"),
        ("solver", "fp32-portable", "body"),
    ],
    indirect=["bundle"],
)
def test_one_spoilt_graph_is_found(bundle, variant, part, copied, run):
    """Its bundle loads, its hashes are right, and parity fails with the variant's name."""
    root = copied(bundle)
    changed(root, variant, part, spoil_weights)
    assert run("verify", root).code == 0
    result = run("selfcheck", root, "--json", "-q")
    assert result.code == 1, result.out
    value = json.loads(result.out)
    assert value["ok"] is False
    assert statuses(value)["parity"] == "failed"
    assert "does not do here what it should: parity" in result.err
    (parity,) = (check for check in value["checks"] if check["name"] == "parity")
    assert variant in parity["said"]


@pytest.mark.parametrize("bundle", ["tiny"], indirect=True)
def test_what_is_no_number_is_found(bundle, copied, run):
    """Of weights that are NaN nothing can be compared, which is a failure and no crash."""

    def spoil(model: Any, spec: Any) -> None:
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT:
                values = np.full(tuple(tensor.dims), np.nan, np.float32)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    root = copied(bundle)
    changed(root, "fp32-portable", "epilogue", spoil)
    result = run("selfcheck", root, "--json", "-q")
    assert result.code == 1
    (parity,) = (c for c in json.loads(result.out)["checks"] if c["name"] == "parity")
    assert parity["status"] == "failed"
    assert "not a number" in parity["said"]


@pytest.mark.parametrize("bundle", ["looped", "solver"], indirect=True)
def test_a_loop_that_ends_elsewhere_is_found(bundle, copied, run):
    """Only the signal of one lowering is off: parity holds, halting fails."""
    root = copied(bundle)
    changed(root, "fp32-portable", "body", spoil_signal)
    result = run("selfcheck", root, "--json", "-q")
    assert result.code == 1
    found = statuses(json.loads(result.out))
    assert (found["parity"], found["halting"]) == ("ok", "failed")
    assert "should: halting" in result.err


def test_a_session_that_goes_on_otherwise_is_found(tiny_bundle, run, monkeypatch):
    real = sessions.fresh_process

    def other(*given: Any) -> list[Any]:
        tokens = real(*given)
        return [*tokens[:3], tokens[3] + 1, *tokens[4:]]

    monkeypatch.setattr(sessions, "fresh_process", other)
    result = run("selfcheck", tiny_bundle, "-q")
    assert result.code == 1
    assert f"a resumed session differs from token {sessions.FIRST + 3} on" in result.out
    assert "should: session\n" in result.err


def test_a_bench_that_is_not_the_model_is_found(tiny_bundle, run, monkeypatch):
    """The checks behind it are still run."""

    def bench(*given: Any, **options: Any) -> None:
        raise GateFailed("token 3 is another one", where="here")

    monkeypatch.setattr(speed, "bench", bench)
    result = run("selfcheck", tiny_bundle, "--json", "-q")
    assert result.code == 1
    found = statuses(json.loads(result.out))
    assert (found["session"], found["latency"], found["power"]) == ("ok", "failed", "skipped")


@pytest.mark.parametrize("bundle", ["tiny", "solver"], indirect=True)
def test_power_is_reported_where_there_are_rails(bundle, run, monkeypatch):
    """5 W on the rail of all power and 1 W on a part of it."""
    monkeypatch.setattr(
        power,
        "find_meter",
        lambda *_: power.Meter("INA3221 (hwmon)", lambda: {"VDD_IN": 5000.0, "VDD_SOC": 1000.0}),
    )
    value = json.loads(run("selfcheck", bundle, "--json", "-q").out)
    (found,) = (check for check in value["checks"] if check["name"] == "power")
    assert (found["status"], found["said"]) == (
        "ok",
        "VDD_IN 5000 mW on average, from INA3221 (hwmon)",
    )
    assert found["figures"]["rails"]["VDD_SOC"]["mean_mw"] == pytest.approx(1000)
    assert found["figures"]["energy_j"] > 0


@pytest.fixture(scope="module")
def report(looped_bundle, tmp_path_factory) -> Path:
    """The report of the sound looped bundle."""
    file = tmp_path_factory.mktemp("report") / "report.json"
    file.write_text(json.dumps(package.selfcheck(looped_bundle).to_json()))
    return file


def test_the_same_answers_elsewhere_are_expected(looped_bundle, report, run):
    value = json.loads(run("selfcheck", looped_bundle, "--expect", report, "--json", "-q").out)
    assert value["ok"] is True
    (found,) = (check for check in value["checks"] if check["name"] == "expected")
    assert found["status"] == "ok"
    assert found["figures"]["compared"] > 4 * 12


def test_weights_that_are_wrong_in_all_variants_alike_need_another_report(
    looped_bundle, report, copied, run
):
    """Without one such a bundle agrees with itself; with one it does not."""
    root = copied(looped_bundle)
    file = root / "variants/fp32/weights.data"
    weights = np.frombuffer(file.read_bytes(), np.float32).copy()
    weights[: len(weights) // 2] *= np.float32(1.3)
    file.write_bytes(weights.tobytes())
    write_manifest(root, seal(replace(read_manifest(root), files=list_files(root))))
    assert run("selfcheck", root, "-q").code == 0
    result = run("selfcheck", root, "--expect", report, "-q")
    assert result.code == 1
    assert "should: expected" in result.err


def test_other_iterations_elsewhere_are_found(looped_bundle, report, tmp_path, run):
    value = json.loads(report.read_text())
    steps = value["answers"]["fp32-ort"]["steps"]
    policy = next(iter(steps))
    steps[policy][2] += 1
    (tmp_path / "r.json").write_text(json.dumps(value))
    result = run("selfcheck", looped_bundle, "--expect", tmp_path / "r.json", "-q")
    assert result.code == 1
    assert f"fp32-ort, {policy}: iterations differ" in result.out


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [("{}", 3, "not a report of edgert selfcheck"), ("no JSON", 3, "not a report"), (None, 4, "")],
)
def test_what_is_no_report_of_this_model_is_refused(
    text, code, said, tiny_bundle, report, run, tmp_path
):
    """None: the report of another model."""
    file = report
    if text is not None:
        file = tmp_path / "r.json"
        file.write_text(text)
    result = run("selfcheck", tiny_bundle, "--expect", file, "-q")
    assert result.code == code
    assert (said or "the report is another model's") in result.err


def test_a_damaged_bundle_is_refused(tiny_bundle, copied, run):
    """Hashes come first, and nothing else is tried."""
    root = copied(tiny_bundle)
    with open(root / "variants/fp32/weights.data", "r+b") as file:
        file.write(b"other")
    result = run("selfcheck", root, "-q")
    assert result.code == 3


def test_the_report_names_no_place_of_its_owner(tiny_bundle):
    """Neither the interpreter's path, nor the bundle's, nor the host's name."""
    import socket

    text = json.dumps(package.selfcheck(tiny_bundle).to_json())
    assert str(tiny_bundle) not in text
    assert sys.executable not in text
    assert socket.gethostname() not in text


def test_it_needs_no_author_package(tiny_bundle):
    """It runs on the slim runtime: neither torch nor onnx is loaded."""
    code = (
        "import sys\nfrom edgert.cli import main\n"
        f"code = main(['selfcheck', {str(tiny_bundle)!r}, '-q'])\n"
        "print('LOADED', code, *{'torch', 'onnx', 'onnxscript'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.stdout.splitlines()[-1] == "LOADED 0", result.stderr
