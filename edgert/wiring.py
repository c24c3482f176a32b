"""Whether a manifest's wiring makes sense: every input has a source, every output a destination.

Pure bookkeeping over names, without opening a graph: a step runs prologue, body (any number of
times) and epilogue; values flow forward within the step, states carry over to the next.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgert.spec import GraphSpec, LoopSpec, Manifest, StateSpec, VariantSpec, endpoints


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
    program = manifest.program
    played = list(program.parts.values())
    for part, player in program.parts.items():
        if player is not None and played.count(player) > 1:
            problems.append(f"program.{part}: the graph {player!r} plays two parts")
    if program.loop is not None and program.body is None:
        problems.append("program.loop: there is no body that it could repeat")
    halt = program.loop.halt if program.loop is not None else None
    if program.loop is not None and halt is not None and halt.signal not in program.loop.signals:
        problems.append(f"program.loop.halt.signal: there is no signal {halt.signal!r}")
    for name in manifest.tables:
        if name not in manifest.inputs:
            problems.append(f"tables.{name}: there is no input {name!r}")
    read: set[str] = set()
    for name, variant in manifest.variants.items():
        problems += _variant_problems(manifest, name, variant)
        for graph in variant.graphs.values():
            read |= _read(graph)
    for name in manifest.inputs:
        if f"input.{name}" not in read:
            problems.append(f"inputs.{name}: no graph reads it")
    return problems


def _read(graph: GraphSpec | None) -> set[str]:
    return {end for wire in graph.inputs.values() for end in endpoints(wire)} if graph else set()


def _variant_problems(manifest: Manifest, variant_name: str, variant: VariantSpec) -> list[str]:
    path, problems = f"variants.{variant_name}", []
    states = manifest.states_of(variant_name)
    for name in variant.state_dtypes:
        problems += _dtype_problems(f"{path}.state_dtypes.{name}", manifest.states.get(name))
    parts = manifest.parts(variant_name)
    order = {graph: i for i, graph in enumerate(parts.values()) if graph is not None}
    for part, player in parts.items():
        if player is not None and player not in variant.graphs:
            problems.append(f"{path}.graphs.{player}: missing, program.{part} names it")
    for name in variant.graphs:
        if name not in order:
            problems.append(f"{path}.graphs.{name}: plays no part in the program")
    graphs = {name: graph for name, graph in variant.graphs.items() if name in order}
    body = parts["body"]

    producers: dict[str, list[str]] = {}  # endpoint -> the graphs that write it
    consumed: set[str] = set()
    for name, graph in graphs.items():
        at = f"{path}.graphs.{name}"
        problems += _endpoint_problems(manifest, states, at, graph, name == body)
        for wire in graph.outputs.values():
            for end in set(endpoints(wire)):
                producers.setdefault(end, []).append(name)
        consumed |= _read(graph)
    for end, names in producers.items():
        kind, _, name = end.partition(".")
        rivals = names
        if kind == "value" and body and end in _read(graphs.get(body)):
            rivals = [n for n in names if n != body]  # it goes round the loop, from before it
        if kind in ("value", "result", "signal") and len(rivals) > 1:
            problems.append(f"{path}.graphs: {end} is written by {' and '.join(sorted(names))}")
    for result in manifest.results:
        if f"result.{result}" not in producers:
            problems.append(f"{path}.graphs: no graph writes result.{result}")
    loop = manifest.program.loop
    if loop is not None and body is not None:
        for kind, declared in (("signal", loop.signals), ("value", loop.values)):
            for name in declared:
                if f"{kind}.{name}" not in producers:
                    problems.append(f"{path}.graphs: no graph writes {kind}.{name}")

    for name, graph in graphs.items():
        for port, wire in graph.inputs.items():
            for end in endpoints(wire):
                if not end.startswith("value."):
                    continue
                at, makers = f"{path}.graphs.{name}.inputs.{port}", producers.get(end, [])
                if not makers:
                    problems.append(f"{at}: no graph writes {end}")
                elif all(order[maker] >= order[name] for maker in makers):
                    maker = makers[0]
                    problems.append(f"{at}: {end} is written by {maker!r}, which runs no earlier")
    for end in producers:
        if end.startswith("value.") and end not in consumed:
            problems.append(f"{path}.graphs: {end} is written and never read")
    for state in manifest.states:
        if f"state.{state}" not in consumed:
            problems.append(f"{path}.graphs: no graph reads state.{state}")
    return problems


def _dtype_problems(at: str, state: StateSpec | None) -> list[str]:
    """Faults of a state that a variant keeps in another dtype."""
    if state is None:
        return [f"{at}: there is no such state"]
    if state.kind == "counter":
        return [f"{at}: a counter is int64 in every variant"]
    if state.init != "zeros":
        return [f"{at}: its initial value is a file, which has one dtype"]
    return []


def _endpoint_problems(
    manifest: Manifest,
    states: Mapping[str, StateSpec],
    path: str,
    graph: GraphSpec,
    is_body: bool,
) -> list[str]:
    problems = []
    loop = manifest.program.loop
    known = {
        "input": manifest.inputs.keys(),
        "state": states.keys(),
        "result": manifest.results.keys(),
        "loop": {"iteration", "steps"},
        "signal": loop.signals.keys() if loop else (),
    }
    if loop is not None:
        known["value"] = loop.values.keys()
    for side, ports in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        written = [end for wire in ports.values() for end in set(endpoints(wire))]
        for port, wire in ports.items():
            at = f"{path}.{side}.{port}"
            if not isinstance(wire, str):
                problems += _turns(states, at, wire, loop, is_body)
            for end in dict.fromkeys(endpoints(wire)):
                kind, _, name = end.partition(".")
                if kind in known and name not in known[kind]:
                    problems.append(f"{at}: there is no {kind} {name!r}")
                if side == "inputs" and kind in ("result", "signal"):
                    problems.append(f"{at}: {end} is a {kind}, a graph cannot read it")
                if side == "outputs" and kind in ("input", "loop"):
                    what = "an input" if kind == "input" else "the runtime's"
                    problems.append(f"{at}: {end} is {what}, a graph cannot write it")
                if kind in ("loop", "signal") and not is_body:
                    problems.append(f"{at}: {end} belongs to the body of a loop")
                if side == "outputs" and kind == "state":
                    state = states.get(name)
                    if state is not None and state.kind == "counter":
                        problems.append(f"{at}: {end} is a counter, only the runtime writes it")
                    if written.count(end) > 1:
                        problems.append(f"{at}: {end} is written twice by one graph")
    return problems


def _turns(
    states: Mapping[str, StateSpec],
    at: str,
    wire: tuple[str, ...],
    loop: LoopSpec | None,
    is_body: bool,
) -> list[str]:
    """Faults of a list of endpoints: one state for each iteration, all alike."""
    if loop is None or not is_body:
        return [f"{at}: a list of endpoints belongs to the body of a loop"]
    problems = []
    if len(wire) != loop.iterations:
        problems.append(f"{at}: {len(wire)} endpoints for {loop.iterations} iterations")
    if not all(end.startswith("state.") for end in wire):
        problems.append(f"{at}: only states differ from one iteration to the next")
    specs = {states.get(end.partition(".")[2]) for end in wire}
    if len(specs - {None}) > 1:
        problems.append(f"{at}: its states are not alike")
    return problems
