"""`edgert doctor`: what it says of machines that are given to it as trees of files.

The trees are written after NVIDIA's documented formats, not copied from boards; no driver is asked
but stand-ins. Only the last tests look at this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgert.doctor import PROBES, Machine, Report, Row, Setting, examine
from edgert.doctor.jetson import l4t_version
from edgert.doctor.machine import MAX_READ, cuda_says
from edgert.errors import EdgertError

RELEASE = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, "
    "DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
)
MEMINFO = (
    "MemTotal:        7802168 kB\nMemFree: 1 kB\nMemAvailable:    5954560 kB\nSwapTotal: 0 kB\n"
)
HWMON = "sys/class/hwmon/hwmon1"

BOARD = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"

ORIN_NANO: dict[str, str | bytes] = {
    "etc/nv_tegra_release": RELEASE,
    "proc/device-tree/model": BOARD.encode() + b"\0",
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "0::/user.slice/session-1.scope\n",
    "sys/fs/cgroup/user.slice/memory.max": "max\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "schedutil\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1": b"\x7fELF",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10": b"\x7fELF",
    "dev/nvhost-ctrl-gpu": "",
    f"{HWMON}/name": "ina3221\n",
    **{
        f"{HWMON}/{name}": text
        for number, label in enumerate(("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), 1)
        for name, text in (
            (f"in{number}_label", f"{label}\n"),
            (f"in{number}_input", "5000\n"),
            (f"curr{number}_input", "800\n"),
        )
    },
}
PC: dict[str, str | bytes] = {
    "proc/cpuinfo": "processor : 0\nmodel name : A Processor 3000\n",
    "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\nSwapTotal: 2000000 kB\n",
    "proc/self/cgroup": "0::/\n",
}
ORIN_GPU = {"code": 0, "devices": 1, "version": 12060, "name": "Orin", "sm": [8, 7]}

Tree = Callable[..., Machine]


@pytest.fixture
def tree(tmp_path) -> Tree:
    """A function that writes files below a root of its own, and gives the machine they make."""

    def write(files: dict[str, str | bytes], **given: Any) -> Machine:
        root = tmp_path / "root"
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        root.mkdir(exist_ok=True)
        packages = {"found": lambda name: False, "environ": {}, "cuda": no_cuda}
        return Machine(root, **packages | given)

    return write


def no_cuda(library: Path) -> dict[str, object]:
    raise AssertionError(f"the driver {library} was asked")


def row(report: Report, name: str) -> Row:
    (found,) = (row for row in report.rows if row.name == name)
    return found


# ------------------------------------------------------------- whole machines


def test_a_jetson_with_jetpack_6_2(tree):
    """Board, JetPack, power mode, clocks, rails, driver; TensorRT that the environment hides."""
    machine = tree(ORIN_NANO, cuda=lambda library: ORIN_GPU)
    report = examine(machine)
    said = {r.name: (r.finding, r.status) for r in report.rows}
    assert said["Jetson"] == (BOARD, "ok")
    assert said["JetPack"] == ("6.2 (L4T 36.4.3)", "ok")
    assert said["CUDA driver"] == ("1 × Orin · SM 8.7 · CUDA 12.6", "ok")
    assert said["power mode"] == ("MAXN_SUPER", "ok")
    assert said["governor"] == ("schedutil", "ok")
    assert said["power rails"] == ("VDD_IN, VDD_CPU_GPU_CV, VDD_SOC", "ok")
    assert said["memory"] == ("6.1 GB available of 8.0 GB", "ok")
    assert said["cpu"][0].startswith(BOARD)
    assert said["TensorRT"] == ("libnvinfer.so.10 is there, its Python module is not", "warning")
    assert "--system-site-packages" in (row(report, "TensorRT").do or "")


def test_a_pc_without_a_gpu(tree):
    """Nothing of it is an error, and nothing is asked that is not there."""
    report = examine(tree(PC))
    said = {r.name: (r.finding, r.status) for r in report.rows}
    assert said["CUDA driver"] == said["TensorRT"] == ("not found", "missing")
    assert "not needed" in (row(report, "CUDA driver").do or "")
    assert said["JetPack"] == ("not a Jetson", "ok")
    assert said["power rails"][0].startswith("none: power is not measured")
    assert said["memory"] == ("8.2 GB available of 16.4 GB · 2.0 GB swap", "ok")
    assert said["cpu"][0].startswith("A Processor 3000 · ")
    assert not {"Jetson", "power mode"} & said.keys()
    assert report.lacking == []


def test_an_empty_root(tree):
    """Each thing that the kernel does not say is a row, too."""
    report = examine(tree({}))
    assert row(report, "memory") == Row(
        "memory", "/proc/meminfo does not say", "warning", "is /proc mounted?"
    )
    assert row(report, "governor").finding == "the kernel names none"


def test_files_full_of_rubbish(tree):
    """Binary, endless and cut-off files change findings, and raise nothing."""
    rubbish = os.urandom(2 * MAX_READ)
    report = examine(tree(dict.fromkeys(ORIN_NANO, rubbish), cuda=lambda library: {}))
    assert row(report, "JetPack").status == "warning"
    assert row(report, "JetPack").finding.startswith("unknown: ")
    assert row(report, "power mode").finding == "not readable"
    assert row(report, "memory").status == "warning"
    for found in report.rows:
        assert found.finding.isprintable()
        assert len(found.finding) <= 500


@pytest.mark.parametrize("name", ["etc/nv_tegra_release", "proc/meminfo", "proc/self/cgroup"])
def test_a_probe_that_fails_is_a_row(tree, name):
    """A folder where a file should be; the other probes still answer."""
    machine = tree({key: text for key, text in ORIN_NANO.items() if key != name})
    (machine.root / name).mkdir(parents=True)
    report = examine(machine)
    failed = [r for r in report.rows if r.finding.startswith("could not be examined: ")]
    assert failed
    assert all(
        f"/{name} is not a regular file" in r.finding for r in failed if r.name != "CUDA driver"
    )
    assert {r.status for r in failed} == {"warning"}
    assert row(report, "onnxruntime").status == "ok"


def test_a_pipe_is_not_waited_for(tree):
    """Nobody writes to it."""
    machine = tree({})
    (machine.root / "etc").mkdir()
    os.mkfifo(machine.root / "etc/nv_tegra_release")
    report = examine(machine)
    assert "not a regular file" in row(report, "JetPack").finding


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tree):
    machine = tree(ORIN_NANO)
    (machine.root / "etc/nv_tegra_release").chmod(0)
    assert "PermissionError" in row(examine(machine), "JetPack").finding


def test_rows_before_a_failure_stay(tree, monkeypatch):
    """What a probe said before it failed is kept."""

    def probe(machine):
        yield Row("half", "done")
        raise RuntimeError("broken\x1b[2J")

    monkeypatch.setattr("edgert.doctor.PROBES", {"whole": probe})
    rows = examine(tree({})).rows
    assert rows[0] == Row("half", "done")
    assert rows[1].finding == "could not be examined: RuntimeError: broken�[2J"


# ------------------------------------------------------------- Jetson


@pytest.mark.parametrize(
    ("release", "version", "finding", "status"),
    [
        ("# R36 (release), REVISION: 3.0, GCID", "36.3.0", "6.0 (L4T 36.3.0)", "warning"),
        ("# R36 (release), REVISION: 4.0, GCID", "36.4.0", "6.1 (L4T 36.4.0)", "ok"),
        ("# R36 (release), REVISION: 4.7, GCID", "36.4.7", "6.2.1 (L4T 36.4.7)", "ok"),
        ("# R36 (release), REVISION: 5.0, GCID", "36.5.0", "6.2.2 (L4T 36.5.0)", "ok"),
        ("# R38 (release), REVISION: 2.1, GCID", "38.2.1", "7.0 (L4T 38.2.1)", "ok"),
        ("# R38 (release), REVISION: 4.0, GCID", "38.4.0", "7.1 (L4T 38.4.0)", "ok"),
        ("# R39 (release), REVISION: 2.0, GCID", "39.2.0", "7.2 (L4T 39.2.0)", "ok"),
        ("# R36 (release), REVISION: 4.9, GCID", "36.4.9", "of unknown version (L4T 36.4.9)", "ok"),
        ("# R35 (release), REVISION: 5.0", "35.5.0", "of unknown version (L4T 35.5.0)", "warning"),
        ("# R36 (release), REVISION: ,", None, "unknown: # R36 (release), REVISION: ,", "warning"),
        ("", None, "unknown: ", "warning"),
    ],
)  # fmt: skip
def test_l4t_is_translated_to_jetpack(tree, release, version, finding, status):
    """By its whole version, else by its first two numbers; what is not known is said."""
    assert l4t_version(release) == version
    found = row(examine(tree({"etc/nv_tegra_release": release})), "JetPack")
    assert (found.finding, found.status) == (finding, status)


def test_a_container_on_a_jetson_that_lacks_the_release_file(tree):
    found = row(examine(tree({"proc/device-tree/model": "NVIDIA Jetson AGX Orin\0"})), "JetPack")
    assert (found.finding, found.status) == ("/etc/nv_tegra_release is absent", "warning")
    assert "mount it" in (found.do or "")


def test_a_jetson_without_rails_or_mode_is_warned_about(tree):
    report = examine(tree({"etc/nv_tegra_release": RELEASE}))
    assert row(report, "power rails").status == "warning"
    assert row(report, "power mode") == Row(
        "power mode", "not readable", "warning", "ask with: sudo nvpmodel -q"
    )
    assert row(report, "TensorRT").do == "sudo apt install nvidia-jetpack"


def test_a_power_mode_without_a_name_has_its_number(tree):
    files = {"etc/nv_tegra_release": RELEASE, "var/lib/nvpmodel/status": "pmode:0003"}
    assert row(examine(tree(files)), "power mode").finding == "number 3"


def test_tensorrt_is_found_without_being_imported(tree):
    """By its place and the version of its package."""
    versions = {"tensorrt": "10.3.0"}
    report = examine(tree({}, found=lambda name: name == "tensorrt", version=versions.get))
    finding = row(report, "TensorRT").finding
    assert finding == "10.3.0 · used by edgert build, and by --device tensorrt"
    assert row(report, "cuda-bindings").do == "pip install 'edgert[tensorrt]'"
    assert "tensorrt" not in sys.modules
    nameless = examine(tree({}, found=lambda name: name == "tensorrt", version=lambda name: None))
    assert row(nameless, "TensorRT").finding.startswith("of unknown version")


# ------------------------------------------------------------- the driver

LIBRARY = "usr/lib/x86_64-linux-gnu/libcuda.so.1"


@pytest.mark.parametrize(
    ("files", "finding"),
    [
        ({LIBRARY: ""}, "libcuda.so.1 is there, a device in /dev is not"),
        ({"dev/nvidiactl": ""}, "/dev/nvidiactl is there, libcuda.so.1 is not"),
    ],
)
def test_half_a_driver_is_not_asked(tree, files, finding):
    """`tree`'s driver fails the test if it is."""
    found = row(examine(tree(files)), "CUDA driver")
    assert (found.finding, found.status) == (finding, "warning")
    assert "--runtime nvidia" in (found.do or "")


