"""A looped model of Python functions, and what it says computed in another, plain way.

A token's value h starts as its id and moves half of the way to a place of its own in each
iteration: fast or slowly settled. Each iteration keeps h in a row of its own; logits hash all rows
of all iterations, so that a wrong fill, a wrong row or a wrong depth changes what is said.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fake_model import TABLE, VOCAB, manifest
from numpy.typing import NDArray

from edgert.backends.fake import FakeBackend
from edgert.bundle import Bundle
from edgert.halting import Halt
from edgert.model import Model
from edgert.runner import Runner
from edgert.spec import (
    DECODER_INPUTS,
    GraphSpec,
    LoopSpec,
    Manifest,
    ProgramSpec,
    StateSpec,
    TensorSpec,
    VariantSpec,
)

ITERATIONS = 4
FULL = Halt()


def moved(h: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """One iteration. Even ids settle fast, odd ones slowly."""
    goal = np.where(ids % 2, ids * 40.0 + 1, ids + 1.0)
    return ((h + goal) / 2).astype(np.float32)


def changed(new: NDArray[np.float32], old: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.abs(new - old) / (np.abs(old) + 1)


def logits_of(rows: list[NDArray[np.float32]], h: np.float32) -> NDArray[np.float32]:
    """From what every iteration has kept so far, and the value that left the loop."""
    data = b"".join(np.ascontiguousarray(row, np.float32).tobytes() for row in rows)
    return TABLE[zlib.crc32(data + np.float32(h).tobytes()) % len(TABLE)]


def said(ids: list[int], halt: Halt = FULL) -> tuple[list[NDArray[np.float32]], list[int]]:
    """Logits behind each id, all of them decoded by this policy, and their iterations."""
    rows: list[list[np.float32]] = [[] for _ in range(ITERATIONS)]
    logits, taken = [], []
    for token in ids:
        one = np.array([token])
        h, depth = one.astype(np.float32), 0
        for i in range(ITERATIONS):
            new = moved(h, one)
            change = float(changed(new, h)[0])
            h, depth = new, i + 1
            rows[i].append(h[0])
            if halt.most == depth or (depth >= halt.least and change < halt.threshold):
                break
        for i in range(depth, ITERATIONS):
            rows[i].append(rows[depth - 1][-1])
        logits.append(logits_of([np.array(row) for row in rows], h[0]))
        taken.append(depth)
    return logits, taken


class Graphs:
    """enter, think, leave. `depths` has what every step's body was asked for."""

    def __init__(self) -> None:
        self.depths: list[int] = []

    def enter(self, ids: NDArray[np.int64]) -> dict[str, Any]:
        both = np.stack((ids, ids), -1).astype(np.float32)  # the value, and the id it came from
        return {"h": both}

    def think(
        self,
        h: NDArray[np.float32],
        iteration: NDArray[np.int64],
        lens: NDArray[np.int64],
        kept: NDArray[np.float32],
    ) -> dict[str, Any]:
        self.depths.append(int(iteration))
        ids = h[..., 1].astype(np.int64)
        new = moved(h[..., 0], ids)
        kept = kept.copy()
        for row, start in enumerate(lens):
            kept[row, start : start + new.shape[1]] = new[row]
        change = changed(new, h[..., 0])
        return {"next": np.stack((new, h[..., 1]), -1), "change": change, "kept_next": kept}

    def leave(
        self,
        h: NDArray[np.float32],
        select: NDArray[np.int64],
        lens: NDArray[np.int64],
        **kept: NDArray[np.float32],
    ) -> dict[str, Any]:
        rows = [kept[f"kept_{i}"] for i in range(ITERATIONS)]
        logits = np.stack(
            [
                np.stack(
                    [
                        logits_of([k[b, : lens[b] + place + 1] for k in rows], h[b, place, 0])
                        for place in places
                    ]
                )
                for b, places in enumerate(select)
            ]
        )
        return {"logits": logits, "token": logits.argmax(-1)}


def looped_manifest(fill: Any = "copy", **changes: Any) -> Manifest:
    states = {f"kept.{i}": f"state.kept.{i}" for i in range(ITERATIONS)}
    each = tuple(states.values())
    enter = GraphSpec("enter", (), {"ids": "input.ids"}, {"h": "value.h"})
    think = GraphSpec(
        "think",
        (),
        {"h": "value.h", "iteration": "loop.iteration", "lens": "state.lens", "kept": each},
        {"next": "value.h", "change": "signal.change", "kept_next": each},
    )
    leave = GraphSpec(
        "leave",
        (),
        {"h": "value.h", "select": "input.select", "lens": "state.lens", **states},
        {"logits": "result.logits", "token": "result.token"},
    )
    row = StateSpec("append", "float32", ("batch", "capacity"), "capacity", "lens")
    loop = LoopSpec(
        ITERATIONS,
        {"h": TensorSpec("float32", ("batch", "tokens", 2))},
        {"change": TensorSpec("float32", ("batch", "tokens"))},
        fill,
    )
    graphs = {"enter": enter, "think": think, "leave": leave}
    made = replace(
        manifest(),
        program=ProgramSpec("leave", "enter", "think", loop),
        inputs=DECODER_INPUTS,
        states={"lens": StateSpec("counter", "int64", ("batch",))} | {name: row for name in states},
        variants={"fp32-ort": VariantSpec("fp32", "ort", {"ai.onnx": 20}, graphs, "ef" * 32)},
        format_version=2,
    )
    return replace(made, **changes)


def looped_runner(graphs: Graphs | None = None, **changes: Any) -> Runner:
    graphs = graphs or Graphs()
    functions = {"enter": graphs.enter, "think": graphs.think, "leave": graphs.leave}
    bundle = Bundle(Path("fake"), looped_manifest(**changes))
    return Runner(bundle, "fp32-ort", FakeBackend(functions))


def looped_model(graphs: Graphs | None = None, **changes: Any) -> Model:
    runner = looped_runner(graphs, **changes)
    return Model(Bundle(runner.root, runner.manifest), runner)


IDS = [int(i) for i in np.random.default_rng(3).integers(2, VOCAB, 24)]
