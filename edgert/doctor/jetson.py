"""The CUDA driver, TensorRT, and what a Jetson says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from edgert.backends.tensorrt.cuda import NO_DEVICE
from edgert.bench.facts import governor
from edgert.bench.power import find_rails, power_mode
from edgert.doctor.machine import Machine, Row

L4T_TO_JETPACK = {
    "36.3": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39.2": "7.2",
}
"""By the whole version, else by its first two numbers."""

LIBCUDA = (
    "usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1",  # JetPack 6
    "usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1",
    "usr/lib/aarch64-linux-gnu/libcuda.so.1",
    "usr/lib/x86_64-linux-gnu/libcuda.so.1",
    "usr/lib64/libcuda.so.1",
    "usr/lib/wsl/lib/libcuda.so.1",
)
NODES = ("nvhost-ctrl-gpu", "nvhost-gpu", "nvgpu", "nvidiactl", "nvidia0", "dxg")
NOT_NEEDED = "not needed on the CPU; engines for a GPU are built and run with it"


def cuda(machine: Machine) -> Iterator[Row]:
    name = "CUDA driver"
    library = next((machine.root / p for p in LIBCUDA if (machine.root / p).exists()), None)
    nodes = [node for node in NODES if (machine.root / "dev" / node).exists()]
    if library is None and not nodes:
        yield Row(name, "not found", "missing", NOT_NEEDED)
    elif library is None:
        do = "in a container, start it with --runtime nvidia; else install the driver"
        yield Row(name, f"/dev/{nodes[0]} is there, libcuda.so.1 is not", "warning", do)
    elif not nodes:
        do = "in a container, start it with --runtime nvidia"
        yield Row(name, "libcuda.so.1 is there, a device in /dev is not", "warning", do)
    else:
        yield _driver_row(name, machine, library)


def _driver_row(name: str, machine: Machine, library: Path) -> Row:
    said = machine.cuda(library)
    code = said.get("code")
    if code != 0:
        why = NO_DEVICE.get(code, "see cudaError_enum") if isinstance(code, int) else "?"
        return Row(name, f"cuInit says {code}: {why}", "warning", "install the driver again")
    version, sm = said.get("version"), said.get("sm")
    finding = f"{said.get('devices')} × {said.get('name') or 'device'}"
    if isinstance(sm, list):
        finding += f" · SM {'.'.join(map(str, sm))}"
    if isinstance(version, int):
        finding += f" · CUDA {version // 1000}.{version % 1000 // 10}"
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        finding += f" · CUDA_VISIBLE_DEVICES={visible}"
    if not said.get("devices"):
        return Row(name, finding, "warning", "is CUDA_VISIBLE_DEVICES empty?")
    return Row(name, finding)


def tensorrt(machine: Machine) -> Iterator[Row]:
    names = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
    if machine.found("tensorrt"):
        version = next((v for v in map(machine.version, names) if v), "of unknown version")
        yield Row("TensorRT", f"{version} · used by edgert build, and by --device tensorrt")
        yield _bindings(machine)
        return
    libraries = sorted(machine.root.glob("usr/lib/*/libnvinfer.so.*"))
    if libraries:
        do = "make the environment with --system-site-packages, or install python3-libnvinfer"
        finding = f"{libraries[0].name} is there, its Python module is not"
        yield Row("TensorRT", finding, "warning", do)
    elif machine.is_jetson:
        yield Row("TensorRT", "not found", "missing", "sudo apt install nvidia-jetpack")
    else:
        yield Row("TensorRT", "not found", "missing", NOT_NEEDED)


def _bindings(machine: Machine) -> Row:
    """The package by which edgert reaches the device's memory."""
    version = machine.version("cuda-bindings") or machine.version("cuda-python")
    if version is None:
        return Row("cuda-bindings", "not found", "missing", "pip install 'edgert[tensorrt]'")
    return Row("cuda-bindings", version)


def jetson(machine: Machine) -> Iterator[Row]:
    if not machine.is_jetson:
        yield Row("JetPack", "not a Jetson")
        return
    model = machine.text("proc/device-tree/model")
    if model:
        yield Row("Jetson", model)
    release = machine.l4t
    if release is None:
        do = "in a container, mount it: -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro"
        yield Row("JetPack", "/etc/nv_tegra_release is absent", "warning", do)
        return
    version = l4t_version(release)
    if version is None:
        yield Row(
            "JetPack", f"unknown: {release.splitlines()[0][:80] if release else ''}", "warning"
        )
        return
    jetpack = L4T_TO_JETPACK.get(version) or L4T_TO_JETPACK.get(version.rpartition(".")[0])
    finding = f"{jetpack or 'of unknown version'} (L4T {version})"
    if tuple(map(int, version.split("."))) < (36, 4):
        yield Row("JetPack", finding, "warning", "for TensorRT, update to JetPack 6.1 or newer")
    else:
        yield Row("JetPack", finding)


def l4t_version(release: str) -> str | None:
    """'# R36 (release), REVISION: 4.3, ...' -> '36.4.3'."""
    found = re.search(r"R(\d{1,3}) \(release\), REVISION: (\d{1,3})\.(\d{1,3})\b", release)
    return ".".join(found.groups()) if found else None


def power(machine: Machine) -> Iterator[Row]:
    if machine.is_jetson:
        mode = power_mode() if machine.root == Path("/") else None
        mode = mode or _power_mode_file(machine)
        if mode:
            yield Row("power mode", mode)
        else:
            do = "ask with: sudo nvpmodel -q"
            yield Row("power mode", "not readable", "warning", do)
    yield Row("governor", governor(machine.root) or "the kernel names none")
    rails = [rail.label for rail in find_rails(machine.root / "sys/class/hwmon")]
    if rails:
        yield Row("power rails", ", ".join(rails))
    elif machine.is_jetson:
        do = "in a container, mount /sys; power cannot be measured without"
        yield Row("power rails", "none", "warning", do)
    else:
        yield Row("power rails", "none: power is not measured on this machine")


def _power_mode_file(machine: Machine) -> str | None:
    """The mode that is stored for the next start, by the name that the table of modes gives it."""
    number = re.search(r"pmode:(\d{1,4})", machine.text("var/lib/nvpmodel/status") or "")
    if not number:
        return None
    table = re.findall(
        r"<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=(\w{1,40})\s*>",
        machine.text("etc/nvpmodel.conf") or "",
    )
    names: dict[int, str] = {int(key): name for key, name in table}
    return names.get(int(number[1]), f"number {int(number[1])}")
