"""Power of a Jetson from its own sensors: INA3221 rails, tegrastats lines, the power mode.

    find_rails         <root>/hwmon*/ with name ina3221: inN_label, inN_input (mV), currN_input (mA)
    parse_tegrastats   one line of `tegrastats`, as JetPack 4 to 7 write it
    parse_nvpmodel     what `nvpmodel -q` says
    Meter              a thread that reads rails, or tegrastats, while requests are timed

Where there are no rails nothing is measured, and nothing is what is reported: never zero.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HWMON = Path("/sys/class/hwmon")
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN")
"""Rails that carry all of a module's power. Boards without one have parts only, whose sum is not
the whole, so no total is given for them."""

INTERVAL_S = 0.1

Milliwatts = dict[str, float]
Sample = tuple[int, Milliwatts]  # perf_counter_ns, by rail


@dataclass(frozen=True)
class Rail:
    label: str
    millivolts: Path
    milliamps: Path

    def read(self) -> float | None:
        """Milliwatts, or None if the sensor does not answer."""
        try:
            volts, amps = int(self.millivolts.read_text()), int(self.milliamps.read_text())
        except (OSError, ValueError):
            return None
        return volts * amps / 1000


def find_rails(root: Path = HWMON) -> list[Rail]:
    """The labelled rails of all INA3221 sensors below `root`, in the order of the kernel.

    Not among them: channels labelled NC (not connected), and the sum of the shunt voltages, which
    has a label and a voltage but no current.
    """
    rails = []
    for sensor in sorted(root.glob("hwmon*")):
        if _read(sensor / "name") not in ("ina3221", "ina3221x"):
            continue
        for path in sorted(sensor.glob("in[0-9]_label")):
            number, label = path.name[2], _read(path)
            rail = Rail(label, sensor / f"in{number}_input", sensor / f"curr{number}_input")
            if label and label != "NC" and "shunt" not in label.lower() and rail.read() is not None:
                rails.append(rail)
    return rails


def throttle_events(root: Path = HWMON) -> int | None:
    """Over-current events that the board has counted since it started; None where none counts."""
    counts = [_read(path) for path in root.glob("hwmon*/oc*_event_cnt")]
    numbers = [int(text) for text in counts if text.isdigit()]
    return sum(numbers) if numbers else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class TegraStats:
    """One line of tegrastats. MB, mW, °C, percent and MHz; what the line lacks is None or absent.

    `rails` are the values of the moment (each is followed by the average since the tool's start).
    """

    ram_used_mb: int | None = None
    ram_total_mb: int | None = None
    gpu_percent: int | None = None
    gpu_mhz: int | None = None
    temp_c: dict[str, float] = field(default_factory=dict)
    rails: Milliwatts = field(default_factory=dict)


def parse_tegrastats(line: str) -> TegraStats:
    """Read one line; parts that are not known are passed over.

    Rails are `NAME 4947mW/4947mW` (JetPack 5 and later) or `NAME 2000/2000` (before). The GPU is
    `GR3D_FREQ 0%`, with `@1300` or `@[1300,1300]` behind it or alone. A sensor that is switched
    off reads -256 °C and is left out.
    """
    ram = re.search(r"\bRAM (\d+)/(\d+)MB", line)
    gpu = re.search(r"\bGR3D_FREQ (?:(\d+)%)?(?:@\[?(\d+))?", line)
    temperatures = re.findall(r"(?<!\S)([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C(?=[\s/]|$)", line)
    rails = re.findall(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?=\s|$)", line)
    return TegraStats(
        ram_used_mb=int(ram[1]) if ram else None,
        ram_total_mb=int(ram[2]) if ram else None,
        gpu_percent=int(gpu[1]) if gpu and gpu[1] else None,
        gpu_mhz=int(gpu[2]) if gpu and gpu[2] else None,
        temp_c={name: float(value) for name, value in temperatures if float(value) > -100},
        rails={name: float(value) for name, value in rails},
    )


def parse_nvpmodel(text: str) -> tuple[str, int | None] | None:
    """Name and number of the power mode from `nvpmodel -q`; None if it does not say.

    The number stands alone on the line behind the name.
    """
    found = re.search(
        r"NV Power Mode:[ \t]*(\S+)(?:[ \t]*\r?\n[ \t]*(\d+)[ \t]*(?:\r?\n|$))?", text
    )
    if not found:
        return None
    return found[1], int(found[2]) if found[2] else None


def power_mode() -> str | None:
    """The mode that `nvpmodel -q` names, such as '15W' or 'MAXN'; None on other machines."""
    import shutil
    import subprocess

    tool = shutil.which("nvpmodel")
    if tool is None:
        return None
    try:
        said = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    mode = parse_nvpmodel(said)
    return mode and mode[0]


class Meter:
    """Reads rails in a thread of its own from `start` to `stop`, and once at each of these."""

    def __init__(
        self,
        source: str,
        read: Callable[[], Milliwatts],
        *,
        interval_s: float = INTERVAL_S,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.source = source
        self.samples: list[Sample] = []
        self._read, self._interval_s, self._close = read, interval_s, close
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgert power", daemon=True)

    def _sample(self) -> None:
        values = self._read()
        if values:
            self.samples.append((time.perf_counter_ns(), values))

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._sample()

    def start(self) -> None:
        self._sample()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
            self._sample()
        self._close()


def find_meter(root: Path = HWMON) -> Meter | None:
    """A meter over the machine's rails, else over `tegrastats` where it is installed, else None."""
    rails = find_rails(root)

    def read() -> Milliwatts:
        found = ((rail.label, rail.read()) for rail in rails)
        return {label: value for label, value in found if value is not None}

    if rails:
        return Meter("INA3221 (hwmon)", read)
    import shutil

    tool = shutil.which("tegrastats")
    return _tegrastats_meter(tool) if tool else None


def _tegrastats_meter(tool: str) -> Meter | None:
    import subprocess

    try:
        process = subprocess.Popen(
            [tool, "--interval", str(round(INTERVAL_S * 1e3))],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
    except OSError:
        return None
    lines = process.stdout
    assert lines is not None

    def close() -> None:
        process.kill()
        process.wait()
        lines.close()

    # No waiting between lines: the tool paces them, and an old line would get a new time.
    return Meter(
        "tegrastats", lambda: parse_tegrastats(lines.readline()).rails, interval_s=0, close=close
    )


def energy(samples: Sequence[Sample], windows: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    """Joules and mean milliwatts by rail over the windows (begin and end, perf_counter_ns).

    Power between two samples is taken as the line between them. None unless the samples reach
    over all windows: nothing is extrapolated.
    """
    if len(samples) < 2 or not windows:
        return None
    times = np.array([at for at, _ in samples], np.float64)
    seconds = sum(end - begin for begin, end in windows) / 1e9
    outside = min(b for b, _ in windows) < times[0] or max(e for _, e in windows) > times[-1]
    if outside or seconds <= 0:
        return None
    labels = [name for name in samples[0][1] if all(name in values for _, values in samples)]
    found = {}
    for label in labels:
        power = np.array([values[label] for _, values in samples], np.float64)
        joules = 0.0
        for begin, end in windows:
            inside = times[(times > begin) & (times < end)]
            at = np.concatenate(([begin], inside, [end]))
            value = np.interp(at, times, power)
            joules += float(((value[1:] + value[:-1]) / 2 * np.diff(at)).sum()) / 1e12
        found[label] = {"energy_j": joules, "mean_mw": joules / seconds * 1e3}
    return found or None


def report(
    meter: Meter | None, windows: Sequence[tuple[int, int]], tokens: int
) -> dict[str, Any | None]:
    """The fields of a bench about power; all None where nothing was measured.

    `tokens` were generated within the windows. The energy is all that the rail carried then, what
    the board needs when idle included.
    """
    rails = energy(meter.samples, windows) if meter else None
    rail = next((name for name in TOTAL_RAILS if rails and name in rails), None)
    joules = rails[rail]["energy_j"] if rails and rail else None
    return {
        "power_source": meter.source if meter and rails else None,
        "rails": rails,
        "rail": rail,
        "energy_j": joules,
        "tok_per_j": tokens / joules if joules else None,
    }
