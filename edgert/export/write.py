"""From a source to a sealed, proven bundle directory: trace, write, check, publish."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgert._version import __version__
from edgert.bundle import Bundle, list_files, seal, write_manifest
from edgert.errors import UnsupportedModel, UsageError
from edgert.export.check import check_bundle
from edgert.export.comparison import Verdict
from edgert.export.task import task_of
from edgert.export.trace import trace
from edgert.export.weights import WeightsFile, check_weights, strip
from edgert.files import publish_directory
from edgert.manifest import SLUG
from edgert.models.families import program as program_of
from edgert.models.importers import Imported
from edgert.models.program import Program
from edgert.progress import Reporter
from edgert.spec import LOWERINGS, GraphSpec, Lowering, Manifest, TokenizerSpec, VariantSpec
from edgert.workshop import workshop

PRECISIONS = ("fp32",)
DEFAULT_LOWERINGS: tuple[Lowering, ...] = ("ort", "portable")


@dataclass(frozen=True)
class ExportOptions:
    """What to make of a source. `sampling` are the bundle's defaults, over the source's own.

    unrolled  add variants with a loop unrolled in one graph
    task      what the puzzles of a model that solves are, instead of what its source says
    """

    precision: str = "fp32"
    lowerings: tuple[Lowering, ...] = DEFAULT_LOWERINGS
    sampling: dict[str, Any] | None = None
    name: str | None = None
    unrolled: bool = False
    task: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"precision {self.precision!r} cannot be exported",
                do=f"choose one of: {', '.join(PRECISIONS)}",
            )
        for lowering in self.lowerings:
            if lowering not in DEFAULT_LOWERINGS:
                raise UsageError(
                    f"lowering {lowering!r} cannot be exported",
                    do=f"choose from: {', '.join(DEFAULT_LOWERINGS)}",
                )
        if not self.lowerings:
            raise UsageError("no lowering was asked for", do="choose ort, portable or both")
        if self.name is not None and not SLUG.fullmatch(self.name):
            raise UsageError(
                f"{self.name!r} is not a name for a bundle",
                do="use at most 64 letters, digits, dots, dashes and underscores",
            )


@dataclass(frozen=True)
class Exported:
    """The published bundle, and what its gate measured."""

    path: Path
    manifest: Manifest
    verdict: Verdict
    nbytes: int


def export_bundle(
    source: Imported, out: Path, options: ExportOptions, reporter: Reporter | None = None
) -> Exported:
    """Trace, write, prove and publish a bundle. Nothing appears at `out` unless the gate passes.

    Raises GateFailed (a graph differs from the model), UnsupportedModel (no lowering fits),
    UsageError (`out` is in the way, or a task not the model's), EdgertError (the exporter failed).
    """
    reporter = reporter or Reporter()
    program = program_of(source.model)
    source = replace(source, task=task_of(program, options.task, source.task, reporter))
    lowerings = _feasible(program, options.lowerings, reporter)
    with workshop(out) as work:
        variants = _write_graphs(work, program, options, lowerings, reporter)
        manifest = _manifest(work, program, source, options, variants)
        _write_sealed(work, manifest)
        verdict = check_bundle(work, program, options.precision, reporter)
        manifest = _add_parity(work, verdict)
        publish_directory(work, out)
    nbytes = sum(entry.bytes for entry in manifest.files.values())
    return Exported(out, manifest, verdict, nbytes)


def _feasible(
    program: Program, wanted: tuple[Lowering, ...], reporter: Reporter
) -> tuple[Lowering, ...]:
    for lowering in wanted:
        if lowering in program.refusals:
            reporter.line("note", f"no {lowering} lowering: {program.refusals[lowering]}")
    feasible = tuple(x for x in LOWERINGS if x in wanted and x not in program.refusals)
    if not feasible:
        raise UnsupportedModel(
            f"no lowering of {', '.join(wanted)} fits this model: "
            + "; ".join(program.refusals.values()),
            do="export with --lowering portable",
        )
    return feasible


def _write_graphs(
    work: Path,
    program: Program,
    options: ExportOptions,
    lowerings: tuple[Lowering, ...],
    reporter: Reporter,
) -> dict[str, VariantSpec]:
    """Every graph in every lowering, over one weights file."""
    precision = options.precision
    folder = work / "variants" / precision
    folder.mkdir(parents=True)
    variants: dict[str, VariantSpec] = {}
    forms = {"": program.graphs}
    if options.unrolled and program.unrolled is not None:
        forms["-unrolled"] = (program.unrolled,)
    with WeightsFile(folder / "weights.data") as weights:
        for lowering in lowerings:
            for form, graphs in forms.items():
                specs: dict[str, GraphSpec] = {}
                opsets: dict[str, int] = {}
                for graph in graphs:
                    name = f"{graph.name}-{lowering}{form}"
                    with reporter.stage("tracing", f"{graph.name}{form} ({lowering})"):
                        model = trace(program, graph, lowering)
                    check_weights(model, program.weights, f"{graph.name}{form} ({lowering})")
                    strip(model)
                    weights.externalize(model)
                    file = folder / f"{name}.onnx"
                    ir.save(model, file)
                    opsets |= {domain or "ai.onnx": v for domain, v in model.opset_imports.items()}
                    relative = file.relative_to(work).as_posix()
                    data = (f"variants/{precision}/{weights.path.name}",)
                    specs[graph.name] = GraphSpec(relative, data, graph.inputs, graph.outputs)
                variant = VariantSpec(precision, lowering, opsets, specs)
                variants[f"{precision}-{lowering}{form}"] = variant
        nbytes = weights.nbytes
    reporter.line("weights", f"{precision}, {nbytes / 1e6:.1f} MB, one file for all lowerings")
    return variants


def _manifest(
    work: Path,
    program: Program,
    source: Imported,
    options: ExportOptions,
    variants: dict[str, VariantSpec],
) -> Manifest:
    tokenizer = None
    if source.tokenizer_json is not None:
        (work / "tokenizer.json").write_text(source.tokenizer_json, encoding="utf-8")
        tokenizer = TokenizerSpec("file", "tokenizer.json")
    elif source.byte_offset is not None:
        tokenizer = TokenizerSpec("bytes", offset=source.byte_offset)
    tables = {}
    for name, table in program.tables.items():
        (work / "tables").mkdir(exist_ok=True)
        tables[name] = f"tables/{name}.npy"
        np.save(work / tables[name], table.detach().numpy(), allow_pickle=False)
    if source.chat_template is not None:
        (work / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")
    return Manifest(
        name=options.name or source.name,
        summary=program.summary,
        model_id="",
        weights_id=weights_id(source.model),
        parameters=program.parameters,
        vocab_size=program.vocab_size,
        context=program.context,
        program=program.parts,
        inputs=program.inputs,
        results=program.results,
        states=program.states,
        variants=variants,
        eos=source.eos,
        bos=source.bos,
        tokenizer=tokenizer,
        chat_template="chat_template.jinja" if source.chat_template is not None else None,
        sampling=source.sampling | (options.sampling or {}),
        provenance=source.provenance
        | {"exporter": f"edgert {__version__}", "torch": torch.__version__.split("+")[0]},
        requires={"onnxruntime": ">=1.23"},
        format_version=_version(program),
        task=source.task,
        tables=tables,
    )


def _version(program: Program) -> int:
    """The oldest format that has what the program needs."""
    loop = program.parts.loop
    return 1 if loop is None else 2 if program.states else 3


def _write_sealed(work: Path, manifest: Manifest) -> Manifest:
    manifest = seal(replace(manifest, files=list_files(work)))
    write_manifest(work, manifest)
    return manifest


def _add_parity(work: Path, verdict: Verdict) -> Manifest:
    """Store the verdict: a report, so it changes neither identity."""
    bundle = Bundle.open(work, verify=False)
    text = json.dumps(verdict.to_json(bundle), indent=1)
    (work / "parity.json").write_text(text + "\n", encoding="utf-8")
    return _write_sealed(work, replace(bundle.manifest, reports=("parity.json",)))


def weights_id(model: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters: what was trained."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().data)
    return digest.hexdigest()
