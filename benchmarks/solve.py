"""Puzzles solved by exported HRM models against torch: a segment, and early exit of a whole set.

    python benchmarks/solve.py [--threads 2]                                         a segment
    python benchmarks/solve.py BUNDLE --source RUN --data heldout.txt [--threads 2]  and a set

Segment  one segment of the published size, random weights, one puzzle: the `ort` lowering, eager
         torch, torch.compile. The states behind the first must be equal. The limit is what its
         matrix products alone take, at the best speed that torch or ONNX Runtime reach in them.
Set      the same puzzles through a bundle by its halting policy and at full depth, and eagerly at
         full depth. Early exit is held against what the segments that it saves allow.

Each side is a process of its own that loads once; they take turns. Reported are medians; ratios are
medians of the rounds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from sides import Side, over

WORKER = "solve_worker.py"
TOLERANCE = 1e-3  # between states behind a segment
EQUAL = 0.99
"""Least share of puzzles to which all sides at full depth give the same answer; what rounding turns
over in a network that is unsure may differ."""


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--source", type=click.Path(path_type=Path, exists=True), help="Of the bundle.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="As of edgert halt.")
@click.option("--halt", help="Policy of early exit (default: as the model was trained).")
@click.option("--puzzles", default=1000, type=click.IntRange(1), show_default=True)
@click.option("--batch", default=32, type=click.IntRange(1), show_default=True)
@click.option("--segment/--no-segment", "segment", default=True, show_default=True)
@click.option("--width", default=512, type=click.IntRange(32), show_default=True)
@click.option("--layers", default=4, type=click.IntRange(1), show_default=True)
@click.option("--cells", default=81, type=click.IntRange(1), show_default=True)
@click.option("--segments", default=4, type=click.IntRange(1), show_default=True, help="In a turn.")
@click.option("--threads", default=2, type=click.IntRange(1), show_default=True)
@click.option("--rounds", default=7, type=click.IntRange(1), show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(bundle: Path | None, **given: Any) -> None:
    """Milliseconds of a segment, and of a puzzle: edgert, eager torch, torch.compile."""
    if bundle is not None and (given["source"] is None or given["data"] is None):
        raise click.UsageError("a bundle needs --source and --data")
    report: dict[str, Any] = {"threads": given["threads"], "rounds": given["rounds"]}
    if given["segment"]:
        report["segment"] = segment(given)
    if bundle is not None:
        report["set"] = whole_set(bundle, given)
    click.echo(json.dumps(report) if given["as_json"] else table(report))


def in_rounds(sides: dict[str, Side], rounds: int) -> None:
    for _ in range(rounds):
        for side in sides.values():
            side.turn()
    for side in sides.values():
        side.close()


def segment(given: dict[str, Any]) -> dict[str, Any]:
    size = (given["width"], given["layers"], given["cells"])
    orders = {"size": size, "threads": given["threads"], "segments": given["segments"]}
    with tempfile.TemporaryDirectory() as folder:
        orders["bundle"] = export(size, Path(folder) / "bundle")
        names = ["segment", "segment-eager", "segment-compiled", "products"]
        if not given["compiled"]:
            names.remove("segment-compiled")
        sides = {name: Side(name, WORKER, orders | {"side": name}) for name in names}
        in_rounds(sides, given["rounds"])
    return segment_summary(sides) | {"size": size}


def export(size: tuple[int, int, int], out: Path) -> str:
    """The network as a bundle, past the gate; in this process, which measures nothing."""
    from plain_solve import drawn, published

    from edgert.export.write import ExportOptions, export_bundle
    from edgert.models.importers.common import Imported

    imported = Imported(drawn(published(*size)), "segment", None, None, None, (), {}, {}, ())
    export_bundle(imported, out, ExportOptions(lowerings=("ort",)))
    return str(out)


def segment_summary(sides: dict[str, Side]) -> dict[str, Any]:
    """Everything reported. Raises ClickException if the sides computed different states."""
    alone = sides.pop("products")
    ours = sides["segment"]
    for name, side in sides.items():
        for run in side.runs:
            if not np.allclose(run["state"], ours.runs[0]["state"], rtol=0, atol=TOLERANCE):
                raise click.ClickException(f"{name} computed another state")
    speeds = {
        library: max(run["gflops"][library] for run in alone.runs)
        for library in ("torch", "onnxruntime")
    }
    limit = alone.facts["operations"] / max(speeds.values()) / 1e6
    ms = {name: median(side.step_ms()) for name, side in sides.items()}
    return {
        "placement": ours.facts["placement"],
        "parameters": ours.facts["parameters"],
        "torch": sides["segment-eager"].facts["torch"],
        "ms": ms,
        "over_edgert": {name: over(ours.step_ms(), s.step_ms()) for name, s in sides.items()},
        "gflop": alone.facts["operations"] / 1e9,
        "gflops": speeds,
        "limit_ms": limit,
        "others_cpus": busiest(sides),
    }


def whole_set(bundle: Path, given: dict[str, Any]) -> dict[str, Any]:
    shared = ("threads", "puzzles", "batch", "halt")
    orders = {name: given[name] for name in shared} | {
        name: str(path)
        for name, path in (("bundle", bundle), ("source", given["source"]), ("data", given["data"]))
    }
    names = ("early", "full", "eager")
    sides = {name: Side(name, WORKER, orders | {"side": name}) for name in names}
    in_rounds(sides, given["rounds"])
    return set_summary(sides) | {"bundle": bundle.name, "batch": given["batch"]}


def set_summary(sides: dict[str, Side]) -> dict[str, Any]:
    """Everything reported. Raises ClickException if full depth is not the same in torch."""
    early, full, eager = (sides[name] for name in ("early", "full", "eager"))
    said = full.runs[0]["answers"]
    equal = float(np.mean([a == b for a, b in zip(said, eager.runs[0]["answers"], strict=True)]))
    if equal < EQUAL:
        raise click.ClickException(
            f"torch gives other answers to {(1 - equal) * 100:.1f} % of the puzzles"
        )
    count = full.facts["puzzles"]
    gained = over(early.step_ms(), full.step_ms())
    allowed = full.runs[0]["segments"] / early.runs[0]["segments"]
    return {
        "placement": full.facts["placement"],
        "parameters": full.facts["parameters"],
        "torch": eager.facts["torch"],
        "puzzles": count,
        "equal_answers": equal,
        "ms_a_puzzle": {name: median(side.step_ms()) / count for name, side in sides.items()},
        "exact": {name: sides[name].runs[0]["exact"] for name in ("early", "full")},
        "segments": {name: sides[name].runs[0]["segments"] for name in ("early", "full")},
        "full_over_early": gained,
        "allowed": allowed,
        "share_of_allowed": gained / allowed,
        "eager_over_early": over(early.step_ms(), eager.step_ms()),
        "eager_over_full": over(full.step_ms(), eager.step_ms()),
        "host_share": median(1 - run["graph_s"] / run["step_s"][0] for run in full.runs),
        "others_cpus": busiest(sides),
    }


def busiest(sides: dict[str, Side]) -> float:
    return max(run["others"] for side in sides.values() for run in side.runs)


def table(report: dict[str, Any]) -> str:
    rows = []
    if "segment" in report:
        r = report["segment"]
        rows += [
            f"one segment · {r['parameters']:,} parameters · {r['placement']} · states equal",
            f"{'':18}{'ms':>10}{'beside edgert':>15}",
        ]
        for name, ms in r["ms"].items():
            rows.append(f"{name:18}{ms:10.2f}{r['over_edgert'][name]:14.2f}x")
        speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in r["gflops"].items())
        rows += [
            f"{'limit':18}{r['limit_ms']:10.2f}   {r['gflop']:.2f} GFLOP of products; GFLOP/s: "
            f"{speeds}",
            f"others kept at most {r['others_cpus']:.2f} CPUs busy",
        ]
    if "set" in report:
        r = report["set"]
        rows += [
            *([""] if rows else []),
            f"{r['bundle']} · {r['parameters']:,} parameters · {r['placement']} · {r['puzzles']} "
            f"puzzles, {r['batch']} at once · {r['equal_answers'] * 100:.2f} % answers equal",
            f"{'':10}{'ms a puzzle':>13}{'exact %':>10}{'segments':>10}",
        ]
        for name, ms in r["ms_a_puzzle"].items():
            exact, taken = (r[key].get(name) for key in ("exact", "segments"))
            known = "" if exact is None else f"{exact * 100:10.2f}{taken:10.2f}"
            rows.append(f"{name:10}{ms:13.4f}{known}")
        rows += [
            f"early exit {r['full_over_early']:.2f}x full depth, {r['share_of_allowed'] * 100:.0f} "
            f"% of the {r['allowed']:.2f}x that its segments allow",
            f"eager torch at full depth takes {r['eager_over_early']:.2f}x early exit, "
            f"{r['eager_over_full']:.2f}x full depth",
            f"outside the graphs {r['host_share'] * 100:.1f} % · others kept at most "
            f"{r['others_cpus']:.2f} CPUs busy",
        ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
