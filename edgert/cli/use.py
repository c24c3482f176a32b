"""inspect, verify, version: what a bundle and an installation say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import BUNDLE, as_json, common
from edgert.cli.show import accuracy_lines, hashing, print_json, size

if TYPE_CHECKING:
    from edgert.spec import Manifest, StateSpec, Wire

MAX_REPORT_BYTES = 1 << 20
_ACTIVATIONS = {
    "float32": "",
    "int8": ", activations in int8",
    "float16": ", activations in float16",
    "cpu": ", float16 as the CPU has it",
}
_MEASURED = ("perplexity", "perplexity_fp32", "ratio", "ratio_error", "kl", "top1")


@click.command(epilog="example: edgert inspect bundles/smollm2-135m-instruct --json")
@BUNDLE
@as_json
@common
def inspect(bundle: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """What a bundle holds: program, state, variants, files, parity verdict, accuracy."""
    from edgert.bundle import Bundle, manifest_to_json

    opened = Bundle.open(bundle, verify=False)
    manifest = opened.manifest
    parity = _parity(opened.root) if "parity.json" in manifest.reports else None
    accuracy = _accuracy(opened.root) if "accuracy.json" in manifest.reports else None
    if as_json:
        value = manifest_to_json(manifest)
        value["state_bytes_per_token"] = state_bytes_per_token(manifest.states)
        value["variant_state_bytes_per_token"] = {
            name: state_bytes_per_token(manifest.states_of(name)) for name in manifest.variants
        }
        value["bytes"] = sum(entry.bytes for entry in manifest.files.values())
        print_json(value | {"parity": parity, "accuracy": accuracy})
        return
    click.echo("\n".join(_describe(manifest, parity)))
    for line in accuracy_lines(accuracy):
        click.echo(f"accuracy  {line}")


def _parity(root: Path) -> dict[str, Any]:
    """The verdict of the export's gate."""

    def known(value: Any) -> bool:
        words = value["verdict"], value["truth"]
        numbers = [check["logits_max_abs"] for check in value["checks"]]
        return (
            all(isinstance(word, str) and word.isprintable() for word in words)
            and bool(numbers)
            and all(isinstance(number, float) for number in numbers)
        )

    return _report(root, "parity", known)


def _accuracy(root: Path) -> dict[str, Any]:
    """What variants with something in few bits cost, as the export measured it."""

    def known(value: Any) -> bool:
        variants = value["variants"]
        return all(
            name.isprintable()
            and isinstance(one["within_budget"], bool)
            and all(isinstance(one[key], float) for key in _MEASURED)
            for name, one in variants.items()
        )

    return _report(root, "accuracy", known)


def _report(root: Path, name: str, known: Callable[[Any], bool]) -> dict[str, Any]:
    """A report of a bundle; it may come from anywhere, so it is checked."""
    import json

    from edgert.errors import BadBundle
    from edgert.files import read_regular

    path = root / f"{name}.json"
    try:
        value = json.loads(read_regular(path, MAX_REPORT_BYTES))
        if known(value):
            return dict(value)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise BadBundle(
        f"the {name} report is not one that edgert writes",
        where=str(path),
        do="export the bundle again, or copy it again from its source",
    )


def state_bytes_per_token(states: Mapping[str, StateSpec]) -> int:
    """Bytes that one more token of one sequence adds to the append states."""
    import numpy as np

    total = 0
    for state in states.values():
        if state.kind == "append":
            sizes = [axis for axis in state.shape if isinstance(axis, int)]
            total += int(np.prod(sizes)) * np.dtype(state.dtype).itemsize
    return total


def _describe(manifest: Manifest, parity: dict[str, Any] | None) -> list[str]:
    precisions = ", ".join(sorted({v.precision for v in manifest.variants.values()}))
    lines = [
        f"{manifest.name}  {manifest.summary}, {precisions}, identity {manifest.model_id[:12]}",
        f"program   {' → '.join(part for part in _parts(manifest) if part)}",
    ]
    spec = next(iter(manifest.variants.values()))
    for name, graph in spec.graphs.items():
        reads, writes = _ends(graph.inputs.values()), _ends(graph.outputs.values())
        lines.append(f"  {name}  {reads}  →  {writes}")
    lines += _solving(manifest) if manifest.solves else [_state(manifest)]
    width = max(map(len, manifest.variants))
    for name, variant in manifest.variants.items():
        files = {g.file for g in variant.graphs.values()}
        data = {f for g in variant.graphs.values() for f in g.data}
        nbytes = sum(manifest.files[f].bytes for f in files | data)
        opsets = ", ".join(f"{domain} {v}" for domain, v in variant.opsets.items())
        short = variant.variant_id[:12]
        row = state_bytes_per_token(manifest.states_of(name))
        state = f"state {size(row)} a token, {size(1024 * row)} at 1,024  " if row else ""
        about = f"{short}  {size(nbytes):>8}  {state}opset {opsets}"
        lines.append(f"variant   {name:<{width}}  {about}")
    lines.append("requires  " + ", ".join(f"{k} {v}" for k, v in manifest.requires.items()))
    if not manifest.solves:
        tokenizer = manifest.tokenizer.kind if manifest.tokenizer else "none: token ids only"
        template = "with chat template" if manifest.chat_template else "no chat template"
        lines.append(
            f"text      tokenizer {tokenizer}, {template}, end tokens {list(manifest.eos)}"
        )
    origin = manifest.provenance
    told = [
        f"{key} {_plain(value)}".removeprefix("source ") for key, value in origin.items() if value
    ]
    lines.append("source    " + ", ".join(told))
    if parity:
        for kind, how in _ACTIVATIONS.items():
            checks = [c for c in parity["checks"] if c.get("activations", "float32") == kind]
            if checks:
                worst = max(check["logits_max_abs"] for check in checks)
                lines.append(
                    f"parity    {parity['verdict']}: {len(checks)} checks against "
                    f"{parity['truth']}{how}, max |Δlogit| {worst:.1e}"
                )
    else:
        lines.append("parity    no verdict in this bundle")
    return lines


