"""`edgert export`: whatever the source is, to a bundle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgert.errors import UsageError
from edgert.export.recipe import Recipe, read_recipe
from edgert.export.write import Exported, ExportOptions, export_bundle
from edgert.files import MANIFEST
from edgert.models.importers import load_source
from edgert.models.importers.fresh import fresh_source
from edgert.progress import Reporter
from edgert.spec import Lowering


def export_source(
    source: Path,
    out: Path,
    *,
    precision: str | None = None,
    kv: str | None = None,
    lowerings: tuple[Lowering, ...] = (),
    context: int | None = None,
    tokenizer: Path | None = None,
    name: str | None = None,
    unrolled: bool = False,
    task: str | None = None,
    dataset: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Import a checkpoint, GGUF file, model folder or recipe, and export it. What is given here
    goes before what a recipe says.

    Raises what `load_source`, `read_recipe` and `export_bundle` raise.
    """
    reporter = reporter or Reporter()
    if os.path.lexists(out) and (out.is_symlink() or not (out / MANIFEST).is_file()):
        raise UsageError(
            f"{out} exists and is not a bundle", do="choose another place, or remove it yourself"
        )
    if source.suffix == ".toml" and source.is_file():
        recipe = read_recipe(source)
    else:
        recipe = Recipe(source, ExportOptions())
    if recipe.trains and not recipe.source.is_dir():
        raise UsageError(
            f"{source.name} trains the model that it exports, and there is no run of it: "
            f"{recipe.source}",
            do=f"train it first:  edgert train {source}",
        )
    given = {"precision": precision, "lowerings": lowerings, "name": name, "unrolled": unrolled}
    given |= {"kv": kv, "task": task}
    options = replace(recipe.options, **{k: v for k, v in given.items() if v})  # type: ignore[arg-type]
    context, tokenizer = context or recipe.context, tokenizer or recipe.tokenizer
    with reporter.stage("reading", recipe.source.name) as advance:
        if recipe.random_seed is not None and recipe.model is not None:
            imported = fresh_source(
                recipe.model,
                recipe.random_seed,
                recipe.source,
                context=context,
                tokenizer=tokenizer,
            )
        else:
            imported = load_source(
                recipe.source,
                context=context,
                tokenizer=tokenizer,
                settings=recipe.settings | dict(settings or {}),
                dataset=dataset or recipe.dataset,
                progress=lambda done, total: advance(1),
            )
    for text in imported.notes:
        reporter.line("note", text)
    return export_bundle(imported, out, options, reporter)
