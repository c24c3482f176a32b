"""`edgert build`: the plan as a table and as an object, and what it says where it cannot build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import tiny_bundle, with_variant

BUILD = ("--target", "orin-nano-jp6", "--precision", "fp32")


@pytest.fixture
def bundle(tmp_path) -> Path:
    """The bundle that counts, as a portable one."""
    return tiny_bundle(tmp_path, edit=lambda m: with_variant(m, lowering="portable"))


def test_a_dry_run_prints_the_plan(run, bundle):
    """Target, variant, each graph with its shape profiles, and the memory: nothing is built."""
    result = run("build", bundle, *BUILD, "--dry-run")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("target    orin-nano-jp6: Jetson Orin Nano 8 GB")
    assert "tensorrt 10.3 · SM 8.7" in lines[0]
    assert lines[1] == "variant   fp32-ort of tiny"
    assert lines[2].startswith("graph     decode: ")
    assert lines[3].split() == ["prefill", "min", "opt", "max"]
    assert ["ids", "int64", "1x1", "1x64", "1x64"] in [line.split() for line in lines]
    assert lines[-2].startswith("memory    ")
    assert lines[-1].startswith("building  about 1.03 GB")


def test_a_dry_run_is_one_object(run, bundle):
    result = run("build", bundle, *BUILD, "--dry-run", "--json")
    told = json.loads(result.out)
    assert (told["target"], told["variant"]) == ("orin-nano-jp6", "fp32-ort")
    assert "engines" not in told


def test_without_tensorrt_it_says_what_to_install(run, bundle, monkeypatch):
    """Exit code 4, the way to it, and the two verbs that work without."""
    from edgert.doctor.machine import Machine

    monkeypatch.setattr("edgert.build.device.Machine", lambda: Machine(found=lambda name: False))
    result = run("build", bundle, *BUILD)
    assert result.code == 4
    assert "TensorRT is not installed" in result.err
    assert "sudo apt install nvidia-jetpack" in result.err
    assert "--dry-run" in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--target", "orin"), 2, "there is no target 'orin'"),
        ((), 2, "Missing option '--target'"),
        (("--target", "orin-nano-jp6", "--precision", "fp16"), 4, "takes portable graphs in fp16"),
    ],
)
def test_what_cannot_be_is_refused(run, bundle, arguments, code, message):
    result = run("build", bundle, *arguments, "--dry-run")
    assert result.code == code
    assert message in result.err


def test_too_little_memory_is_exit_code_5(run, bundle, tmp_path):
    from wheels import ROOT

    text = (ROOT / "engines" / "orin-nano-jp6.toml").read_text()
    small = tmp_path / "small.toml"
    small.write_text(text.replace("memory_mb = 5000", "memory_mb = 900"))
    result = run("build", bundle, "--target", small, "--precision", "fp32", "--dry-run")
    assert result.code == 5
    assert "small has 900 MB" in result.err