def _state(manifest: Manifest) -> str:
    kinds = [state.kind for state in manifest.states.values()]
    return f"state     {kinds.count('append')} append slots, context {manifest.context} tokens"


def _solving(manifest: Manifest) -> list[str]:
    """When a puzzle's loop ends, what a puzzle is, and what its rows are taken from."""
    import numpy as np

    loop = manifest.program.loop
    assert loop is not None
    halts = "never before its limit"
    if loop.halt is not None:
        what = f"the sum of {loop.halt.signal}" if loop.halt.cumulative else loop.halt.signal
        halts = f"when {what} > {loop.halt.threshold:g}, not before {loop.halt.least}"
    puzzles = manifest.task or "not known: token ids only"
    carry = sum(
        np.dtype(spec.dtype).itemsize * int(np.prod([n for n in spec.shape if isinstance(n, int)]))
        for spec in loop.values.values()
    )
    lines = [
        f"halts     {halts}, at most {loop.iterations} {manifest.program.body}s",
        f"puzzles   {puzzles}, {manifest.context} cells of {manifest.vocab_size} tokens, "
        f"{size(carry)} of state each",
    ]
    for name, file in manifest.tables.items():
        row = "x".join(map(str, manifest.inputs[name].shape[1:]))
        nbytes = manifest.files[file].bytes
        lines.append(f"table     {name}, rows of {row}, {size(nbytes)}, one row per puzzle")
    return lines


def _plain(value: Any) -> str:
    """A value of the provenance for people: lists without their brackets, digests cut."""
    if isinstance(value, (list, tuple)):
        return "/".join(_plain(item) for item in value)
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def _parts(manifest: Manifest) -> list[str | None]:
    program = manifest.program
    times = program.loop.iterations if program.loop else "n"
    return [program.prologue, program.body and f"({program.body})×{times}", program.epilogue]


def _ends(wires: Iterable[Wire]) -> str:
    """'ids, lens, k.0‥29, v.0‥29': endpoints without their kind, numbered ones as a range."""
    from edgert.spec import endpoints

    groups: dict[str, list[str]] = {}
    for endpoint in (end for wire in wires for end in endpoints(wire)):
        name = endpoint.split(".", 1)[1]
        stem, _, number = name.rpartition(".")
        groups.setdefault(stem if number.isdigit() else name, []).append(number)
    return ", ".join(
        name if not numbers[0].isdigit() else f"{name}.{numbers[0]}‥{numbers[-1]}"
        for name, numbers in groups.items()
    )


@click.command()
@BUNDLE
@as_json
@common
def verify(bundle: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Check a bundle whole: manifest, wiring, paths, and the hash of every file."""
    from edgert.bundle import Bundle, read_manifest

    files = read_manifest(bundle).files
    total = sum(entry.bytes for entry in files.values())
    with hashing(total, quiet=quiet) as advance:
        manifest = Bundle.open(bundle, True, advance).manifest
    if as_json:
        print_json(
            {"verified": True, "model_id": manifest.model_id, "files": len(files), "bytes": total}
        )
    else:
        click.echo(
            f"ok  {manifest.name} · {len(files)} files · {size(total)} · {manifest.model_id[:12]}"
        )


@click.command()
@as_json
@common
def version(as_json: bool, quiet: bool, debug: bool) -> None:
    """The versions of edgert, Python and ONNX Runtime."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    from edgert._version import __version__

    found: dict[str, str | None] = {"edgert": __version__, "python": platform.python_version()}
    for package in ("onnxruntime", "numpy", "tokenizers"):
        try:
            found[package] = installed(package)
        except PackageNotFoundError:
            found[package] = None
    if as_json:
        print_json(found)
    else:
        click.echo(
            "\n".join(f"{name:<12}{value or 'not installed'}" for name, value in found.items())
        )
