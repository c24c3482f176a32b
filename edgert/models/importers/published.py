"""HAGI checkpoints as published: a torch.save zip of weights, step, config and optimizer state.

Sources  ShmidtS/HAGI @ 38d26f2, prototype/model (architecture); later commits of the same branch
         @ 286a65d (config fields, optimizer state) and @ b7853c6 (gated grades)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgert.errors import BadCheckpoint, UnsupportedModel
from edgert.models.clifford import BLADES
from edgert.models.hagi.config import Grades, HAGIConfig
from edgert.models.hagi.model import HAGI
from edgert.models.importers.assemble import compare_shapes
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
from edgert.models.importers.torch_file import plain_state, read_torch

MAX_LOOPS = 1 << 10

_PREFIXES = ("_orig_mod.", "module.")  # torch.compile and data-parallel wrappers
_REDESIGN = re.compile(r"gdr\.grade_(trunk|head)\.|.*_mom_logit$")
HEAD = "lm_head.weight"
"""A second name for the tied embedding; it may be absent."""


@dataclass(frozen=True)
class Published:
    """One file as it is. `state` maps plain names to float32 tensors; `optimizer` is unchecked."""

    config: HAGIConfig
    unknown: list[str]
    state: dict[str, Tensor]
    step: int
    optimizer: Any


def read(path: Path, context: int | None = None) -> Published:
    """Read one checkpoint without making a model. Raises BadCheckpoint, UnsupportedModel."""
    content = _unpickle(path)
    problems = Problems(str(path))
    fields = Fields(content, problems)
    step = fields.integer("step", 0, low=0, high=1 << 62)
    state = plain_state(content["model"], problems, "model", _plain, at="model.")
    config, unknown = read_config(content.get("config"), problems, context)
    problems.check("not a HAGI checkpoint that can be read")
    _refuse_redesign(state, str(path))
    return Published(config, unknown, state, step, content.get("optimizer"))


def load(path: Path, *, context: int | None, progress: Progress | None) -> Imported:
    """Read one checkpoint. Raises BadCheckpoint, UnsupportedModel."""
    found = read(path, context)
    problems = Problems(str(path))
    model = assemble(found.config, found.state, problems, path.stat().st_size, progress)
    notes = []
    if found.unknown:
        notes.append(f"unknown config fields, ignored: {named(found.unknown)}")
    return Imported(
        model=model,
        name=f"hagi-{found.config.letter.lower()}",
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
            "step": found.step,
        },
        notes=tuple(notes),
    )


def assemble(
    config: HAGIConfig,
    state: Mapping[str, Tensor],
    problems: Problems,
    limit: int,
    progress: Progress | None = None,
) -> HAGI:
    """The model with these weights, in eval mode, without gradients.

    limit  bytes that the file has: tensors may overlap in it (stride 0), and the model may still
           not outgrow it
    Raises BadCheckpoint naming every tensor that is missing, unexpected, of another shape, or not
    finite, before or after memory is allocated for the model.
    """
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in HAGI(_small_tables(config)).published().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    compare_shapes(wanted, found, "embed.weight", HEAD, problems)
    problems.check("the weights do not fit the config")
    claimed = 4 * sum(math.prod(shape) for shape in wanted.values())
    if claimed > limit:
        raise BadCheckpoint(
            f"the tensors claim {claimed} bytes in a file of {limit}", where=problems.where
        )
    model = HAGI(config).eval().requires_grad_(False)
    views = model.published()
    for done, (name, view) in enumerate(views.items()):
        if not torch.isfinite(state[name]).all():
            problems.add(f"{name} holds NaN or infinite values")
        view.copy_(state[name])
        if progress is not None:
            progress(done + 1, len(views))
    if HEAD in state and not torch.equal(state[HEAD], model.embed):
        problems.add(f"tied head: {HEAD} differs from embed.weight")
    problems.check("the weights are unusable")
    return model


def _small_tables(config: HAGIConfig) -> HAGIConfig:
    return dataclasses.replace(config, context=1)


def _unpickle(path: Path) -> Mapping[str, Any]:
    """Tensors and plain values, with what a checkpoint must have."""
    content = read_torch(
        path,
        holds="tensors and plain values",
        do="loading them would run code from the file; save it again with plain values "
        "(very early HAGI files pickle their config as a class: make it a dict)",
    )
    if not isinstance(content, dict) or not {"model", "config"} <= set(content):
        found = named(sorted(map(str, content))) if isinstance(content, dict) else shown(content)
        raise BadCheckpoint(
            f"not a HAGI checkpoint: it must hold 'model' and 'config', found {found}",
            where=str(path),
            do="HAGI checkpoints are the only torch.save files that are read",
        )
    return content


def _plain(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def read_config(
    raw: Any,
    problems: Problems,
    context: int | None = None,
    *,
    name: str = "config",
    wrong: str = "not a HAGI checkpoint that can be read",
) -> tuple[HAGIConfig, list[str]]:
    """A published `config` -> its meaning, and its unknown fields.

    name   what messages call the config
    wrong  the first line of the error
    Absent fields have the defaults of the published dataclasses. Raises the error of `problems`
    with all of them at once.
    """
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        problems.add(f"{name} is {shown(raw)}, not a dict with text keys")
        problems.check(wrong)
    top = Fields(raw, problems, f"{name}.")
    inner = top.section("transformer", {})
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
    published = inner.integer("max_seq_len", 4096, high=MAX_CONTEXT)
    grades = top.section("grades", {})
    split = _grades(grades)
    if hidden != width:
        problems.add(
            f"{name}.hidden_size {hidden} and {name}.transformer.hidden_size {width} differ"
        )
    if width % heads or width // heads % 2:
        problems.add(
            f"{name}.transformer.hidden_size {width} does not divide into "
            f"{heads} heads of an even size"
        )
    if heads % kv_heads:
        problems.add(
            f"{name}.transformer.num_query_heads {heads} is not divisible by "
            f"num_kv_heads {kv_heads}"
        )
    if not perception + reasoning + expression:
        problems.add(f"{name}.perception_layers, reasoning_layers and expression_layers are all 0")
    if use_gdr and split.read + split.residual != hidden:
        problems.add(
            f"{name}.grades sum to {split.read + split.residual}, {name}.hidden_size is {hidden}"
        )
    if use_gdr and split.vector % BLADES:
        problems.add(f"{name}.grades.vector {split.vector} is not a multiple of {BLADES}")
    config = HAGIConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_query_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=inner.integer("intermediate_size", 2048, high=MAX_WIDTH),
        perception_layers=perception,
        reasoning_layers=reasoning,
        expression_layers=expression,
        loop_count=loops,
        use_loop=use_loop,
        use_gdr=use_gdr,
        rope_theta=inner.number("rope_theta", 10000.0, **THETA),
        norm_eps=inner.number("norm_eps", 1e-6, **EPS),
        max_seq_len=published,
        gradient_checkpointing=top.flag("gradient_checkpointing", False),
        ce_chunk_size=top.integer("ce_chunk_size", 0, low=0, high=1 << 30),
        grades=split,
    )
    problems.check(wrong)
    if perception + expression + config.iterations * reasoning > MAX_LAYERS:
        problems.add(f"{name}.loop_count {loops} makes {config.slots} attentions of the blocks")
        problems.check(wrong)
    context = choose_context(context, published, config.heads.size, problems.where)
    unknown = sorted(top.unknown() + inner.unknown() + grades.unknown())
    return dataclasses.replace(config, context=context), unknown


def _grades(fields: Fields) -> Grades:
    standard = Grades()

    def channels(name: str, low: int) -> int:
        return fields.integer(name, getattr(standard, name), low=low, high=MAX_WIDTH)

    def momentum(name: str) -> float:
        return fields.number(name, getattr(standard, name), low=-1e3, high=1e3)

    return Grades(
        scalar=channels("scalar", 1),
        vector=channels("vector", 1),
        bivector=channels("bivector", 1),
        trivector=channels("trivector", 1),
        residual=channels("residual", 0),
        scalar_momentum=momentum("scalar_momentum"),
        vector_momentum=momentum("vector_momentum"),
        geo_interaction=fields.flag("geo_interaction", standard.geo_interaction),
        gated=fields.flag("gated", standard.gated),
    )


def _refuse_redesign(state: Mapping[str, Tensor], where: str) -> None:
    foreign = sorted(name for name in state if _REDESIGN.match(name))
    if foreign:
        raise UnsupportedModel(
            f"{named(foreign)}: the GDR layout of a later, unrelated redesign of HAGI",
            where=where,
            do="use a checkpoint of Models A to D",
        )