@pytest.mark.parametrize(
    ("said", "finding", "status"),
    [
        (
            {"code": 35},
            "cuInit says 35: there is no driver, or it is too old for its library",
            "warning",
        ),
        ({"code": 100}, "cuInit says 100: there is no device", "warning"),
        ({"code": 999}, "cuInit says 999: see cudaError_enum", "warning"),
        ({"code": 0, "devices": 0, "version": 12040}, "0 × device · CUDA 12.4", "warning"),
        (
            {"code": 0, "devices": 2, "version": 13000, "name": "Thor", "sm": [11, 0]},
            "2 × Thor · SM 11.0 · CUDA 13.0",
            "ok",
        ),
    ],
)
def test_what_the_driver_says(tree, said, finding, status):
    files = {LIBRARY: "", "dev/nvidia0": ""}
    found = row(examine(tree(files, cuda=lambda library: said)), "CUDA driver")
    assert (found.finding, found.status) == (finding, status)


def test_visible_devices_are_shown(tree):
    machine = tree(ORIN_NANO, cuda=lambda _: ORIN_GPU, environ={"CUDA_VISIBLE_DEVICES": "0"})
    assert row(examine(machine), "CUDA driver").finding.endswith("CUDA_VISIBLE_DEVICES=0")


FAKE_DRIVER = """
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int cuInit(unsigned flags) { INIT; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDriverGetVersion(int *n) { *n = 12060; return 0; }
int cuDeviceGetName(char *name, int room, int device) { strncpy(name, "Fake", room); return 0; }
int cuDeviceGetAttribute(int *n, int which, int device) { *n = which == 75 ? 8 : 7; return 0; }
"""


