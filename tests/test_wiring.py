"""Wiring: every input has one source that runs earlier, every output one destination."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from bundles import tiny_manifest, wired

from edgert.bundle import check_wiring
from edgert.errors import BadBundle
from edgert.spec import GraphSpec, Manifest, ProgramSpec, StateSpec, TensorSpec, VariantSpec


def looped() -> Manifest:
    """prologue -> body -> epilogue over one carry, with values flowing forward."""

    def graph(inputs: dict[str, str], outputs: dict[str, str]) -> GraphSpec:
        return GraphSpec("g.onnx", (), inputs, outputs)

    graphs = {
        "enter": graph({"ids": "input.ids"}, {"h": "value.h", "z": "state.z"}),
        "think": graph({"h": "value.h", "z": "state.z"}, {"z": "state.z", "score": "value.score"}),
        "leave": graph({"z": "state.z", "score": "value.score", "h": "value.h"}, {"y": "result.y"}),
    }
    return replace(
        tiny_manifest(),
        program=ProgramSpec("leave", "enter", "think"),
        inputs={"ids": TensorSpec("int64", ("batch",))},
        results={"y": TensorSpec("float32", ("batch",))},
        states={"z": StateSpec("carry", "float32", ("batch", 4))},
        variants={"fp32-ort": VariantSpec("fp32", "ort", {"ai.onnx": 20}, graphs)},
    )


def without(manifest: Manifest, graph: str) -> Manifest:
    variant = manifest.variants["fp32-ort"]
    graphs = {name: spec for name, spec in variant.graphs.items() if name != graph}
    return replace(manifest, variants={"fp32-ort": replace(variant, graphs=graphs)})


def with_graph(manifest: Manifest, name: str) -> Manifest:
    variant = manifest.variants["fp32-ort"]
    graphs = {**variant.graphs, name: variant.graphs["leave"]}
    return replace(manifest, variants={"fp32-ort": replace(variant, graphs=graphs)})


WIRING: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "unknown input": (
        lambda m: wired(m, "enter", "inputs", "x", "input.x"),
        "graphs.enter.inputs.x: there is no input 'x'",
    ),
    "unknown state read": (
        lambda m: wired(m, "think", "inputs", "q", "state.q"),
        "graphs.think.inputs.q: there is no state 'q'",
    ),
    "unknown state written": (
        lambda m: wired(m, "think", "outputs", "q", "state.q"),
        "graphs.think.outputs.q: there is no state 'q'",
    ),
    "unknown result": (
        lambda m: wired(m, "leave", "outputs", "q", "result.q"),
        "graphs.leave.outputs.q: there is no result 'q'",
    ),
    "result read": (
        lambda m: wired(m, "leave", "inputs", "y", "result.y"),
        "graphs.leave.inputs.y: result.y is a result, a graph cannot read it",
    ),
    "input written": (
        lambda m: wired(m, "enter", "outputs", "ids", "input.ids"),
        "graphs.enter.outputs.ids: input.ids is an input, a graph cannot write it",
    ),
    "input read by nobody": (
        lambda m: wired(m, "enter", "inputs", "ids", None),
        "inputs.ids: no graph reads it",
    ),
    "result without producer": (
        lambda m: wired(m, "leave", "outputs", "y", "state.z"),
        "no graph writes result.y",
    ),
    "result of two graphs": (
        lambda m: wired(m, "think", "outputs", "y", "result.y"),
        "result.y is written by leave and think",
    ),
    "result twice by one graph": (
        lambda m: wired(m, "leave", "outputs", "y2", "result.y"),
        "result.y is written by leave and leave",
    ),
    "value without producer": (
        lambda m: wired(m, "leave", "inputs", "q", "value.q"),
        "graphs.leave.inputs.q: no graph writes value.q",
    ),
    "value of two graphs": (
        lambda m: wired(m, "leave", "outputs", "h", "value.h"),
        "value.h is written by enter and leave",
    ),
    "value from the future": (
        lambda m: wired(m, "enter", "inputs", "score", "value.score"),
        "graphs.enter.inputs.score: value.score is written by 'think', which runs no earlier",
    ),
    "body feeds itself": (
        lambda m: wired(m, "think", "inputs", "score", "value.score"),
        "graphs.think.inputs.score: value.score is written by 'think', which runs no earlier",
    ),
    "value read by nobody": (
        lambda m: wired(m, "think", "outputs", "x", "value.x"),
        "value.x is written and never read",
    ),
    "state read by nobody": (
        lambda m: replace(m, states={**m.states, "w": m.states["z"]}),
        "no graph reads state.w",
    ),
    "state written and not read": (
        lambda m: wired(
            replace(m, states={**m.states, "w": m.states["z"]}),
            "think",
            "outputs",
            "w",
            "state.w",
        ),
        "no graph reads state.w",
    ),
    "state twice by one graph": (
        lambda m: wired(m, "think", "outputs", "z2", "state.z"),
        "graphs.think.outputs.z2: state.z is written twice by one graph",
    ),
    "counter written": (
        lambda m: wired(
            wired(
                replace(m, states={**m.states, "n": StateSpec("counter", "int64", ("batch",))}),
                "think",
                "inputs",
                "n",
                "state.n",
            ),
            "think",
            "outputs",
            "n",
            "state.n",
        ),
        "graphs.think.outputs.n: state.n is a counter, only the runtime writes it",
    ),
    "part missing": (lambda m: without(m, "think"), "graphs.think: missing, program.body names it"),
    "graph without part": (lambda m: with_graph(m, "extra"), "graphs.extra: plays no part"),
    "graph in two parts": (
        lambda m: replace(m, program=ProgramSpec("leave", "leave", "think")),
        "program.prologue: the graph 'leave' plays two parts",
    ),
}


@pytest.mark.parametrize("case", WIRING)
def test_wrong_wiring_is_refused(case):
    """Every input has one source that exists and runs earlier, every output one destination."""
    break_it, message = WIRING[case]
    with pytest.raises(BadBundle) as caught:
        check_wiring(break_it(looped()))
    assert message in caught.value.what


@pytest.mark.parametrize("manifest", [looped(), tiny_manifest()], ids=["looped", "decoder"])
def test_right_wiring_is_accepted(manifest):
    """A looped and a one-graph program pass."""
    check_wiring(manifest)


def test_each_variant_is_checked():
    """A fault in the second variant is found and named."""
    good = tiny_manifest()
    spec = good.variants["fp32-ort"]
    broken = replace(spec.graphs["decode"], inputs={"ids": "input.ids"})
    both = {**good.variants, "fp32-portable": replace(spec, graphs={"decode": broken})}
    with pytest.raises(BadBundle, match=r"variants.fp32-portable.graphs: no graph reads state.k.0"):
        check_wiring(replace(good, variants=both))
