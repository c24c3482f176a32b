"""What else decides a figure: which processor, how it is clocked, how warm it is, and memory.

Read from Linux's own files below `root`; what is not there is None, never a guess.
"""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path("/")


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes()[: 1 << 20].decode("utf-8", "replace").strip("\0 \n\t") or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and re.fullmatch(r"-?\d{1,18}", text) else None


def device_name(root: Path = ROOT) -> str:
    """The board's name where it has one (a Jetson), else the processor's; else the architecture."""
    board = _text(root / "proc/device-tree/model")
    if board:
        return board
    cpus = _text(root / "proc/cpuinfo") or ""
    found = re.search(r"^model name\s*:\s*(.+)$", cpus, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def governor(root: Path = ROOT) -> str | None:
    """How the kernel chooses the CPU's clock, such as 'schedutil' or 'performance'; mixed ones
    are joined."""
    files = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
    found = sorted({text for path in files if (text := _text(path))})
    return ", ".join(found) or None


def clocks(root: Path = ROOT) -> dict[str, float] | None:
    """CPU clock now and at most, in MHz: medians over the CPUs."""
    base = root / "sys/devices/system/cpu"
    result = {}
    for key, name in (("cpu_mhz", "scaling_cur_freq"), ("cpu_max_mhz", "cpuinfo_max_freq")):
        values = [_number(path) for path in base.glob(f"cpu[0-9]*/cpufreq/{name}")]
        known = [value / 1000 for value in values if value]
        if known:
            result[key] = float(median(known))
    return result or None


def temperatures(root: Path = ROOT) -> dict[str, float] | None:
    """Thermal zones by their type, in °C. A zone that is switched off has no temperature."""
    result = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        kind, value = _text(zone / "type"), _number(zone / "temp")
        if kind and value is not None and -40_000 < value < 200_000:
            result[kind] = value / 1000
    return result or None


def memory(root: Path = ROOT) -> dict[str, int] | None:
    """This process in bytes: `peak` (VmHWM: file pages that it shares count, too), and the
    `anonymous` part of what is resident now."""
    status = _text(root / "proc/self/status") or ""
    found = dict(re.findall(r"^(VmHWM|RssAnon):\s*(\d+) kB$", status, re.MULTILINE))
    if "VmHWM" not in found or "RssAnon" not in found:
        return None
    return {"peak": int(found["VmHWM"]) * 1024, "anonymous": int(found["RssAnon"]) * 1024}


@dataclass(frozen=True)
class Load:
    """A moment of the machine's accounts; `others` compares two of them."""

    at: float
    busy_s: float  # of all CPUs since the start of the machine
    own_s: float  # of this process

    @classmethod
    def now(cls, root: Path = ROOT) -> Load | None:
        first = (_text(root / "proc/stat") or "").partition("\n")[0].split()
        if len(first) < 9 or first[0] != "cpu":
            return None
        # user, nice, system, irq, softirq, steal: not idle and iowait; guest is within user
        ticks = sum(int(first[i]) for i in (1, 2, 3, 6, 7, 8))
        return cls(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())

    def others(self, later: Load) -> float:
        """How many CPUs on average were busy with something else, or taken from this machine."""
        seconds = later.at - self.at
        foreign = (later.busy_s - self.busy_s) - (later.own_s - self.own_s)
        return max(0.0, foreign / seconds) if seconds > 0 else 0.0
