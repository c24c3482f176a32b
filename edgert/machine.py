"""What kind of processor this is, as far as it decides which kernels compute, and so which bits."""

from __future__ import annotations

import platform
from functools import cache

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
