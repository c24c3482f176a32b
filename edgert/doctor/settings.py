"""The cache, and the variables of the environment that are in effect."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator, Sequence

from edgert.cache import cache_dir
from edgert.doctor.machine import Machine, Row, Setting, many
from edgert.errors import EdgertError

MAX_CACHE_ENTRIES = 10_000


def cache(machine: Machine) -> Iterator[Row]:
    source = "default"
    if machine.environ.get("EDGERT_CACHE_DIR"):
        source = "EDGERT_CACHE_DIR"
    elif os.path.isabs(machine.environ.get("XDG_CACHE_HOME", "")):
        source = "XDG_CACHE_HOME"
    try:
        folder = cache_dir()
    except EdgertError as error:
        yield Row("cache", error.what, "warning", error.do)
        return
    engines = entries = nbytes = 0
    for path, _, files in os.walk(folder):
        for file in files:
            entries += 1
            nbytes += os.lstat(os.path.join(path, file)).st_size
            engines += file.endswith(".engine")
        if entries > MAX_CACHE_ENTRIES:
            break
    more = " or more" if entries > MAX_CACHE_ENTRIES else ""
    size = f"{many(engines, 'engine')}, {nbytes:,} B{more}"
    finding = f"{folder} ({source}) · {size}"
    try:
        with tempfile.TemporaryFile(dir=folder):
            yield Row("cache", f"{finding} · writable")
    except OSError as error:
        do = "set EDGERT_CACHE_DIR to a directory that you can write"
        yield Row("cache", f"{finding} · not writable: {error.strerror}", "warning", do)


def settings_in_effect(machine: Machine, settings: Sequence[Setting]) -> dict[str, dict[str, str]]:
    """What holds of the settings that all verbs share, and where it came from."""
    chosen = {}
    for setting in settings:
        if setting.default is not None:
            name = setting.variable.removeprefix("EDGERT_").lower()
            given = machine.environ.get(setting.variable)
            source = "default" if given is None else setting.variable
            chosen[name] = {"value": setting.default if given is None else given, "from": source}
    return chosen


def variables(machine: Machine, settings: Sequence[Setting]) -> Iterator[Row]:
    known = {setting.variable: setting for setting in settings}
    for variable in sorted(name for name in machine.environ if name.startswith("EDGERT_")):
        value = machine.environ[variable]
        setting = known.get(variable)
        if setting is None:
            near = difflib.get_close_matches(variable, known, 1)
            do = f"did you mean {near[0]}?" if near else "unset it"
            yield Row(variable, f"{value} · no option reads it", "warning", do)
            continue
        shown = "is set, not shown" if variable == "EDGERT_PASSPHRASE" else value
        problem = setting.problem(value)
        if problem:
            yield Row(variable, f"{shown} · {problem}", "warning", "correct it, or unset it")
        else:
            yield Row(variable, f"{shown} → {setting.of}")
