"""An architecture that a recipe describes, with random weights: to count, export and measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgert.errors import UsageError
from edgert.models.importers.assets import read_tokenizer
from edgert.models.importers.common import Imported, Problems, named, shown
from edgert.models.trainable import TRAINABLE


def fresh_source(
    model: dict[str, Any],
    seed: int,
    recipe: Path,
    *,
    context: int | None = None,
    tokenizer: Path | None = None,
) -> Imported:
    """The [model] table of a recipe -> a model as training would begin it, drawn with a seed.

    Raises UsageError naming everything that is wrong with the table, BadTokenizer.
    """
    problems = Problems(str(recipe), UsageError)
    raw = dict(model)
    name = raw.pop("family", None)
    family = TRAINABLE.get(name) if isinstance(name, str) else None
    if family is None:
        problems.add(f"model.family is {shown(name)}, known are: {', '.join(TRAINABLE)}")
    wrong = "the recipe's model is wrong"
    problems.check(wrong)
    assert family is not None
    config, unknown = family.read_config(raw, problems, context, name="model", wrong=wrong)
    if unknown:
        problems.add(f"unknown keys: {named(unknown)}")
    problems.check(wrong)
    made = family.build(config).initialize(torch.Generator().manual_seed(seed))
    return Imported(
        model=made.eval().requires_grad_(False),
        name=f"{family.name}-random",
        tokenizer_json=None if tokenizer is None else read_tokenizer(tokenizer, config.vocab_size),
        chat_template=None,
        bos=None,
        eos=(),
        sampling={},
        provenance={"source": "random weights", "recipe": recipe.name, "seed": seed},
        notes=("random weights: for measuring, not for answers",),
    )
