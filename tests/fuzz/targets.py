"""One target per parser: sound seeds, a strategy that spoils them, and the call that reads them.

Each seed must be accepted as it is, so that a change to a format cannot leave a target that only
ever looks at a refused first byte. Heavy modules are imported by the targets that need them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from puzzle_targets import arc, puzzleset, task
from runtime_targets import (
    accuracy,
    chat,
    halting,
    locked,
    manifest,
    onnx,
    onnxedit,
    parity,
    puzzles,
    sampling,
    session,
    solving,
    tokenizer,
)
from solver_targets import hrm_checkpoint, hrm_config
from source_targets import (
    checkpoint,
    engine_target,
    gguf,
    gguf_tokenizer,
    huggingface,
    recipe,
)
from target import Target
from training_targets import trained, training_recipe

TARGETS: dict[str, Callable[[Path], Target]] = {
    make.__name__: make
    for make in (
        *(
            manifest,
            onnx,
            onnxedit,
            tokenizer,
            chat,
            sampling,
            session,
            locked,
            solving,
            puzzles,
            parity,
        ),
        *(gguf, gguf_tokenizer, checkpoint, huggingface, recipe, engine_target),
        *(training_recipe, trained),
        *(hrm_checkpoint, hrm_config, task, arc, puzzleset, accuracy, halting),
    )
}
