"""The processor, memory, and what this Python has installed."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator

from edgert._version import __version__
from edgert.bench.facts import device_name
from edgert.doctor.machine import Machine, Row, many
from edgert.machine import memory_table

LOW_MEMORY = 1_000_000_000
"""Bytes: about what a model of 135M parameters in fp32 needs (docs/performance.md)."""


def python(machine: Machine) -> Iterator[Row]:
    yield Row("edgert", __version__)
    yield Row("python", f"{platform.python_version()} · {platform.machine()} · {sys.executable}")


def cores(machine: Machine) -> Iterator[Row]:
    from edgert.backends.ort import default_threads

    name, cores = device_name(machine.root), len(os.sched_getaffinity(0))
    finding = f"{name} · {many(cores, 'core')} · {many(default_threads(), 'thread')} by default"
    quota = _cpu_quota(machine)
    if quota is not None and quota < cores:
        whole = max(1, int(quota))
        finding += f" · its control group allows {quota:g}"
        yield Row("cpu", finding, "warning", f"use --threads {whole}: more of them wait in turns")
    else:
        yield Row("cpu", finding)


def _cpu_quota(machine: Machine) -> float | None:
    found = []
    for folder in _control_groups(machine, "cpu"):
        both = re.fullmatch(r"(\d+) (\d+)", machine.text(f"{folder}/cpu.max") or "")
        used = both and both[1], both and both[2]
        if not both:
            used = (
                machine.text(f"{folder}/cpu.cfs_quota_us"),
                machine.text(f"{folder}/cpu.cfs_period_us"),
            )
        quota, period = (int(text) if text and text.isdecimal() else 0 for text in used)
        if quota and period:  # -1 is no limit
            found.append(quota / period)
    return min(found, default=None)


def _control_groups(machine: Machine, controller: str) -> Iterator[str]:
    """Folders of the control groups this process is in, its own first, versions 2 and 1.

    A container often sees its group as the top one, whatever its own file calls it.
    """
    for line in (machine.text("proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            base = "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = f"sys/fs/cgroup/{controllers}"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            yield "/".join([base, *parts[:depth]])


def memory(machine: Machine) -> Iterator[Row]:
    table = memory_table(machine.text("proc/meminfo") or "")
    if not {"MemTotal", "MemAvailable"} <= table.keys():
        yield Row("memory", "/proc/meminfo does not say", "warning", "is /proc mounted?")
        return
    total, available = table["MemTotal"], table["MemAvailable"]
    finding = f"{_gb(available)} available of {_gb(total)}"
    if table.get("SwapTotal"):
        finding += f" · {_gb(table['SwapTotal'])} swap"
    limit = _memory_limit(machine)
    if limit is not None and limit < total:
        finding += f" · its control group allows {_gb(limit)}"
        available = min(available, limit)
    if available < LOW_MEMORY:
        yield Row("memory", finding, "warning", "close programs, or run with --low-memory")
    else:
        yield Row("memory", finding)


def _memory_limit(machine: Machine) -> int | None:
    names = ("memory.max", "memory.limit_in_bytes")
    texts = (
        machine.text(f"{folder}/{name}")
        for folder in _control_groups(machine, "memory")
        for name in names
    )
    return min((int(text) for text in texts if text and text.isdecimal()), default=None)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"


def onnxruntime(machine: Machine) -> Iterator[Row]:
    from edgert.backends.ort import MINIMUM

    name, wanted = "onnxruntime", ".".join(map(str, MINIMUM))
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        do = "pip install 'edgert[cpu]'"
        yield Row(name, "not installed: it runs the graphs", "missing", do, needed=True)
        return
    except Exception as error:  # also a shared library that this system lacks
        do = "install it again: pip install --force-reinstall 'edgert[cpu]'"
        yield Row(name, f"cannot be imported: {error}", "missing", do, needed=True)
        return
    version = str(onnxruntime.__version__)
    providers = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    finding = f"{version} · {', '.join(providers)}"
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    both = [d for d in ("onnxruntime", "onnxruntime-gpu") if machine.version(d)]
    if numbers < MINIMUM:
        do = f"pip install -U 'onnxruntime>={wanted}'"
        yield Row(name, f"{finding} · older than {wanted}", "missing", do, needed=True)
    elif "CPU" not in providers:
        do = "install a build that has it: pip install 'edgert[cpu]'"
        yield Row(name, f"{finding} · no CPU provider", "missing", do, needed=True)
    elif len(both) > 1:
        do = "they overwrite each other: uninstall both, then install one"
        yield Row(name, f"{finding} · {' and '.join(both)} are installed", "warning", do, True)
    else:
        yield Row(name, finding, needed=True)


def kernels(machine: Machine) -> Iterator[Row]:
    from edgert.kernels import instructions, library, multiplies, switched_off

    name, compiled = "kernels", library()
    if switched_off():
        yield Row(name, "EDGERT_NATIVE leaves edgert's own unused", "warning", "unset it")
    elif compiled is None:
        do = "for faster steps: install a C++ compiler (apt install g++), then edgert again"
        yield Row(name, "onnxruntime's · edgert's own were not compiled", "missing", do)
    else:
        ours, theirs = "attention, norms, gates", ""
        if multiplies(compiled):
            ours += ", int8 and int4 weights"
        else:
            theirs = " · onnxruntime's for int8 and int4 weights, faster on this processor"
        by = instructions(compiled)
        yield Row(name, f"edgert's own for {ours}{f' · {by}' if by else ''}{theirs}")


def libraries(machine: Machine) -> Iterator[Row]:
    for name in ("numpy", "tokenizers", "jinja2", "safetensors", "rich", "click"):
        version = machine.version(name)
        if version:
            yield Row(name, version, needed=True)
        else:
            yield Row(name, "not installed", "missing", f"pip install {name}", needed=True)
    version = machine.version("cryptography")
    if version:
        yield Row("cryptography", f"{version} · sessions can be encrypted")
    else:
        do = "for encrypted sessions: pip install 'edgert[crypto]'"
        yield Row("cryptography", "not installed", "missing", do)
    parts = ("torch", "onnx", "onnxscript", "gguf", "huggingface_hub")
    lacking = [name for name in parts if not machine.found(name)]
    versions = ", ".join(f"{name} {machine.version(name)}" for name in parts if name not in lacking)
    if lacking:
        do = "on the machine that exports: pip install 'edgert[export]'"
        finding = f"without {', '.join(lacking)}" + (f" · has {versions}" if versions else "")
        yield Row("export", finding, "missing", do)
    else:
        yield Row("export", versions)
