"""Bundles that many tests share, exported once per test run, a cache of its own, and the command.

A test that changes a bundle copies it first (`copied`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import HERE
from command import Result
from once import once

from edgert.spec import Lowering


@pytest.fixture(scope="session", autouse=True)
def _own_cache_directory(tmp_path_factory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGERT_CACHE_DIR", str(tmp_path_factory.mktemp("edgert-cache")))
        yield


@pytest.fixture(scope="session")
def model_a_checkpoint() -> Path:
    """The published-format checkpoint of case hagi/model_a: heads of 8, so rotary before the op."""
    return next((HERE / "hagi" / "model_a").glob("step-*.pt"))


@pytest.fixture(scope="session")
def model_a_bundle(tmp_path_factory, model_a_checkpoint) -> Path:
    """Case hagi/model_a, exported as a user would: both lowerings, no tokenizer."""
    from edgert.export.pipeline import export_source

    return once(tmp_path_factory, "model-a", lambda out: export_source(model_a_checkpoint, out))


@pytest.fixture(scope="session")
def looped_bundle(tmp_path_factory) -> Path:
    """Case hagi/model_d, stepped and unrolled, in both lowerings."""
    from edgert.export.pipeline import export_source

    source = next((HERE / "hagi" / "model_d").glob("step-*.pt"))
    return once(tmp_path_factory, "model-d", lambda out: export_source(source, out, unrolled=True))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory) -> Path:
    """`tiny_decoder.speaking`: heads of 16 (rotary inside the op), tokenizer, chat template."""
    from tiny_decoder import speaking

    from edgert.export.write import ExportOptions, export_bundle

    return once(
        tmp_path_factory, "tiny", lambda out: export_bundle(speaking(), out, ExportOptions())
    )


@pytest.fixture(scope="session")
def ladder_bundle(tmp_path_factory) -> Path:
    """The model of `tiny_bundle` in every precision, with keys and values of either kind."""
    from tiny_decoder import speaking

    from edgert.export.write import ExportOptions, export_bundle

    # a head of 8 bits: rounding random weights to fewer leaves little of what the model says
    schemes = {"int4": {"head": 8, "tuned": False}}
    options = ExportOptions("fp32,int8,int4", ("ort",), kv="fp32,int8", schemes=schemes)
    return once(tmp_path_factory, "ladder", lambda out: export_bundle(speaking(), out, options))


@pytest.fixture(scope="session")
def tiny_exported_bundle(tiny_bundle) -> Path:
    """The same bundle, under the name of tests that only care that it came out of an export."""
    return tiny_bundle


@pytest.fixture(scope="session")
def rope_bundle(tmp_path_factory) -> Path:
    """Case hrm/orig_rope_puzzle, a model that solves, in both lowerings: with a table of puzzles,
    and nothing that says what they are."""
    from edgert.export.pipeline import export_source

    source = HERE / "hrm" / "orig_rope_puzzle" / "step_1234"
    return once(
        tmp_path_factory,
        "rope",
        lambda out: export_source(source, out, settings={"seq_len": 25}),
    )


@pytest.fixture(scope="session")
def half_bundle(tmp_path_factory) -> Path:
    """`tiny_decoder.speaking` in every dialect for TensorRT, in fp32 and fp16."""
    from tiny_decoder import speaking

    from edgert.export.write import ExportOptions, export_bundle

    options = ExportOptions(precision="fp32,fp16", lowerings=_dialects())
    return once(tmp_path_factory, "half", lambda out: export_bundle(speaking(), out, options))


@pytest.fixture(scope="session")
def half_solver(tmp_path_factory) -> Path:
    """Case hrm/orig_rope_puzzle in portable graphs, in fp32 and fp16."""
    return _half(tmp_path_factory, "hrm/orig_rope_puzzle", "step_1234", {"seq_len": 25})


@pytest.fixture(scope="session")
def half_cycles(tmp_path_factory) -> Path:
    """Case hrm/bidir_cycle, which counts its cycles and adds up its signal, as `half_solver`."""
    return _half(tmp_path_factory, "hrm/bidir_cycle", "*_step_10000.pt", {"seq_len": 12})


@pytest.fixture(scope="session")
def half_looped(tmp_path_factory) -> Path:
    """Case hagi/model_d, a decoder with a loop, in every dialect for TensorRT, in fp32 and fp16."""
    return _half(tmp_path_factory, "hagi/model_d", "step-*.pt")


def _dialects() -> tuple[Lowering, ...]:
    """ONNX Runtime 1.23, the last for Python 3.10, runs no modern graphs."""
    from edgert.export.check import too_old

    return ("portable",) if too_old("modern") else ("portable", "modern")


def _half(tmp_path_factory, case: str, file: str, settings: dict[str, int] | None = None) -> Path:
    from edgert.export.pipeline import export_source

    (source,) = (HERE / case).glob(file)
    options = {"precision": "fp32,fp16", "lowerings": _dialects()}
    return once(
        tmp_path_factory,
        f"half-{case.replace('/', '-')}",
        lambda out: export_source(source, out, settings=settings, **options),
    )


@pytest.fixture(scope="session")
def copier_bundle(tmp_path_factory) -> Path:
    """`copier.copier`: a model that solves sudoku-4x4, where it is solved already."""
    from copier import copier

    from edgert.export.pipeline import export_source

    source = copier(tmp_path_factory.mktemp("copier") / "checkpoint")
    return once(
        tmp_path_factory,
        "sudoku4",
        lambda out: export_source(source, out, task="sudoku-4x4", lowerings=("ort",)),
    )


@pytest.fixture(scope="session")
def saved_session(tmp_path_factory, tiny_bundle) -> Path:
    """A session of `tiny_bundle`, saved behind an answer of 20 tokens."""
    import edgert

    out = tmp_path_factory.mktemp("sessions") / "story.session"
    with edgert.load(tiny_bundle) as model, model.session() as session:
        session.generate("the star", max_tokens=20)
        session.save(out)
    return out


@pytest.fixture
def copied(tmp_path) -> Callable[[Path], Path]:
    """A function that copies a bundle into the test's own folder, to be changed there."""

    def copy(bundle: Path) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / "copies" / bundle.name))

    return copy


@pytest.fixture
def run(capsys) -> Callable[..., Result]:
    """Run one command line in this process."""
    from edgert.cli import main

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def traced_once(monkeypatch, traces) -> None:
    """Exports of one small decoder, which a module's tests share, trace it once: that is what takes
    the time.
    """
    from edgert.export import write

    real = write.trace

    def trace(program, graph, lowering):
        if graph.name not in traces:
            traces[graph.name] = real(program, graph, lowering)
        return traces[graph.name].clone()

    monkeypatch.setattr(write, "trace", trace)


@pytest.fixture(scope="module")
def traces() -> dict[str, Any]:
    return {}
