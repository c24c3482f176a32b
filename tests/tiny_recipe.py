"""A recipe that trains in a second or two: a looped model of 29,110 weights on its own text."""

from __future__ import annotations

from pathlib import Path

TEXT = "the cat sat on the mat and the dog lay by the door; nobody said a word about it\n"

RECIPE = """\
format_version = 1
name = "tiny"

[model]
family = "hagi"
hidden_size = 32
perception_layers = 1
reasoning_layers = 1
expression_layers = 1
loop_count = 2
use_loop = true
use_gdr = true

[model.transformer]
hidden_size = 32
num_query_heads = 2
num_kv_heads = 1
intermediate_size = 32
max_seq_len = 64

[model.grades]
scalar = 4
vector = 8
bivector = 4
trivector = 4
residual = 12

[data]
path = "text.txt"

[train]
steps = 12
window = 16
batch_size = 4
learning_rate = 1e-2
warmup_steps = 2
"""


def write(folder: Path, *changes: tuple[str, str], text: str | None = None) -> Path:
    """The recipe and its text in `folder`; each change replaces one piece of the recipe."""
    recipe = RECIPE
    for old, new in changes:
        assert recipe.count(old) == 1, old
        recipe = recipe.replace(old, new)
    if text is None:
        text = "".join(f"{i} {TEXT}" for i in range(100))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    path = folder / "tiny.toml"
    path.write_text(recipe, encoding="utf-8")
    return path
