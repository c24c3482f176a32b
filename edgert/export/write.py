"""From a source to a sealed, proven bundle directory: trace, write, check, publish."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgert._version import __version__
from edgert.bundle import Bundle, list_files, seal, write_manifest
from edgert.errors import MissingDependency, UnsupportedModel, UsageError
from edgert.export.accuracy import REPORT as ACCURACY
from edgert.export.calibration import Ids
from edgert.export.check import check_bundle, too_old
from edgert.export.comparison import Verdict
from edgert.export.few_bits import accuracy_of, quantizers_of
from edgert.export.half import Halver
from edgert.export.kv_int8 import Int8KV, calibrated
from edgert.export.nbits import SCHEMES, Scheme, scheme_of
from edgert.export.rewriter import Rewriter
from edgert.export.spoken import ROUNDS, spoken
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

PRECISIONS = ("fp32", "fp16", *SCHEMES)
KVS = {"fp32": "", "int8": "-kv8"}
"""How keys and values can be kept, and what the names of variants say of it."""
DEFAULT_LOWERINGS: tuple[Lowering, ...] = ("ort", "portable")


@dataclass(frozen=True)
class ExportOptions:
    """What to make of a source. `sampling` are the bundle's defaults, over the source's own.

    precision  one, or several with commas between
    schemes    by precision, what is to differ from its usual scheme
    unrolled   add variants with a loop unrolled in one graph
    task       what the puzzles of a model that solves are, instead of what its source says
    max_drift  bounds what `edgert migrate` may change at a session's next token, in nats of KL
               (None: the runtime's own bound)
    kv         how each precision keeps keys and values: one, or several with commas between
    """

    precision: str = "fp32"
    lowerings: tuple[Lowering, ...] = DEFAULT_LOWERINGS
    sampling: dict[str, Any] | None = None
    name: str | None = None
    unrolled: bool = False
    task: str | None = None
    schemes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_drift: float | None = None
    kv: str = "fp32"

    @property
    def precisions(self) -> tuple[str, ...]:
        return _parts(self.precision)

    @property
    def kvs(self) -> tuple[str, ...]:
        return _parts(self.kv)

    @property
    def weight_only(self) -> dict[str, Scheme]:
        """The schemes of the precisions that have one."""
        return {p: scheme_of(p, self.schemes.get(p)) for p in self.precisions if p in SCHEMES}

    def __post_init__(self) -> None:
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise UsageError(
                    f"precision {precision!r:.60} cannot be exported",
                    do=f"choose from: {', '.join(PRECISIONS)}, with commas between",
                )
        for kv in self.kvs:
            if kv not in KVS:
                raise UsageError(
                    f"keys and values cannot be kept in {kv!r:.60}",
                    do=f"choose from: {', '.join(KVS)}, with commas between",
                )
        for precision, given in self.schemes.items():
            scheme_of(precision, given)
        for lowering in self.lowerings:
            if lowering not in LOWERINGS:
                raise UsageError(
                    f"lowering {lowering!r} cannot be exported",
                    do=f"choose from: {', '.join(LOWERINGS)}",
                )
        if self.max_drift is not None and not 0 <= self.max_drift < math.inf:
            raise UsageError(
                f"max_drift = {self.max_drift:g} bounds nothing", do="give nats from 0 on"
            )
        if not self.lowerings:
            raise UsageError("no lowering was asked for", do=f"choose from: {', '.join(LOWERINGS)}")
        if self.name is not None and not SLUG.fullmatch(self.name):
            raise UsageError(
                f"{self.name!r} is not a name for a bundle",
                do="use at most 64 letters, digits, dots, dashes and underscores",
            )


def _parts(names: str) -> tuple[str, ...]:
    """'fp32, int8' -> ('fp32', 'int8'), each once."""
    return tuple(dict.fromkeys(part.strip() for part in names.split(",")))


Traces = dict[str, ir.Model]
"""Graphs of a program as they were traced, by name, form and lowering."""


@dataclass(frozen=True)
class Exported:
    """The published bundle, and what its gate measured."""

    path: Path
    manifest: Manifest
    verdict: Verdict
    nbytes: int
    accuracy: dict[str, Any] | None = None  # what accuracy.json holds


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
    traces: Traces = {}
    said = partial(_said, program, source, out, traces, reporter)
    rewriters = _rewriters(program, source, options, lowerings, said, reporter)
    kv = calibrated(program, source, lowerings, reporter) if "int8" in options.kvs else None
    with workshop(out) as work:
        variants = _write_graphs(work, program, options, lowerings, rewriters, kv, traces, reporter)
        manifest = _manifest(work, program, source, options, variants)
        _write_sealed(work, manifest)
        verdict = check_bundle(work, program, rewriters, reporter, kv)
        accuracy = accuracy_of(work, program, source, rewriters, reporter)
        manifest = _add_reports(work, verdict, accuracy)
        publish_directory(work, out)
    nbytes = sum(entry.bytes for entry in manifest.files.values())
    return Exported(out, manifest, verdict, nbytes, accuracy)


def _rewriters(
    program: Program,
    source: Imported,
    options: ExportOptions,
    lowerings: tuple[Lowering, ...],
    said: Callable[[], list[Ids]],
    reporter: Reporter,
) -> dict[str, Rewriter]:
    """By precision: what makes its graphs out of those of fp32."""
    found: dict[str, Rewriter] = {}
    found |= quantizers_of(program, source, options.weight_only, lowerings, said, reporter)
    if "fp16" in options.precisions:
        if not set(Halver.lowerings) & set(lowerings):
            raise UsageError(
                f"fp16 is a precision of {' and '.join(Halver.lowerings)} graphs, which were not "
                "asked for",
                do=f"add --lowering {Halver.lowerings[0]}",
            )
        found["fp16"] = Halver(program)
    return found


def _said(
    program: Program, source: Imported, out: Path, traces: Traces, reporter: Reporter
) -> list[Ids]:
    """What the model says in fp32, by a bundle that is made for this alone."""
    options = ExportOptions(lowerings=("ort",))
    with workshop(out) as work:
        variants = _write_graphs(work, program, options, ("ort",), {}, None, traces, reporter)
        _write_sealed(work, _manifest(work, program, source, options, variants))
        with reporter.stage("asking", "what the model says by itself", ROUNDS) as advance:
            return spoken(work, next(iter(variants)), advance)


def _feasible(
    program: Program, wanted: tuple[Lowering, ...], reporter: Reporter
) -> tuple[Lowering, ...]:
    for lowering in wanted:
        if why := too_old(lowering):
            raise MissingDependency(why, "cpu", why=f"it proves {lowering} graphs")
        if lowering in program.refusals:
            reporter.line("note", f"no {lowering} lowering: {program.refusals[lowering]}")
    feasible = tuple(x for x in LOWERINGS if x in wanted and x not in program.refusals)
    if not feasible:
        raise UnsupportedModel(
            f"no lowering of {', '.join(wanted)} fits this model: "
            + "; ".join(program.refusals[lowering] for lowering in wanted),
            do="export with --lowering portable",
        )
    return feasible


def _write_graphs(
    work: Path,
    program: Program,
    options: ExportOptions,
    lowerings: tuple[Lowering, ...],
    rewriters: Mapping[str, Rewriter],
    kv: Int8KV | None,
    traces: Traces,
    reporter: Reporter,
) -> dict[str, VariantSpec]:
    """Every graph in every lowering, over one weights file for each precision.

    A graph is traced once, and kept in `traces`. A precision that is made by rewriting has
    lowerings of its own, and keys and values in int8 are the `ort` lowering's alone.
    """
    variants: dict[str, VariantSpec] = {}
    forms = {"": program.graphs}
    if options.unrolled and program.unrolled is not None:
        forms["-unrolled"] = (program.unrolled,)
    with contextlib.ExitStack() as stack:
        files: dict[str, WeightsFile] = {}
        for precision in options.precisions:
            folder = work / "variants" / precision
            folder.mkdir(parents=True)
            weights = WeightsFile(folder / "weights.data", dense=precision in options.weight_only)
            files[precision] = stack.enter_context(weights)
        for lowering in lowerings:
            wanted = {
                precision + KVS[kept]: (precision, kept)
                for precision in files
                for kept in options.kvs
                if (precision not in rewriters or lowering in rewriters[precision].lowerings)
                and (kept == "fp32" or lowering == "ort")
            }
            for form, graphs in forms.items():
                specs: dict[str, dict[str, GraphSpec]] = {name: {} for name in wanted}
                opsets: dict[str, dict[str, int]] = {name: {} for name in wanted}
                for graph in graphs if wanted else ():
                    where = f"{graph.name}{form} ({lowering})"
                    if where not in traces:
                        with reporter.stage("tracing", where):
                            traces[where] = trace(program, graph, lowering)
                        check_weights(traces[where], program.weights, where)
                    for name, (precision, kept) in wanted.items():
                        model = traces[where].clone()
                        if precision in rewriters:
                            rewriter = rewriters[precision]
                            with reporter.stage("rounding", f"{where} to {name}"):
                                rewriter.rewrite(model, graph)
                            made = rewriter.tensors()
                            check_weights(model, program.weights, f"{where} {name}", made)
                        if kv is not None and kept == "int8":
                            kv.rewrite(model, graph.inputs)
                        strip(model)
                        weights = files[precision]
                        weights.externalize(model)
                        stem = f"{graph.name}{KVS[kept]}-{lowering}{form}"
                        file = weights.path.parent / f"{stem}.onnx"
                        ir.save(model, file)
                        imported = model.opset_imports.items()
                        opsets[name] |= {domain or "ai.onnx": v for domain, v in imported}
                        specs[name][graph.name] = GraphSpec(
                            file.relative_to(work).as_posix(),
                            (weights.path.relative_to(work).as_posix(),),
                            graph.inputs,
                            graph.outputs,
                        )
                for name, (precision, kept) in wanted.items():
                    dtypes = rewriters[precision].state_dtypes if precision in rewriters else {}
                    if kv is not None and kept == "int8":
                        dtypes = kv.state_dtypes
                    variants[f"{name}-{lowering}{form}"] = VariantSpec(
                        precision,
                        lowering,
                        opsets[name],
                        specs[name],
                        state_dtypes=dict(dtypes),
                    )
        sizes = {precision: weights.nbytes for precision, weights in files.items()}
    for precision, nbytes in sizes.items():
        scheme = rewriters[precision].scheme if precision in rewriters else None
        how = f", {scheme}" if scheme else ""
        reporter.line("weights", f"{precision}{how}, {nbytes / 1e6:.1f} MB, one file")
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
        requires={"onnxruntime": _onnxruntime(options)},
        format_version=_version(program, variants, options),
        task=source.task,
        tables=tables,
        max_drift=options.max_drift,
    )


def _onnxruntime(options: ExportOptions) -> str:
    """The versions that run the variants."""
    plain, int8 = ">=1.23", ">=1.27"
    if "int8" not in options.kvs:
        return plain
    return int8 if options.kvs == ("int8",) else f"{plain}, {int8} for keys and values in int8"


def _version(program: Program, variants: Mapping[str, VariantSpec], options: ExportOptions) -> int:
    """The oldest format that has what the program, its variants and its bounds need."""
    if options.max_drift is not None or any(v.state_dtypes for v in variants.values()):
        return 4
    loop = program.parts.loop
    return 1 if loop is None else 2 if program.states else 3


def _write_sealed(work: Path, manifest: Manifest) -> Manifest:
    manifest = seal(replace(manifest, files=list_files(work)))
    write_manifest(work, manifest)
    return manifest


def _add_reports(work: Path, verdict: Verdict, accuracy: dict[str, Any] | None) -> Manifest:
    """Store what was found: reports, so they change neither identity."""
    bundle = Bundle.open(work, verify=False)
    reports = {"parity.json": verdict.to_json(bundle)}
    if accuracy is not None:
        reports[ACCURACY] = accuracy
    for name, value in reports.items():
        (work / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return _write_sealed(work, replace(bundle.manifest, reports=tuple(reports)))


def weights_id(model: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters: what was trained."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().data)
    return digest.hexdigest()