def driver(folder: Path, init: str) -> Path:
    """A libcuda.so.1 whose cuInit does this."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source, library = folder / "fake.c", folder / "libcuda.so.1"
    source.write_text(FAKE_DRIVER)
    flags = ["-shared", "-fPIC", f"-DINIT={init}"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True, timeout=60)
    return library


def test_a_driver_is_asked_in_a_process_of_its_own(tmp_path):
    said = cuda_says(driver(tmp_path, "(void)0"))
    assert said == {"code": 0, "devices": 1, "version": 12060, "name": "Fake", "sm": [8, 7]}


def test_a_driver_that_refuses(tmp_path):
    assert cuda_says(driver(tmp_path, "return 35")) == {"code": 35}


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("abort()", "cuInit kills its process with signal 6"),
        ("sleep(60)", "cuInit does not return within 2 s"),
        ("exit(3)", "the library cannot be used"),
    ],
)
def test_a_driver_that_crashes_or_hangs_harms_nobody(tmp_path, init, message):
    with pytest.raises(EdgertError, match=message):
        cuda_says(driver(tmp_path, init), timeout_s=2)


def test_what_is_no_driver_is_said(tree):
    """A file of the right name that cannot be loaded."""
    machine = tree({LIBRARY: "text", "dev/nvidia0": ""}, cuda=cuda_says)
    found = row(examine(machine), "CUDA driver")
    assert found.status == "warning"
    assert found.finding.startswith("could not be examined: the library cannot be used: OSError")


# ------------------------------------------------------------- memory and cores


@pytest.mark.parametrize(
    ("files", "finding"),
    [
        (
            {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "2000000000\n"},
            "allows 2.0 GB",
        ),
        (
            {"proc/self/cgroup": "0::/unseen\n", "sys/fs/cgroup/memory.max": "3000000000"},
            "allows 3.0 GB",
        ),
        (
            {
                "proc/self/cgroup": "7:cpu,cpuacct:/x\n4:memory:/box\n0::/\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "4000000000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            "allows 4.0 GB",
        ),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, "of 16.4 GB · 2"),
        ({"proc/self/cgroup": "0::/../../a\nx\n\n::::\n"}, "of 16.4 GB · 2"),
    ],
    ids=["v2", "container", "v1", "none", "strange"],
)
def test_the_limit_of_the_control_group(tree, files, finding):
    """The smallest of its own and those above it, in both versions of control groups."""
    assert finding in row(examine(tree(PC | files)), "memory").finding


@pytest.mark.parametrize(
    "files",
    [
        {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 900000 kB\n"},
        {"sys/fs/cgroup/memory.max": "900000000"},
    ],
    ids=["available", "limit"],
)
def test_little_memory_is_a_warning(tree, files):
    found = row(examine(tree(PC | files)), "memory")
    assert found.status == "warning"
    assert "--low-memory" in (found.do or "")


@pytest.mark.parametrize(
    "files",
    [
        {"sys/fs/cgroup/cpu.max": "50000 100000\n"},
        {
            "proc/self/cgroup": "3:cpu:/box\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
        },
    ],
    ids=["v2", "v1"],
)
def test_a_share_of_the_cpus_is_a_warning(tree, files):
    found = row(examine(tree(PC | files)), "cpu")
    assert (found.status, found.do) == (
        "warning",
        "use --threads 1: more of them wait in turns",
    )
    assert found.finding.endswith("its control group allows 0.5")


@pytest.mark.parametrize("text", ["max 100000", "-1", "0 0", "x y", ""])
def test_no_share_is_no_warning(tree, text):
    assert row(examine(tree(PC | {"sys/fs/cgroup/cpu.max": text})), "cpu").status == "ok"


# ------------------------------------------------------------- packages


def stand_in(monkeypatch, version: str, providers: list[str]) -> None:
    module = ModuleType("onnxruntime")
    module.__version__ = version  # type: ignore[attr-defined]
    module.get_available_providers = lambda: providers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", module)


def test_without_onnxruntime_nothing_runs(tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = examine(tree(PC))
    assert [r.name for r in report.lacking] == ["onnxruntime"]
    assert row(report, "onnxruntime").do == "pip install 'edgert[cpu]'"


@pytest.mark.parametrize(
    ("version", "providers", "said"),
    [
        ("1.20.1", ["CPUExecutionProvider"], "older than 1.23"),
        ("1.30.0", ["CUDAExecutionProvider"], "no CPU provider"),
    ],
)
def test_an_onnxruntime_that_will_not_do(tree, monkeypatch, version, providers, said):
    stand_in(monkeypatch, version, providers)
    report = examine(tree(PC))
    assert [r.name for r in report.lacking] == ["onnxruntime"]
    assert said in row(report, "onnxruntime").finding


def test_providers_are_listed(tree, monkeypatch):
    stand_in(monkeypatch, "1.23.2", ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    assert row(examine(tree(PC)), "onnxruntime").finding == "1.23.2 · Tensorrt, CPU"


def test_an_onnxruntime_that_cannot_be_loaded(tree, monkeypatch, tmp_path):
    """A shared library that this system lacks."""
    broken = tmp_path / "site"
    broken.mkdir()
    (broken / "onnxruntime.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(str(broken))
    report = examine(tree(PC))
    assert "cannot be imported: libcudart.so.12" in row(report, "onnxruntime").finding
    assert report.lacking


def test_own_kernels_are_there_or_how_to_have_them(tree, monkeypatch, tmp_path):
    from edgert import kernels

    compiled = tmp_path / "_native.so"
    monkeypatch.setattr(kernels, "library", lambda: compiled)
    assert row(examine(tree(PC)), "kernels").status == "ok"
    monkeypatch.setattr(kernels, "library", lambda: None)
    found = row(examine(tree(PC)), "kernels")
    assert found.status == "missing"
    assert "C++ compiler" in (found.do or "")
    assert found not in examine(tree(PC)).lacking  # ONNX Runtime's do the same
    monkeypatch.setenv("EDGERT_NATIVE", "0")
    assert row(examine(tree(PC)), "kernels").status == "warning"


def test_two_wheels_of_one_module_are_a_warning(tree):
    """The CPU and the GPU wheel overwrite each other's files."""
    versions = {"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.30.0", "numpy": "2.0"}
    found = row(examine(tree(PC, version=versions.get)), "onnxruntime")
    assert "onnxruntime and onnxruntime-gpu are installed" in found.finding
    assert found.status == "warning"


