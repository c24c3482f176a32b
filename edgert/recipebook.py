"""The recipes that come with edgert: which there are, and what each one makes.

They lie in folders of their own at the top of the project; an installed package carries the same
folders inside, below edgert/recipes/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.errors import UsageError

BUNDLES = "export"  # the folder whose recipes make bundles
FOLDERS = (BUNDLES, "engines")  # those of setup.py
MAX_BYTES = 1 << 20
PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Entry:
    """One recipe: where it is, and in words what it reads and what it makes."""

    name: str
    path: Path
    source: str
    makes: str

    @property
    def text(self) -> str:
        return _read(self.path).decode("utf-8", "replace")


def folder(name: str, package: Path = PACKAGE) -> Path | None:
    """Where a folder of recipes is: in the installed package, else beside it in a clone."""
    inside, beside = package / "recipes" / name, package.parent / name
    if inside.is_dir():
        return inside
    in_clone = (package.parent / "pyproject.toml").is_file()  # not site-packages' own `export`
    return beside if in_clone and beside.is_dir() else None


def recipes(package: Path = PACKAGE) -> list[Entry]:
    """All recipes, by name. One that cannot be read says so instead of what it makes."""
    place = folder(BUNDLES, package)
    paths = sorted(place.glob("*.toml")) if place else []
    return [Entry(path.stem, path, *_described(path)) for path in paths]


def find(name: str, package: Path = PACKAGE) -> Entry:
    """The recipe of this name, with or without .toml. Raises UsageError naming those there are."""
    known = recipes(package)
    for entry in known:
        if name in (entry.name, entry.path.name):
            return entry
    raise UsageError(
        f"there is no recipe {name!r}",
        do=f"choose one of: {', '.join(entry.name for entry in known) or 'none is installed'}",
    )


def _described(path: Path) -> tuple[str, str]:
    """(source, what it makes) of a recipe."""
    from importlib import import_module
    from importlib.util import find_spec

    library = "tomllib" if find_spec("tomllib") else "tomli"  # the former since Python 3.11
    try:
        table = import_module(library).loads(_read(path).decode("utf-8"))
        source, export = _table(table, "source"), _table(table, "export")
        return _source(source, table), _made(export)
    except (OSError, ValueError, RecursionError) as error:
        return "unreadable", f"{type(error).__name__}: {error}"


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES)


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key, {})
    return value if isinstance(value, dict) else {}


def _source(source: dict[str, Any], table: dict[str, Any]) -> str:
    if "random_seed" in source:
        return "random weights"
    if not source and "train" in table:
        return "its own training"
    path, package = source.get("path", "no source"), source.get("package")
    return f"{path} of package {package}" if package else str(path)


def _made(export: dict[str, Any]) -> str:
    lowerings = export.get("lowerings", ())
    named = " and ".join(map(str, lowerings)) if isinstance(lowerings, list) else ""
    return f"{export.get('precision', 'fp32')} bundle" + (f", {named}" if named else "")
