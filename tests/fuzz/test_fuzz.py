"""Every parser on some spoiled inputs, always the same ones; `make full` goes on for an hour.

What a run of scripts/fuzz finds becomes a test of its own beside the parser's other tests.
"""

from __future__ import annotations

import pytest
from harness import Count, read_seeds, run_batch
from targets import TARGETS

EXAMPLES = 150


@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_input_is_read_or_refused(name, tmp_path, monkeypatch):
    """A value or an EdgertError, within 2 s of processor time and 1 GiB: nothing else."""
    from edgert.chat import sandbox

    for changed in ("MAX_SECONDS", "time"):  # the chat target changes them
        monkeypatch.setattr(sandbox, changed, getattr(sandbox, changed))
    target, count = TARGETS[name](tmp_path), Count()
    read_seeds(target)
    run_batch(target, count, EXAMPLES, None)
    assert count.refused > EXAMPLES // 5
    assert count.accepted > 0
