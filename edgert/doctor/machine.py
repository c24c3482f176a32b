"""What the probes ask, and the rows they answer with."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgert.errors import EdgertError

Status = Literal["ok", "missing", "warning"]

MAX_READ = 1 << 16


@dataclass(frozen=True)
class Row:
    """`do` is how to change what was found. Without a `needed` thing no bundle runs."""

    name: str
    finding: str
    status: Status = "ok"
    do: str | None = None
    needed: bool = False


@dataclass(frozen=True)
class Setting:
    """A variable of the environment that edgert reads.

    of       the options that take it, in words
    default  what holds without it; None where verbs differ
    problem  says what is wrong with a value, None if nothing is
    """

    variable: str
    of: str
    default: str | None = None
    problem: Callable[[str], str | None] = lambda value: None


def installed(distribution: str) -> str | None:
    """The version of an installed package, None without it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def module_found(name: str) -> bool:
    """Whether a top-level module could be imported; it is not."""
    from importlib.util import find_spec

    try:
        return find_spec(name) is not None
    except ValueError:  # a module without a spec, or one that is blocked
        return False


_CU_INIT = """
import ctypes, json, sys
cuda, number, name = ctypes.CDLL(sys.argv[1]), ctypes.c_int(), ctypes.create_string_buffer(256)
def ask(function, *given):
    code = function(ctypes.byref(number), *given)
    return number.value if code == 0 else None
found = {"code": cuda.cuInit(0)}
if found["code"] == 0:
    found["devices"] = ask(cuda.cuDeviceGetCount)
    found["version"] = ask(cuda.cuDriverGetVersion)
    if found["devices"]:
        if cuda.cuDeviceGetName(name, 255, 0) == 0:
            found["name"] = name.value.decode("utf-8", "replace")
        found["sm"] = [ask(cuda.cuDeviceGetAttribute, which, 0) for which in (75, 76)]
print(json.dumps(found))
"""


def cuda_says(library: Path, timeout_s: float = 20.0) -> dict[str, object]:
    """cuInit's code, and of what is there: number of devices, version, name and SM of the first.

    Raises EdgertError if the process that asks crashes, hangs or cannot load the library.
    """
    import subprocess

    command = [sys.executable, "-I", "-S", "-c", _CU_INIT, str(library)]
    try:
        asked = subprocess.run(command, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise EdgertError(f"cuInit does not return within {timeout_s:.0f} s") from None
    if asked.returncode < 0:
        raise EdgertError(f"cuInit kills its process with signal {-asked.returncode}")
    if asked.returncode:
        last = asked.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise EdgertError(f"the library cannot be used: {last[:200]}")
    found: dict[str, object] = json.loads(asked.stdout[:MAX_READ])
    return found


@dataclass(frozen=True)
class Machine:
    """What the probes ask: files below `root`, the environment, and this Python's packages."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    version: Callable[[str], str | None] = installed
    found: Callable[[str], bool] = module_found
    cuda: Callable[[Path], dict[str, object]] = cuda_says

    def text(self, relative: str) -> str | None:
        """The start of a regular file, at most 64 KiB; None if it is absent. Raises OSError."""
        try:
            file = os.open(self.root / relative, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(f"/{relative} is not a regular file")
            return os.read(file, MAX_READ).decode("utf-8", "replace").strip("\0 \t\r\n")
        finally:
            os.close(file)

    @property
    def l4t(self) -> str | None:
        """The release file of Jetson Linux."""
        return self.text("etc/nv_tegra_release")

    @property
    def is_jetson(self) -> bool:
        return self.l4t is not None or "Jetson" in (self.text("proc/device-tree/model") or "")


def many(count: int, what: str) -> str:
    """2, 'core' -> '2 cores'."""
    return f"{count} {what}{'s' * (count != 1)}"
