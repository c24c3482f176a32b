"""build: engines for a device, or the plan of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgert.cli.options import BUNDLE, as_json, common, option
from edgert.cli.show import LABEL, TerminalReporter, hashing, print_json, size

if TYPE_CHECKING:
    from edgert.build.pipeline import Engine
    from edgert.build.plan import BuildPlan, GraphPlan, Shape, ShapeProfile


@click.command(
    epilog="example: edgert build bundles/smollm2-135m-instruct --target orin-nano-jp6 --dry-run",
)
@BUNDLE
@option(
    "--target",
    required=True,
    metavar="NAME",
    help="orin-nano-jp6, orin-nx-jp6, agx-orin-jp6, agx-orin-jp7, thor-jp7, rtx-check; or a .toml "
    "file of your own.",
)
@option("--precision", metavar="NAME", help="One of the target's (default: its best).")
@option("--lowering", metavar="NAME", help="portable or modern (default: the target's best).")
@option(
    "--loop-form",
    is_flag=True,
    help="One engine with the model's loop inside, instead of one for each part of it.",
)
@option("--dry-run", is_flag=True, help="Print the plan and build nothing.")
@option("--rebuild", is_flag=True, help="Also what the cache has.")
@as_json
@common
def build(
    bundle: Path,
    target: str,
    precision: str | None,
    lowering: str | None,
    loop_form: bool,
    dry_run: bool,
    rebuild: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Compile a bundle's graphs with TensorRT, for the device that this runs on.

    Everything that can be refused beforehand is: operators, operator sets, memory. Engines go to
    the cache, signed: they are native code, and are used only where they were built. The target
    rtx-check compiles on any machine with TensorRT-RTX; what it makes runs nowhere.
    """
    from contextlib import ExitStack
    from tempfile import TemporaryDirectory

    from edgert.build.pipeline import build_engines
    from edgert.build.plan import plan_build
    from edgert.build.target import find
    from edgert.bundle import Bundle, read_manifest
    from edgert.cache import cache_dir

    chosen = find(target)
    total = sum(entry.bytes for entry in read_manifest(bundle).files.values())
    with hashing(total, quiet=quiet) as advance:
        opened = Bundle.open(bundle, progress=advance)
    with ExitStack() as stack:
        folder = None
        if loop_form:
            folder = Path(stack.enter_context(TemporaryDirectory(dir=cache_dir())))
        plan = plan_build(opened, chosen, precision, folder, lowering)
        if dry_run:
            if as_json:
                print_json(plan.to_json())
            else:
                click.echo("\n".join(_described(plan)))
            return
        engines = build_engines(plan, rebuild=rebuild, reporter=TerminalReporter(quiet))
    if as_json:
        print_json(plan.to_json() | {"engines": [_engine(engine) for engine in engines]})
        return
    for engine in engines:
        click.echo(
            f"{'engine':<{LABEL}}{engine.graph:<10}  {size(engine.nbytes):>9}  "
            f"{engine.layers:>5} layers  {engine.seconds:6.1f} s  {engine.path}"
        )


def _engine(engine: Engine) -> dict[str, object]:
    return {
        "graph": engine.graph,
        "path": str(engine.path),
        "bytes": engine.nbytes,
        "layers": engine.layers,
        "seconds": engine.seconds,
        "cached": engine.cached,
    }


def _described(plan: BuildPlan) -> Iterator[str]:
    from edgert.build.plan import MB

    target, memory = plan.target, plan.memory
    yield (
        f"{'target':<{LABEL}}{target.name}: {target.summary} · {target.compiler} "
        f"{target.version} · SM {target.sm}"
    )
    yield f"{'variant':<{LABEL}}{plan.variant} of {plan.bundle}"
    for graph in plan.graphs:
        yield from _graph(graph)
    parts = [
        f"weights {size(memory.weights)}",
        f"activations {size(memory.activations)}",
        f"states {size(sum(memory.states.values()))}",
        f"inputs and results {size(memory.buffers)}",
    ]
    total, limit = size(memory.total), size(target.memory_mb * MB)
    yield f"{'memory':<{LABEL}}{total} of {limit}: {', '.join(parts)}"
    yield f"{'building':<{LABEL}}about {size(plan.building)}"


def _graph(graph: GraphPlan) -> Iterator[str]:
    rounding = f", {sum(graph.rounding)} that quantize" if any(graph.rounding) else ""
    yield (
        f"{'graph':<{LABEL}}{graph.name}: {graph.nodes} nodes{rounding}, weights "
        f"{size(graph.weights)}, activations {size(graph.activations)}"
    )
    for profile in graph.profiles:
        rows = [(profile.name, "", "min", "opt", "max"), *_rows(graph, profile)]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        for row in rows:
            columns = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            yield "  " + "  ".join(columns).rstrip()


def _rows(graph: GraphPlan, profile: ShapeProfile) -> Iterator[tuple[str, str, str, str, str]]:
    """Numbered inputs of one type and the same shapes together."""
    alike: dict[tuple[str, str, tuple[Shape, Shape, Shape]], list[str]] = {}
    for name, shapes in profile.shapes.items():
        single = "" if "." in name else name
        alike.setdefault((single, graph.inputs[name].dtype, shapes), []).append(name)
    for (_, dtype, shapes), names in alike.items():
        shown = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
        low, best, high = ("x".join(map(str, shape)) for shape in shapes)
        yield (shown, dtype, low, best, high)
