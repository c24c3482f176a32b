"""`edgert build`: a bundle's graphs to engines in the user's cache."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgert.build.adapter import STEPS, Compiled, compile_graph
from edgert.build.device import load_compiler
from edgert.build.plan import BuildPlan, GraphPlan
from edgert.build.target import Target
from edgert.enginestore import (
    Fingerprint,
    engine_path,
    read_engine,
    timings_path,
    write_engine,
)
from edgert.errors import BadFile, Incompatible
from edgert.progress import Reporter


@dataclass(frozen=True)
class Engine:
    """One engine in the cache. `cached`: it was there already; `seconds` are then those it took."""

    graph: str
    path: Path
    nbytes: int
    layers: int
    seconds: float
    cached: bool


def build_engines(
    plan: BuildPlan,
    *,
    rebuild: bool = False,
    reporter: Reporter | None = None,
    load: Callable[[Target], Any] = load_compiler,
) -> list[Engine]:
    """Compile every graph of a plan that the cache lacks; with `rebuild`, every graph.

    Each engine is published when it is complete: an interrupt loses the one that is in the making.
    Raises what `load_compiler` and `compile_graph` raise, EdgertError if the cache is not writable.
    """
    reporter = reporter or Reporter()
    trt = load(plan.target)
    compiler = f"{plan.target.compiler} {trt.__version__}"
    found = []
    for graph in plan.graphs:
        made_for = fingerprint(plan, graph, compiler)
        engine = None if rebuild else _cached(made_for)
        if engine is None:
            engine = _built(trt, plan, graph, made_for, reporter)
        else:
            reporter.line("cached", graph.name)
        found.append(engine)
    return found


def fingerprint(plan: BuildPlan, graph: GraphPlan, compiler: str) -> Fingerprint:
    target = plan.target
    recipe = {
        "profiles": [asdict(profile) for profile in graph.profiles],
        "workspace_mb": target.workspace_mb,
        "optimization_level": target.optimization_level,
    }
    return Fingerprint(
        variant_id=plan.variant_id,
        graph=graph.name,
        files=graph.sha256,
        target=target.name,
        recipe=hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        compiler=compiler,
        sm=target.sm,
    )


def _cached(made_for: Fingerprint) -> Engine | None:
    path = engine_path(made_for)
    try:
        kept = read_engine(path, asdict(made_for))
    except (BadFile, Incompatible):  # it is built again, and replaced
        return None
    if kept is None:
        return None
    facts, engine = kept
    return Engine(made_for.graph, path, len(engine), facts["layers"], facts["seconds"], cached=True)


def _built(
    trt: Any, plan: BuildPlan, graph: GraphPlan, made_for: Fingerprint, reporter: Reporter
) -> Engine:
    timed = {"timings": made_for.compiler, "sm": made_for.sm}
    remembered = timings_path(made_for.compiler, made_for.sm)
    start = time.perf_counter()
    with reporter.stage("building", f"{graph.name} ({plan.precision})", STEPS) as advance:
        made = compile_graph(trt, graph, plan.target, _timings(remembered, timed), advance)
    seconds = round(time.perf_counter() - start, 3)
    if made.timings:
        write_engine(remembered, timed, None, made.timings)
    path = engine_path(made_for)
    write_engine(path, asdict(made_for), _facts(graph, made, seconds), made.engine)
    return Engine(graph.name, path, len(made.engine), made.layers, seconds, cached=False)


def _timings(path: Path, timed: dict[str, str]) -> bytes:
    try:
        kept = read_engine(path, timed)
    except (BadFile, Incompatible):  # they only save time
        return b""
    return b"" if kept is None else kept[1]


def _facts(graph: GraphPlan, made: Compiled, seconds: float) -> dict[str, Any]:
    """What a runtime must know to use the engine: its ports, and which profile is which."""
    return {
        "inputs": {name: asdict(spec) for name, spec in graph.inputs.items()},
        "outputs": {name: asdict(spec) for name, spec in graph.outputs.items()},
        "profiles": [asdict(profile) for profile in graph.profiles],
        "layers": made.layers,
        "seconds": seconds,
    }
