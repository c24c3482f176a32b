"""What both workers measure in the same way: memory, and how busy others kept the machine.

Standard library only: the peer's worker runs in an environment without edgert.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def memory(status: str) -> dict[str, float]:
    """Text of /proc/<pid>/status -> MB (10^6 bytes): peak, resident now, anonymous, from files."""
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    keys = {"peak": "VmHWM", "resident": "VmRSS", "anonymous": "RssAnon", "file": "RssFile"}
    return {name: int(lines[key].split()[0]) * 1024 / 1e6 for name, key in keys.items()}


def own_memory() -> dict[str, float]:
    return memory(Path("/proc/self/status").read_text())


def busy_ticks(stat: str) -> int:
    """Text of /proc/stat -> clock ticks that all CPUs together have been busy since boot."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split()[1:9])
    return user + nice + system + irq + softirq + steal


class Window:
    """A span of time, and how many CPUs other processes kept busy in it on average."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        busy = busy_ticks(Path("/proc/stat").read_text()) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()

    def elapsed(self) -> float:
        return time.perf_counter() - self._start[0]

    def others(self) -> float:
        """CPUs kept busy by others since the window opened. Includes time stolen by a host."""
        wall, busy, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(0.0, (busy - own) / wall) if wall else 0.0


def await_quiet(limit: float, patience: float, span: float = 0.3) -> bool:
    """Wait until others use at most `limit` CPUs over `span` seconds; False after `patience`."""
    waited = Window()
    while waited.elapsed() < patience:
        window = Window()
        time.sleep(span)
        if window.others() <= limit:
            return True
    return False


def task() -> dict[str, Any]:
    """The worker's orders: one JSON object, the only argument."""
    return json.loads(sys.argv[1])  # type: ignore[no-any-return]


def report(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)
