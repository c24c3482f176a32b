"""What this machine has: which vector extensions, as far as they decide the bits of a result; how
many cores; how much memory.

Read from /proc and /sys directly: it takes part in every start of a process.
"""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

_FLAGS = (
    *("avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)


@cache
def instruction_set() -> str:
    """Such as 'x86_64 avx avx2 fma': the architecture, and the vector extensions it has."""
    found: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, values = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    found = set(values.split())
                    break
    except OSError:
        pass  # then the architecture alone is known
    return " ".join([platform.machine(), *(flag for flag in _FLAGS if flag in found)])


def physical_cores(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores that this process may use; the CPUs that it may, where the system does not say which
    share a core."""
    allowed = os.sched_getaffinity(0)
    try:
        lists = {(cpus / f"cpu{n}/topology/thread_siblings_list").read_text() for n in allowed}
    except OSError:
        return len(allowed)
    return len(lists)


def memory_table(text: str) -> dict[str, int]:
    """The content of /proc/meminfo -> bytes by name, such as MemTotal and MemAvailable."""
    return {name: int(kb) * 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        return memory_table(meminfo.read_text()).get("MemAvailable")
    except OSError:
        return None
