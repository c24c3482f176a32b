"""Whether a manifest's wiring makes sense: every input has a source, every output a destination.

Pure bookkeeping over names, without opening a graph: a step runs prologue, body (any number of
times) and epilogue; values flow forward within the step, states carry over to the next.
"""

from __future__ import annotations

from edgert.spec import GraphSpec, Manifest, VariantSpec

PARTS = ("prologue", "body", "epilogue")  # in the order in which a step runs them


def wiring_problems(manifest: Manifest) -> list[str]:
    """Every fault of the wiring as 'json.path: what is wrong', in no particular order."""
    problems = []
    for name, state in manifest.states.items():
        if state.counter is None:
            continue
        counter = manifest.states.get(state.counter)
        if counter is None or counter.kind != "counter":
            what = "no state" if counter is None else f"of kind {counter.kind}"
            problems.append(f"states.{name}.counter: {state.counter!r} is {what}, not a counter")
    parts = {part: getattr(manifest.program, part) for part in PARTS}
    played = [graph for graph in parts.values() if graph is not None]
    for part, graph in parts.items():
        if graph is not None and played.count(graph) > 1:
            problems.append(f"program.{part}: the graph {graph!r} plays two parts")
    read: set[str] = set()
    for name, variant in manifest.variants.items():
        problems += _variant_problems(manifest, f"variants.{name}", variant, parts)
        read |= {end for graph in variant.graphs.values() for end in graph.inputs.values()}
    for name in manifest.inputs:
        if f"input.{name}" not in read:
            problems.append(f"inputs.{name}: no graph reads it")
    return problems


def _variant_problems(
    manifest: Manifest, path: str, variant: VariantSpec, parts: dict[str, str | None]
) -> list[str]:
    problems = []
    order = {graph: i for i, graph in enumerate(parts.values()) if graph is not None}
    for part, player in parts.items():
        if player is not None and player not in variant.graphs:
            problems.append(f"{path}.graphs.{player}: missing, program.{part} names it")
    for name in variant.graphs:
        if name not in order:
            problems.append(f"{path}.graphs.{name}: plays no part in the program")
    graphs = {name: graph for name, graph in variant.graphs.items() if name in order}

    producers: dict[str, list[str]] = {}  # endpoint -> the graphs that write it
    for name, graph in graphs.items():
        problems += _endpoint_problems(manifest, f"{path}.graphs.{name}", graph)
        for end in graph.outputs.values():
            producers.setdefault(end, []).append(name)
    for end, names in producers.items():
        if end.partition(".")[0] in ("value", "result") and len(names) > 1:
            problems.append(f"{path}.graphs: {end} is written by {' and '.join(sorted(names))}")
    for result in manifest.results:
        if f"result.{result}" not in producers:
            problems.append(f"{path}.graphs: no graph writes result.{result}")

    consumed = {end for graph in graphs.values() for end in graph.inputs.values()}
    for name, graph in graphs.items():
        for port, end in graph.inputs.items():
            if not end.startswith("value."):
                continue
            at, makers = f"{path}.graphs.{name}.inputs.{port}", producers.get(end, [])
            if not makers:
                problems.append(f"{at}: no graph writes {end}")
            elif all(order[maker] >= order[name] for maker in makers):
                problems.append(f"{at}: {end} is written by {makers[0]!r}, which runs no earlier")
    for end in producers:
        if end.startswith("value.") and end not in consumed:
            problems.append(f"{path}.graphs: {end} is written and never read")
    for state in manifest.states:
        if f"state.{state}" not in consumed:
            problems.append(f"{path}.graphs: no graph reads state.{state}")
    return problems


def _endpoint_problems(manifest: Manifest, path: str, graph: GraphSpec) -> list[str]:
    problems = []
    known = {
        "input": manifest.inputs.keys(),
        "state": manifest.states.keys(),
        "result": manifest.results.keys(),
    }
    for side, ports in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        for port, end in ports.items():
            at = f"{path}.{side}.{port}"
            kind, _, name = end.partition(".")
            if kind in known and name not in known[kind]:
                problems.append(f"{at}: there is no {kind} {name!r}")
            if side == "inputs" and kind == "result":
                problems.append(f"{at}: {end} is a result, a graph cannot read it")
            if side == "outputs" and kind == "input":
                problems.append(f"{at}: {end} is an input, a graph cannot write it")
            if side == "outputs" and kind == "state":
                state = manifest.states.get(name)
                if state is not None and state.kind == "counter":
                    problems.append(f"{at}: {end} is a counter, only the runtime writes it")
                if list(graph.outputs.values()).count(end) > 1:
                    problems.append(f"{at}: {end} is written twice by one graph")
    return problems
