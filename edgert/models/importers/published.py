"""HAGI checkpoints as published: a torch.save zip of weights, step, config and optimizer state.

Sources  ShmidtS/HAGI @ 38d26f2, prototype/model (architecture); later commits of the same branch
         @ 286a65d (config fields, optimizer state) and @ b7853c6 (gated grades)
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgert.errors import BadCheckpoint, UnsupportedModel
from edgert.models.decoder import DecoderConfig
from edgert.models.importers.assemble import Names, build, compare_shapes, numbered
from edgert.models.importers.common import (
    EPS,
    INTERLEAVED,
    MAX_CONTEXT,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    THETA,
    Fields,
    Imported,
    Problems,
    Progress,
    choose_context,
    named,
    sha256,
    shown,
)

MAX_ENTRIES = 1 << 17
MAX_PICKLE = 64 << 20
MAX_LOOPS = 1 << 10

_PREFIXES = ("_orig_mod.", "module.")  # torch.compile and data-parallel wrappers
_REDESIGN = re.compile(r"gdr\.grade_(trunk|head)\.|.*_mom_logit$")
_PARTS = {
    "attn_norm": "attn_norm.weight",
    "q": "attn.q_proj.weight",
    "k": "attn.k_proj.weight",
    "v": "attn.v_proj.weight",
    "o": "attn.o_proj.weight",
    "mlp_norm": "mlp_norm.weight",
    "gate": "mlp.gate.weight",
    "up": "mlp.up.weight",
    "down": "mlp.down.weight",
}
_TRAINING_ONLY = {"gradient_checkpointing", "ce_chunk_size"}
_GRADES = {
    "scalar",
    "vector",
    "bivector",
    "trivector",
    "residual",
    "scalar_momentum",
    "vector_momentum",
    "geo_interaction",
    "gated",
}


@dataclass(frozen=True)
class HAGIConfig:
    """The fields of a published config that decide the forward pass."""

    perception: int
    reasoning: int
    expression: int
    iterations: int  # N: runs of the reasoning blocks
    use_gdr: bool
    decoder: DecoderConfig  # one pass: N = 1

    def prefixes(self) -> list[str]:
        """Of the block weights, in the order of one pass."""
        stages = (
            ("perception", self.perception),
            ("reasoning", self.reasoning),
            ("expression", self.expression),
        )
        return [f"{stage}.{i}." for stage, count in stages for i in range(count)]


def load(path: Path, *, context: int | None, progress: Progress | None) -> Imported:
    """Read one checkpoint of the dense variant. Raises BadCheckpoint, UnsupportedModel."""
    _check_zip(path)
    content = _unpickle(path)
    problems = Problems(str(path))
    fields = Fields(content, problems)
    step = fields.integer("step", 0, low=0, high=1 << 62)
    state = _state(content, problems)
    config, unknown = read_config(content.get("config"), problems, context)
    problems.check("not a HAGI checkpoint that can be read")
    _refuse(config, state, str(path))

    names = Names(
        embed="embed.weight",
        final_norm="final_norm.weight",
        head="lm_head.weight",
        blocks=numbered(config.prefixes(), _PARTS),
        bias="iter_embed",
    )
    weights = _State(state)
    compare_shapes(config.decoder, names, weights.shapes(), problems)
    problems.check("the weights do not fit the config")
    _check_bytes(config.decoder, names, weights, path)
    model = build(config.decoder, names, weights, problems, progress)
    problems.check("the weights are unusable")
    notes = []
    if unknown:
        notes.append(f"unknown config fields, ignored: {named(unknown)}")
    return Imported(
        model=model,
        name="hagi-a",
        tokenizer_json=None,
        chat_template=None,
        bos=None,
        eos=(),
        sampling={},
        provenance={
            "source": "hagi checkpoint",
            "file": path.name,
            "sha256": sha256(path),
            "rotary_order": INTERLEAVED,
            "step": step,
        },
        notes=tuple(notes),
    )


def _check_zip(path: Path) -> None:
    """torch.save stores its entries uncompressed: nothing may claim more than the file holds."""
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BadCheckpoint(
            f"a broken zip archive: {error}", where=where, do="download the file again"
        ) from error
    size = path.stat().st_size
    stored = sum(entry.file_size for entry in entries)
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
    if packed or stored > size or len(entries) > MAX_ENTRIES:
        raise BadCheckpoint(
            f"not written by torch.save: {len(entries)} entries of {stored} bytes in a file of "
            f"{size}, {len(packed)} of them compressed",
            where=where,
        )
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
        raise BadCheckpoint(
            f"not written by torch.save: {len(pickles)} entries data.pkl, "
            f"{max((e.file_size for e in pickles), default=0)} bytes (limit {MAX_PICKLE})",
            where=where,
        )


def _unpickle(path: Path) -> Mapping[str, Any]:
    """Tensors and primitives only: torch's restricted unpickler refuses everything else."""
    where = str(path)
    # torch.load goes by this one name and would take the file for something else.
    misnamed = path.name.endswith(".safetensors")
    try:
        with path.open("rb") as file:
            content = torch.load(
                file if misnamed else path,
                map_location="cpu",
                mmap=not misnamed,  # leaves optimizer state on disk
                weights_only=True,
            )
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({culprit[1]})" if culprit else ""
        raise BadCheckpoint(
            f"the checkpoint holds Python objects{what}, not only tensors and plain values",
            where=where,
            do="loading them would run code from the file; save it again with plain values "
            "(very early HAGI files pickle their config as a class: make it a dict)",
        ) from error
    except Exception as error:  # a broken pickle can fail anywhere, with anything
        reason = str(error).splitlines()[0] if str(error) else ""
        raise BadCheckpoint(
            f"torch cannot read the checkpoint: {type(error).__name__} {shown(reason)}",
            where=where,
            do="download the file again",
        ) from error
    if not isinstance(content, dict) or not {"model", "config"} <= set(content):
        found = named(sorted(map(str, content))) if isinstance(content, dict) else shown(content)
        raise BadCheckpoint(
            f"not a HAGI checkpoint: it must hold 'model' and 'config', found {found}",
            where=where,
            do="HAGI checkpoints are the only torch.save files that are read",
        )
    return content


