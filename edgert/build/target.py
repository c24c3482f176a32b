"""A target: one TOML file that says what a device's compiler takes and what its memory holds.

Unknown keys are errors, not defaults, and all problems of a file are reported at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, get_args

from edgert.errors import UsageError
from edgert.recipebook import folder
from edgert.spec import Lowering
from edgert.tomlfile import read_toml

FOLDER = "engines"
MAX_BYTES = 1 << 16
MAX_SIZE = 1 << 20  # of an axis
MAX_MB = 1 << 20
COMPILERS = ("tensorrt", "tensorrt_rtx")
PRECISIONS = ("fp32", "fp16")

_VERSION = re.compile(r"[1-9][0-9]?\.[0-9]{1,3}")


@dataclass(frozen=True)
class Span:
    """Sizes of an axis: the smallest, the one that kernels are chosen for, the largest."""

    least: int
    best: int
    most: int

    def up_to(self, limit: int) -> Span:
        """The same, but no size above `limit`."""
        return Span(*(min(size, limit) for size in (self.least, self.best, self.most)))


ONE = Span(1, 1, 1)

Axes: TypeAlias = dict[str, Span]
"""What a shape profile says of the named axes."""

AXES = {
    "prefill": ("tokens", "select", "capacity"),
    "step": ("batch", "capacity"),
    "solve": ("batch",),
}
"""Shape profile -> the axes it bounds. All others that a graph names are 1 in it."""


@dataclass(frozen=True)
class Target:
    """A device, as its compiler sees it. `profiles` has the keys of `AXES`.

    compiler    the Python module
    version     of the compiler, major.minor
    sm          compute capability, major.minor
    lowerings   the forms of the graphs, best first; `opset` is the newest operator set in them
    precisions  best first
    memory_mb   for weights, states and activations together, of what device and host may share
    """

    name: str
    summary: str
    compiler: str
    version: str
    sm: str
    lowerings: tuple[Lowering, ...]
    opset: int
    precisions: tuple[str, ...]
    memory_mb: int
    workspace_mb: int
    optimization_level: int
    profiles: dict[str, Axes] = field(default_factory=dict)

    @property
    def release(self) -> tuple[int, int]:
        major, _, minor = self.version.partition(".")
        return int(major), int(minor)


def names() -> list[str]:
    """The targets that come with edgert."""
    place = folder(FOLDER)
    return sorted(path.stem for path in place.glob("*.toml")) if place else []


def find(name: str) -> Target:
    """A target that comes with edgert, or, where `name` ends in .toml, that file.

    Raises UsageError: no such target, or each wrong key of the file.
    """
    if name.endswith(".toml"):
        return read_target(Path(name))
    place = folder(FOLDER)
    if place is None or name not in names():
        raise UsageError(
            f"there is no target {name!r:.80}",
            do=f"choose one of: {', '.join(names()) or 'none is installed'}; or give a .toml file",
        )
    return read_target(place / f"{name}.toml")


def read_target(path: Path) -> Target:
    """Parse and check one file. Raises UsageError naming the file and every wrong key."""
    table = read_toml(path, "target", MAX_BYTES)
    reader = _Reader()
    target = reader.target(path.stem, table)
    if reader.problems:
        raise UsageError(
            "\n    ".join(["the target is wrong", *sorted(reader.problems)]),
            where=str(path),
            do="see engines/README.md for the keys",
        )
    return target


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Reader:
    """Collects what is wrong; every method returns something of the right type, to go on with."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def bad(self, key: str, what: str) -> None:
        self.problems.append(f"{key}: {what}")

    def target(self, name: str, table: dict[str, Any]) -> Target:
        keys = {"format_version", *Target.__dataclass_fields__} - {"name", "profiles"}
        self.known("", table, keys | AXES.keys())
        if table.get("format_version", 1) != 1:
            self.bad("format_version", "must be 1")
        return Target(
            name=name,
            summary=self.get(table, "summary", str),
            compiler=self.choice("compiler", table.get("compiler"), COMPILERS),
            version=self.version(table, "version"),
            sm=self.version(table, "sm"),
            lowerings=self.several(table, "lowerings", get_args(Lowering)),
            opset=self.number(table, "opset", 9, 30),
            precisions=self.several(table, "precisions", PRECISIONS),
            memory_mb=self.number(table, "memory_mb", 1, MAX_MB),
            workspace_mb=self.number(table, "workspace_mb", 0, MAX_MB),
            optimization_level=self.number(table, "optimization_level", 0, 5),
            profiles={profile: self.axes(profile, table) for profile in AXES},
        )

    def known(self, prefix: str, table: dict[str, Any], keys: set[str]) -> None:
        for key in table.keys() - keys:
            self.bad(f"{prefix}{_shown(key)}", "unknown key")
        for key in keys - table.keys():
            self.bad(f"{prefix}{key}", "missing")

    def get(self, table: dict[str, Any], key: str, kind: type) -> Any:
        """A value of a kind, or an empty one; what is missing has been said."""
        value = table.get(key, kind())
        if type(value) is not kind:
            self.bad(key, f"expected {kind.__name__}, got {_shown(value)}")
            return kind()
        return value

    def number(self, table: dict[str, Any], key: str, least: int, most: int) -> int:
        value = table.get(key, least)
        if type(value) is not int or not least <= value <= most:
            self.bad(key, f"{_shown(value)} is not a whole number from {least} to {most}")
            return least
        return value

    def choice(self, key: str, value: object, allowed: tuple[str, ...]) -> Any:
        if value is not None and value not in allowed:
            self.bad(key, f"{_shown(value)} is not one of {', '.join(allowed)}")
        return value

    def several(self, table: dict[str, Any], key: str, allowed: tuple[str, ...]) -> tuple[Any, ...]:
        values = self.get(table, key, list)
        for i, value in enumerate(values):
            self.choice(f"{key}.{i}", value, allowed)
        if not values:
            self.bad(key, "names none")
        return tuple(values)

    def version(self, table: dict[str, Any], key: str) -> str:
        value = self.get(table, key, str)
        if key in table and isinstance(value, str) and not _VERSION.fullmatch(value):
            self.bad(key, f"{_shown(value)} is not major.minor, as text")
        return str(value)

    def axes(self, profile: str, table: dict[str, Any]) -> Axes:
        part = self.get(table, profile, dict)
        if profile in table:
            self.known(f"{profile}.", part, set(AXES[profile]))
        return {axis: self.span(f"{profile}.{axis}", part.get(axis)) for axis in AXES[profile]}

    def span(self, key: str, value: Any) -> Span:
        if value is None:
            return ONE
        fits = isinstance(value, list) and len(value) == 3 and all(type(n) is int for n in value)
        if not fits or not 1 <= value[0] <= value[1] <= value[2] <= MAX_SIZE:
            self.bad(key, f"{_shown(value)} is not [least, best, most], rising, 1 to {MAX_SIZE}")
            return ONE
        return Span(*value)
