"""What compiling costs: every graph of some bundles through TensorRT-RTX, without a GPU.

    python benchmarks/engines.py bundles/smollm2-135m-instruct
    python benchmarks/engines.py tests/cases/hagi/model_?/step-*.pt --into docs/tensorrt.md

An argument that is no bundle is exported first, to portable graphs in fp32 and fp16, and to modern
ones where the family has them; what its files lack of its config may follow it
(`step_1234:seq_len=25`). A model that may end its loop has a row `loop`, too: all of it in one
graph, with the loop inside. Prints a Markdown table, or with --json one object; --into puts the
table into a document, between its marks.
Times are the CPU's, which other work on the machine changes little, of a single build each: they
give the order of magnitude. Engines run nowhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from edgert.build.adapter import compile_graph
from edgert.build.device import load_compiler
from edgert.build.plan import plan_build
from edgert.build.target import find
from edgert.bundle import Bundle
from edgert.errors import UnsupportedModel
from edgert.files import MANIFEST

PRECISIONS = ("fp32", "fp16")
DIALECTS = ("portable", "modern")
START, END = "<!-- benchmarks/engines.py -->", "<!-- end of benchmarks/engines.py -->"


@dataclass(frozen=True)
class Row:
    """One graph. weights, engine: bytes; nodes of the file, layers of the parsed network; seconds
    of CPU time."""

    model: str
    graph: str
    precision: str
    dialect: str
    nodes: int
    layers: int
    weights: int
    engine: int
    seconds: float


def export(source: Path, settings: dict[str, int], out: Path) -> Path:
    """A bundle of a checkpoint."""
    from edgert.export.pipeline import export_source

    options = {"precision": ",".join(PRECISIONS), "lowerings": DIALECTS, "settings": settings}
    export_source(source, out, **options)
    return out


def rows(bundle: Path, model: str, trt: Any) -> Iterator[Row]:
    """Every graph of a bundle in each precision and dialect that it has."""
    opened, target = Bundle.open(bundle), find("rtx-check")
    has = {(v.precision, v.lowering) for v in opened.manifest.variants.values()}
    for precision, dialect in product(PRECISIONS, DIALECTS):
        if (precision, dialect) not in has:
            continue
        with tempfile.TemporaryDirectory() as folder:
            graphs = list(plan_build(opened, target, precision, lowering=dialect).graphs)
            with suppress(UnsupportedModel):  # without a loop that it could end
                graphs += plan_build(opened, target, precision, Path(folder), dialect).graphs
            for graph in graphs:
                start = time.process_time()
                made = compile_graph(trt, graph, target)
                seconds = round(time.process_time() - start, 2)
                sizes = graph.weights, len(made.engine), seconds
                yield Row(model, graph.name, precision, dialect, graph.nodes, made.layers, *sizes)


def table(found: list[Row]) -> str:
    lines = [
        "| model | graph | precision | dialect | nodes | layers | weights | engine | CPU time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        weights, engine = f"{row.weights / 1e6:.2f} MB", f"{row.engine / 1e6:.2f} MB"
        cells = [row.model, row.graph, row.precision, row.dialect, row.nodes, row.layers]
        lines.append(f"| {' | '.join(map(str, [*cells, weights, engine, f'{row.seconds} s']))} |")
    return "\n".join(lines)


def put(text: str, document: Path) -> None:
    """Replace what is between the marks of a document."""
    old = document.read_text(encoding="utf-8")
    before, found, rest = old.partition(START)
    _, also, after = rest.partition(END)
    if not (found and also):
        sys.exit(f"{document} has no {START} and {END}")
    document.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="bundles, or checkpoints to export")
    parser.add_argument("--into", type=Path, metavar="FILE", help="a document with the two marks")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    given = parser.parse_args()
    trt = load_compiler(find("rtx-check"))
    found: list[Row] = []
    for argument in given.models:
        place, _, setting = argument.partition(":")
        key, _, value = setting.partition("=")
        source, settings = Path(place), {key: int(value)} if key else {}
        with tempfile.TemporaryDirectory() as folder:
            is_bundle = (source / MANIFEST).is_file()
            name = source.name if is_bundle else source.parent.name
            bundle = source if is_bundle else export(source, settings, Path(folder) / "bundle")
            for row in rows(bundle, name, trt):
                found.append(row)
                print(row, file=sys.stderr)
    if given.json:
        print(json.dumps({"compiler": str(trt.__version__), "graphs": [asdict(r) for r in found]}))
    elif given.into is None:
        print(table(found))
    if given.into is not None:
        put(table(found), given.into)


if __name__ == "__main__":
    main()
