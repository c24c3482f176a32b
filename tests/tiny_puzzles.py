"""Recipes of models that solve and train in a second or two, on boards of 4x4 cells."""

from __future__ import annotations

from pathlib import Path

SEGMENTS = """\
family = "hrm"
hidden_size = 16
num_heads = 2
expansion = 1
H_layers = 1
L_layers = 1
H_cycles = 2
L_cycles = 1
pos_encodings = "learned"
puzzle_emb_ndim = 16
halt_max_steps = 3
halt_exploration_prob = 0.3
loss = { loss_type = "stablemax_cross_entropy" }
"""

CYCLES = """\
family = "hrm-bidir"
hidden_size = 16
num_heads = 2
num_h_layers = 1
num_l_layers = 1
max_cycles = 3
dropout = 0.1
positions = 16
"""

RECIPE = """\
format_version = 1
name = "tiny"

[model]
{model}
[data]
task = "sudoku-4x4"
puzzles = "builtin"
classes = 60
held_out = 20

[train]
steps = 12
batch_size = 8
learning_rate = 1e-2
warmup_steps = 2
puzzle_emb_lr = 1e-2
"""


def write(folder: Path, *changes: tuple[str, str], model: str = SEGMENTS) -> Path:
    """The recipe in `folder`; each change replaces one piece of it."""
    recipe = RECIPE.format(model=model)
    if "bidir" in model:
        recipe = recipe.replace("puzzle_emb_lr = 1e-2\n", "")
    for old, new in changes:
        assert recipe.count(old) == 1, old
        recipe = recipe.replace(old, new)
    path = folder / "tiny.toml"
    path.write_text(recipe, encoding="utf-8")
    return path