def test_packages_have_their_versions_or_what_brings_them(tree):
    """Those of the runtime are needed, the extras are not."""
    versions = {"numpy": "2.1.0", "torch": "2.13", "onnx": "1.18"}
    machine = tree(PC, version=versions.get, found=lambda name: name in versions)
    report = examine(machine)
    assert row(report, "numpy") == Row("numpy", "2.1.0", needed=True)
    assert row(report, "tokenizers").do == "pip install tokenizers"
    assert "edgert[crypto]" in (row(report, "cryptography").do or "")
    found = row(report, "export")
    assert found.finding == "without onnxscript, gguf, huggingface_hub · has torch 2.13, onnx 1.18"
    assert "edgert[export]" in (found.do or "")
    lacking = {r.name for r in report.lacking}
    assert "tokenizers" in lacking
    assert not {"cryptography", "export", "CUDA driver", "TensorRT"} & lacking


# ------------------------------------------------------------- cache and settings


def test_the_cache_is_counted(tree, tmp_path, monkeypatch):
    """Where, why there, how many engines, how much."""
    folder = tmp_path / "cache"
    (folder / "engines").mkdir(parents=True)
    (folder / "engines/a.engine").write_bytes(b"x" * 1000)
    (folder / "stamp.json").write_bytes(b"x" * 24)
    environ = {"EDGERT_CACHE_DIR": str(folder)}
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(folder))
    found = row(examine(tree(PC, environ=environ)), "cache")
    assert found.finding == f"{folder} (EDGERT_CACHE_DIR) · 1 engine, 1,024 B · writable"


