"""One model by the instructions of older processors and newer ones, and by ONNX Runtime's kernels.

    python benchmarks/instructions.py bundles/smollm2-ladder --variant int8-ort

Each kind of kernels runs in a process of its own, in turns: a prefill, decode steps behind it, and
the logits of a text. How far these are from the first kind's, which has activations of 16 bits, is
given as KL divergence and as the share of equal best tokens. Prints a Markdown table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

import edgert
from edgert import kernels
from edgert.evaluate import divergence

KINDS = {"avx512": "AVX-512 and VNNI", "1": "", "avx2": "AVX2", "0": "ONNX Runtime's"}
"""By EDGERT_NATIVE; the second is the newest, which the library names."""

WINDOW, WINDOWS, STEPS = 512, 4, 48
TEXT = Path(__file__).with_name("text.txt")


def work(bundle: Path, variant: str, threads: int, depth: int, file: Path) -> dict[str, float]:
    """What one process does: milliseconds; logits [WINDOWS * WINDOW, V] go into `file`."""
    with edgert.load(bundle, variant=variant, threads=threads) as model:
        ids = model.encode(TEXT.read_text(encoding="utf-8"))[: WINDOW * WINDOWS]
        if not file.exists():
            rows = np.array(ids).reshape(WINDOWS, WINDOW)
            np.save(file, np.concatenate([model.logits(row[None])[0] for row in rows]))
        prefill, steps = [], []
        for _ in range(4):  # the first warms up
            with model.session(room=depth + STEPS + 1) as session:
                begun = time.perf_counter()
                answer = session.stream(
                    ids[:depth], max_tokens=STEPS, temperature=0.0, ignore_eos=True
                )
                arrived = [time.perf_counter() for _piece in answer]
            prefill.append(arrived[0] - begun)
            steps.append(float(median(np.diff(arrived))))
    return {"prefill": median(prefill[1:]) * 1e3, "step": median(steps[1:]) * 1e3}


def beside(file: Path, other: Path) -> tuple[float, float]:
    """KL divergence of the second's predictions from the first's, and equal best tokens."""
    want, got = np.load(file), np.load(other)
    equal = float((want.argmax(-1) == got.argmax(-1)).mean())
    return float(divergence(want, got).mean()), equal


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--variant", required=True)
@click.option("--depth", default=256, show_default=True, help="Tokens of the prompt.")
@click.option("--threads", default=2, type=click.IntRange(1), show_default=True)
@click.option("--rounds", default=3, type=click.IntRange(1), show_default=True)
@click.option("--worker", type=click.Path(path_type=Path), hidden=True)
def main(
    bundle: Path, variant: str, depth: int, threads: int, rounds: int, worker: Path | None
) -> None:
    """Milliseconds and divergence by kind of kernels."""
    if worker is not None:
        print(json.dumps(work(bundle, variant, threads, depth, worker)))
        return
    library = kernels.library()
    newest = kernels.instructions(library) if library else ""
    kinds = {kind: name or newest for kind, name in KINDS.items() if name != newest}
    if "AMX" not in newest:  # then the newest are these, or older ones
        kinds.pop("avx512")
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder) / f"{kind}.npy" for kind in kinds}
        command = [sys.executable, __file__, str(bundle), "--variant", variant]
        command += ["--depth", str(depth), "--threads", str(threads), "--worker"]
        for _ in range(rounds):
            for kind, file in files.items():
                environment = os.environ | {"EDGERT_NATIVE": kind}
                done = subprocess.run(
                    [*command, str(file)], check=True, capture_output=True, env=environment
                )
                found[kind].append(json.loads(done.stdout))
        first = next(iter(kinds))
        print("| kernels | prefill, tok/s | ms a step | KL divergence | equal best tokens |")
        print("|---|---|---|---|---|")
        for kind, name in kinds.items():
            prefill, step = (median(r[key] for r in found[kind]) for key in ("prefill", "step"))
            line = f"| {name} | {depth / prefill * 1e3:,.0f} | {step:.2f} "
            if kind != first:
                apart, equal = beside(files[first], files[kind])
                line += f"| {apart:.5f} | {equal:.1%} |"
            print(line if kind != first else line + "| | |")


if __name__ == "__main__":
    main()
