"""export: what needs the build side (torch, onnx)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import as_json, common, option
from edgert.cli.show import LABEL, TerminalReporter, accuracy_lines, note, print_json, size

if TYPE_CHECKING:
    from edgert.export.comparison import Verdict


@click.command(
    epilog="example: edgert export model.gguf -o bundles/model",
)
@click.argument("source", type=click.Path(path_type=Path))
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="The bundle directory to write.",
)
@option(
    "--precision",
    metavar="NAMES",
    help="fp32 (the default), fp16, int8, int4; several with commas between.",
)
@option(
    "--kv",
    metavar="NAMES",
    help="Keep keys and values in fp32 (the default) or int8; both with a comma between.",
)
@option(
    "--lowering",
    "lowerings",
    multiple=True,
    metavar="NAME",
    help="ort, portable, modern (default: the first two).",
)
@option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help="Positions to support (default: the model's own).",
)
@option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A tokenizer.json instead of the source's.",
)
@option("--name", metavar="NAME", help="Name of the model in the bundle.")
@option(
    "--task",
    metavar="NAME",
    help="What a solving model's puzzles are: sudoku-4x4, maze-30x30, arc-30x30 and so on "
    "(default: what its source says, or its size leaves no doubt of).",
)
@option(
    "--dataset",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The dataset.json a solving model was trained with, or its folder "
    "(default: the one beside the checkpoint).",
)
@option(
    "--setting",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A field of a solving model's config that its files lack, such as num_heads=8.",
)
@option(
    "--unrolled",
    is_flag=True,
    help="Add variants in which a loop is unrolled: one graph, fixed depth.",
)
@as_json
@common
def export(
    source: Path,
    output: Path,
    as_json: bool,
    quiet: bool,
    debug: bool,
    settings: tuple[str, ...],
    **given: Any,
) -> None:
    """Export SOURCE to a bundle, through the parity gate.

    SOURCE is a run or checkpoint of `edgert train`, a published checkpoint (step-*.pt, step_<n>,
    *.pt), a GGUF file, a Hugging Face folder (config.json and safetensors) or a recipe (*.toml).
    What a model file is, its content decides, not its name.

    Every state and logit of the exported graphs is compared with the model in torch. Where they
    differ nothing is written, and the exit code is 6.
    """
    try:
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        from edgert.errors import MissingDependency

        raise MissingDependency(
            str(error.name), "export", why="exporting traces models in torch"
        ) from error
    from edgert.export.pipeline import export_source

    reporter = TerminalReporter(quiet)
    chosen = _settings(settings)
    exported = export_source(source, output, settings=chosen, reporter=reporter, **given)
    if as_json:
        manifest = exported.manifest
        print_json(
            {
                "bundle": str(exported.path),
                "bytes": exported.nbytes,
                "model_id": manifest.model_id,
                "variants": {name: v.variant_id for name, v in manifest.variants.items()},
                "verdict": "pass",
                "checks": [vars(check) for check in exported.verdict.checks],
                "accuracy": exported.accuracy,
            }
        )
        return
    for line in _parity_table(exported.verdict):
        note(f"{'parity':<{LABEL}}{line}", quiet=quiet)
    for line in accuracy_lines(exported.accuracy):
        note(f"{'accuracy':<{LABEL}}{line}", quiet=quiet)
    click.echo(
        f"{'bundle':<{LABEL}}{exported.path}  {size(exported.nbytes)}  "
        f"identity {exported.manifest.model_id[:12]}  verdict pass"
    )


def _settings(given: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE with a number, true, false or text -> fields, which the importer checks."""
    import json

    found: dict[str, Any] = {}
    for item in given:
        key, equals, text = item.partition("=")
        if not key or not equals or len(text) > 100:
            raise click.UsageError(f"--setting wants KEY=VALUE, not {item[:60]!r}")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        found[key] = value if isinstance(value, (bool, int, float)) else text
    return found


def _parity_table(verdict: Verdict) -> list[str]:
    words = {
        "prefill": "whole sequence in one step",
        "steps": "prefill, then single steps",
        "chunks": "uneven chunks",
        "batch": "two ragged rows",
        "segments": "iterations, exact carries",
        "free": "iterations, free-running",
        "whole": "iterations in one graph",
    }
    rounds = {"float32": "", "int8": " (int8)", "float16": " (rounded)", "cpu": " (cpu)"}
    names = [c.variant + rounds[c.activations] for c in verdict.checks]
    width = max(map(len, names)) + 2

    def states(worst: float | None) -> str:
        return f"{'-':<7}" if worst is None else f"{worst:.1e}"

    return [
        f"{name:<{width}}{words[c.name]:<28}max |Δlogit| {c.logits_max_abs:.1e}  "
        f"max |Δstate| {states(c.states_max_abs)}  top-1 {c.top1_agree}/{c.top1_total}"
        for name, c in zip(names, verdict.checks, strict=True)
    ]