def test_a_cache_that_cannot_be_is_a_warning(tree, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    found = row(examine(tree(PC)), "cache")
    assert found.status == "warning"
    assert found.finding.startswith("the cache directory cannot be created")
    assert "EDGERT_CACHE_DIR" in (found.do or "")


def test_a_cache_that_is_not_writable_is_a_warning(tree, monkeypatch):
    def refuse(**given: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    found = row(examine(tree(PC)), "cache")
    assert found.status == "warning"
    assert found.finding.endswith("not writable: Read-only file system")


SETTINGS = [
    Setting("EDGERT_THREADS", "--threads of run", "0", lambda v: None if v.isdigit() else "no"),
    Setting("EDGERT_PASSPHRASE", "of sessions"),
]


def test_settings_say_where_they_come_from(tree):
    assert row(examine(tree(PC), SETTINGS), "threads").finding == "0 (default)"
    report = examine(tree(PC, environ={"EDGERT_THREADS": "3"}), SETTINGS)
    assert row(report, "threads").finding == "3 (EDGERT_THREADS)"
    assert report.settings == {"threads": {"value": "3", "from": "EDGERT_THREADS"}}
    assert row(report, "EDGERT_THREADS").finding == "3 → --threads of run"


def test_variables_that_do_nothing_or_harm(tree):
    """A typing error with what was meant, and a value that every command would refuse."""
    environ = {"EDGERT_THREADS": "many", "EDGERT_THREDS": "1", "EDGERT_ZZ\x1b": "1", "PATH": "/"}
    report = examine(tree(PC, environ=environ), SETTINGS)
    assert row(report, "EDGERT_THREADS").finding == "many · no"
    assert row(report, "EDGERT_THREDS").do == "did you mean EDGERT_THREADS?"
    assert row(report, "EDGERT_ZZ�").status == "warning"
    assert "PATH" not in {r.name for r in report.rows}


def test_a_passphrase_is_not_shown(tree):
    report = examine(tree(PC, environ={"EDGERT_PASSPHRASE": "sesame"}), SETTINGS)
    assert row(report, "EDGERT_PASSPHRASE").finding == "is set, not shown → of sessions"
    assert "sesame" not in repr(report)


# ------------------------------------------------------------- the command, on this machine


def test_doctor_shows_a_table(run):
    """All rows with their status; it can run a bundle here, since the tests do."""
    got = run("doctor")
    assert (got.code, got.err) == (0, "")
    names = [line[:13].strip() for line in got.out.splitlines()]
    assert {"edgert", "python", "cpu", "memory", "onnxruntime", "numpy", "cache"} <= set(names)
    statuses = {line.split()[-1] for line in got.out.splitlines() if "do: " not in line}
    assert statuses <= {"ok", "missing", "warning"}
    assert len(PROBES) <= len(names)


def test_doctor_json_is_one_object(run):
    got = run("doctor", "--json")
    value = json.loads(got.out)
    assert value["can_run"] is True
    assert {"name", "finding", "status", "do"} == set(value["rows"][0])
    assert value["settings"]["device"] == {"value": "auto", "from": "default"}
    assert list(value["settings"]) == [
        "device",
        "precision",
        "kv",
        "lowering",
        "threads",
        "low_memory",
    ]


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_doctor_ends_with_4_where_nothing_can_run(run, monkeypatch, form):
    """The table is still the answer; what to do is on stderr."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    got = run("doctor", *form)
    assert got.code == 4
    assert "onnxruntime" in got.out
    assert got.err.splitlines()[0] == (
        "error: no bundle can run here: onnxruntime: not installed: it runs the graphs"
    )
    if form:
        assert json.loads(got.out)["can_run"] is False


def test_doctor_knows_every_variable_of_the_command_line(run, monkeypatch):
    """Also those of options in groups, and values that their option refuses."""
    monkeypatch.setenv("EDGERT_THREADS", "99999")
    monkeypatch.setenv("EDGERT_DEVICE", "gpu")
    monkeypatch.setenv("EDGERT_STOP_TOKENS", "3")
    monkeypatch.setenv("EDGERT_STOP_TOKEN", "3 x")
    monkeypatch.setenv("EDGERT_KEY_FILE", "/k")
    monkeypatch.setenv("EDGERT_NATIVE", "1")
    lines = {line.split()[0]: line for line in run("doctor").out.splitlines()}
    assert "not in the range" in lines["EDGERT_THREADS"]
    assert "choose one of: auto, cpu" in lines["EDGERT_DEVICE"]
    assert "no option reads it" in lines["EDGERT_STOP_TOKENS"]
    assert "'x' is not a valid integer" in lines["EDGERT_STOP_TOKEN"]
    assert "session info" in lines["EDGERT_KEY_FILE"]
    assert "where the cache is" in lines["EDGERT_CACHE_DIR"]
    assert "own kernels" in lines["EDGERT_NATIVE"]


def test_shown_defaults_are_those_of_the_options():
    from edgert.cli import cli
    from edgert.cli.health import SHARED

    options = {p.envvar: p for p in cli.commands["run"].params if getattr(p, "envvar", None)}
    for variable in ("EDGERT_DEVICE", "EDGERT_THREADS"):
        assert str(options[variable].default) == SHARED[variable]
    assert set(SHARED) <= options.keys()