def _state(content: Mapping[str, Any], problems: Problems) -> dict[str, Tensor]:
    """The state dict under its plain names: dense float32 tensors in memory."""
    state: dict[str, Tensor] = {}
    raw = content["model"]
    if not isinstance(raw, Mapping):
        problems.add(f"model is {shown(raw)}, not a state dict")
        return state
    for key, value in raw.items():
        if not isinstance(key, str):
            problems.add(f"model has the key {shown(key)}, not text")
            continue
        name = key
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if not isinstance(value, Tensor):
            problems.add(f"model.{name} is {shown(value)}, not a tensor")
        elif value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            problems.add(f"model.{name} is not a dense tensor with data")
        elif value.dtype != torch.float32:
            problems.add(f"model.{name} is {value.dtype}, not torch.float32")
        elif name in state:
            problems.add(f"model.{name} appears twice, with different prefixes")
        else:
            state[name] = value.detach()
    return state


def read_config(
    raw: Any, problems: Problems, context: int | None = None
) -> tuple[HAGIConfig, list[str]]:
    """A published `config` -> its meaning, and its unknown fields.

    Absent fields have the defaults of the published dataclasses. Raises BadCheckpoint with all
    problems at once.
    """
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        problems.add(f"config is {shown(raw)}, not a dict with text keys")
        problems.check("not a HAGI checkpoint that can be read")
    top = Fields(raw, problems, "config.")
    top.seen |= _TRAINING_ONLY
    inner = top.section("transformer", {})
    grades = top.section("grades", {})
    grades.seen |= _GRADES
    vocab = top.integer("vocab_size", 32000, high=MAX_VOCAB)
    hidden = top.integer("hidden_size", 768, high=MAX_WIDTH)
    perception, reasoning, expression = (
        top.integer(f"{stage}_layers", 4, low=0, high=MAX_LAYERS)
        for stage in ("perception", "reasoning", "expression")
    )
    loops = top.integer("loop_count", 3, high=MAX_LOOPS)
    use_loop, use_gdr = top.flag("use_loop", True), top.flag("use_gdr", True)
    width = inner.integer("hidden_size", 768, high=MAX_WIDTH)
    heads = inner.integer("num_query_heads", 12, high=MAX_HEADS)
    kv_heads = inner.integer("num_kv_heads", 4, high=MAX_HEADS)
    intermediate = inner.integer("intermediate_size", 2048, high=MAX_WIDTH)
    theta = inner.number("rope_theta", 10000.0, **THETA)
    eps = inner.number("norm_eps", 1e-6, **EPS)
    published = inner.integer("max_seq_len", 4096, high=MAX_CONTEXT)
    if hidden != width:
        problems.add(
            f"config.hidden_size {hidden} and config.transformer.hidden_size {width} differ"
        )
    if width % heads or width // heads % 2:
        problems.add(
            f"config.transformer.hidden_size {width} does not divide into "
            f"{heads} heads of an even size"
        )
    if heads % kv_heads:
        problems.add(
            f"config.transformer.num_query_heads {heads} is not divisible by "
            f"num_kv_heads {kv_heads}"
        )
    if not perception + reasoning + expression:
        problems.add("config.perception_layers, reasoning_layers and expression_layers are all 0")
    problems.check("not a HAGI checkpoint that can be read")
    head_size = width // heads
    decoder = DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=perception + reasoning + expression,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        intermediate_size=intermediate,
        rope_theta=theta,
        norm_eps=eps,
        context=choose_context(context, published, head_size, problems.where),
        tied_head=True,
        bias_after=perception + reasoning,
    )
    config = HAGIConfig(
        perception, reasoning, expression, loops if use_loop else 1, use_gdr, decoder
    )
    return config, sorted(top.unknown() + inner.unknown() + grades.unknown())


def _refuse(config: HAGIConfig, state: Mapping[str, Tensor], where: str) -> None:
    foreign = sorted(name for name in state if _REDESIGN.match(name))
    if foreign:
        raise UnsupportedModel(
            f"{named(foreign)}: the GDR layout of a later, unrelated redesign of HAGI",
            where=where,
            do="use a checkpoint of Models A to D",
        )
    if config.use_gdr:
        raise UnsupportedModel(
            "config.use_gdr is true: grade-decomposed recurrence is not implemented",
            where=where,
            do="the dense variant, Model A, is what can be read",
        )
    if config.iterations > 1:
        raise UnsupportedModel(
            f"config.loop_count is {config.iterations} with use_loop: "
            "looped reasoning is not implemented",
            where=where,
            do="the dense variant, Model A, is what can be read",
        )


def _check_bytes(c: DecoderConfig, names: Names, weights: _State, path: Path) -> None:
    """Tensors may overlap in a file (stride 0): the model may still not outgrow it."""
    shapes = weights.shapes()
    wanted = 4 * sum(math.prod(shape) for name, shape in shapes.items() if name != names.head)
    size = path.stat().st_size
    if wanted > size:
        raise BadCheckpoint(
            f"the tensors claim {wanted} bytes in a file of {size}", where=str(path)
        )


class _State:
    """A state dict whose tensors are mapped from the file."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def read(self, name: str) -> Tensor:
        return self.state[name]
