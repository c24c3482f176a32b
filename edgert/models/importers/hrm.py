"""HRM checkpoints as published: the original trainer's state dicts, the bidirectional one's dicts.

    step_<n> + all_config.yaml    A1, A2: names and shapes of the original network
    *.pt                          B1, B2: a training dict, or a bare state dict

Which of them a file holds is told by the names of its tensors. All weights are read strictly.

Sources  sapientinc/HRM @ 42410da, pretrain.py; dp-web4/HRM @ 2e7d64f, training/
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

from edgert.errors import BadCheckpoint, UnsupportedModel, UsageError
from edgert.models.hrm.bidir import Bidir
from edgert.models.hrm.config import BidirConfig, HRMConfig
from edgert.models.hrm.model import HRM
from edgert.models.importers.assemble import compare_shapes
from edgert.models.importers.common import (
    Imported,
    Problems,
    Progress,
    named,
    sha256,
    shown,
)
from edgert.models.importers.hrm_config import (
    WRONG,
    from_shapes,
    layers,
    read_all_config,
    read_bidir_config,
    read_config,
    read_dataset,
)
from edgert.models.importers.hrm_file import (
    CONFIG,
    STEP,
    WEIGHTS,
    is_hrm,
    newest_step,
    state_dict,
    unpickle,
)

__all__ = ["ImportedHRM", "assemble", "is_hrm", "load", "read_hrm"]

VARIANTS = ("A1", "A2", "B1", "B2")
TABLE = "puzzle_emb.weights"
CYCLES = "cycle_embedding.weight"
DATASET = "dataset.json"
ROTARY = "half-split"
PUBLISHED_CYCLES = 8  # of B1, whose weights do not tell

_ORIGINAL = ("H_level.", "L_level.", "H_init", "L_init", "embed_tokens.")
_BIDIRECTIONAL = ("h_layers.", "l_layers.", "h_to_l.", "l_to_h.", "token_embedding.")
_SEQUENTIAL = re.compile(r"halt_predictor\.\d")
_SETTINGS = {*HRMConfig(1, 1, 1, 1, 1, 1, 1, 1, 1, "rope", 1).published()} - {"loss"} | {
    field.name for field in dataclasses.fields(BidirConfig)
}


@dataclass(frozen=True)
class ImportedHRM:
    """A network read from somebody else's file, and what that file says.

    model       in eval mode, float32, without gradients; a puzzle table stays in the file
    name        a short slug, fit for a folder name
    provenance  JSON-serialisable, file names without folders
    notes       what the user should know but need not act upon
    """

    model: HRM | Bidir
    name: str
    provenance: dict[str, Any]
    notes: tuple[str, ...]


def load(
    path: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    dataset: Path | None = None,
    progress: Progress | None = None,
) -> Imported:
    """`read_hrm`, as all importers give what they read."""
    found = read_hrm(path, settings=settings, dataset=dataset, progress=progress)
    return Imported(
        model=found.model,
        name=found.name,
        tokenizer_json=None,
        chat_template=None,
        bos=None,
        eos=(),
        sampling={},
        provenance=found.provenance,
        notes=found.notes,
    )


def read_hrm(
    path: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    dataset: Path | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
) -> ImportedHRM:
    """Read one checkpoint, or the newest step_<n> of a folder.

    settings  config fields by published name that the files lack, or that replace theirs
    dataset   a dataset.json, or a dataset's folder; otherwise the one beside the checkpoint
    variant   A1, A2, B1 or B2: what the file must hold

    Raises BadCheckpoint naming everything that is wrong, UnsupportedModel for networks that give
    another meaning to the same names, UsageError, MissingDependency.
    """
    settings = dict(settings or {})
    if unknown := sorted(set(settings) - _SETTINGS):
        raise UsageError(
            f"unknown settings: {named(unknown)}", do=f"known are: {', '.join(sorted(_SETTINGS))}"
        )
    if variant is not None and variant not in VARIANTS:
        raise UsageError(f"variant {shown(variant)} is not one of {', '.join(VARIANTS)}")
    if path.is_dir():
        newest = newest_step(path)
        if newest is None:
            raise BadCheckpoint("no file step_<n> in this folder", where=str(path))
        path = newest
    if not path.is_file():
        raise UsageError(f"there is no file {path}", do="give an HRM checkpoint")
    content = unpickle(path)
    problems = Problems(str(path))
    state = state_dict(content, problems)
    _refuse_others(state, str(path))
    problems.check(WRONG)
    config: HRMConfig | BidirConfig
    if any(name.startswith(_ORIGINAL) for name in state):
        config, notes = _original(path, state, settings, dataset)
    elif any(name.startswith(_BIDIRECTIONAL) for name in state):
        config, notes = _bidirectional(path, content, state, settings, variant == "B2")
    else:
        raise BadCheckpoint(
            f"not an HRM checkpoint: it has none of its tensors, but {named(sorted(state))}",
            where=str(path),
        )
    if variant is not None and config.letter != variant:
        raise BadCheckpoint(f"the file holds {config.letter}, not {variant}", where=str(path))
    model = assemble(config, state, problems, path.stat().st_size, progress)
    return ImportedHRM(
        model=model,
        name=f"hrm-{config.letter.lower()}",
        provenance={
            "source": "hrm checkpoint",
            "variant": config.letter,
            "file": path.name,
            "sha256": sha256(path),
            "step": _step(path, content),
        }
        | ({"rotary_order": ROTARY} if _rotates(config) else {}),
        notes=tuple(notes),
    )


def assemble(
    config: HRMConfig | BidirConfig,
    state: Mapping[str, Tensor],
    problems: Problems,
    limit: int,
    progress: Progress | None = None,
) -> HRM | Bidir:
    """The model with these weights, in eval mode, without gradients.

    limit  bytes that the file has: tensors may overlap in it (stride 0), and the model may still
           not outgrow it
    Raises BadCheckpoint naming every tensor that is missing, unexpected, of another shape, or not
    finite, before or after memory is allocated for the model.
    """
    with torch.device("meta"):
        empty = HRM(config) if isinstance(config, HRMConfig) else Bidir(config)
        wanted = {k: tuple(v.shape) for k, v in (empty.published() | empty.fixed()).items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    embed = next(iter(wanted))
    compare_shapes(wanted, found, embed, embed, problems)
    problems.check("the weights do not fit the config")
    claimed = 4 * sum(math.prod(shape) for shape in wanted.values())
    if claimed > limit:
        raise BadCheckpoint(
            f"the tensors claim {claimed} bytes in a file of {limit}", where=problems.where
        )
    model = HRM(config, state.get(TABLE)) if isinstance(config, HRMConfig) else Bidir(config)
    model.eval().requires_grad_(False)
    views = model.published() | model.fixed()
    for done, (name, view) in enumerate(views.items()):
        # Without a second tensor of its size, as isfinite would make.
        if not torch.isfinite(torch.stack(torch.aminmax(state[name]))).all():
            problems.add(f"{name} holds NaN or infinite values")
        if name != TABLE:
            view.copy_(state[name])
        if progress is not None:
            progress(done + 1, len(views))
    problems.check("the weights are unusable")
    return model


def _original(
    path: Path, state: Mapping[str, Tensor], settings: dict[str, Any], dataset: Path | None
) -> tuple[HRMConfig, list[str]]:
    """The config of A1 or A2: what is given, else dataset.json, all_config.yaml, shapes."""
    notes: list[str] = []
    beside = path.parent / CONFIG
    arch: dict[str, Any] = {}
    strange: list[str] = []
    if beside.is_file():
        arch, strange = read_all_config(beside)
    if dataset is not None and dataset.is_dir():
        folders = [dataset, dataset / "train", dataset / "test"]
        dataset = next((f / DATASET for f in folders if (f / DATASET).is_file()), dataset / DATASET)
    if dataset is None and (path.parent / DATASET).is_file():
        dataset = path.parent / DATASET
    stated = arch | (read_dataset(dataset) if dataset is not None else {}) | settings
    shapes = from_shapes(state)
    needed = (
        f"{CONFIG} belongs beside the checkpoint, and seq_len is in its dataset's {DATASET}: give "
        "that (--dataset FILE), or the missing fields themselves (--setting seq_len=N)"
    )
    config, unknown = read_config(shapes | stated, Problems(str(path)), needed=needed)
    guessed = sorted(set(shapes) - set(stated))
    if guessed:
        notes.append(f"taken from the shapes of the weights: {', '.join(guessed)}")
    if config.forward_dtype != "float32":
        notes.append(f"the published network computes in {config.forward_dtype}, this in float32")
    if unknown or strange:
        notes.append(f"unknown config fields, ignored: {named(unknown + strange)}")
    return config, notes


def _bidirectional(
    path: Path,
    content: Mapping[Any, Any],
    state: Mapping[str, Tensor],
    settings: dict[str, Any],
    with_cycles: bool,
) -> tuple[BidirConfig, list[str]]:
    """The config of B1 or B2: what is given, else the file's, else shapes.

    with_cycles  B2 is wanted, whatever the weights say
    """
    problems = Problems(str(path))
    notes: list[str] = []
    raw = content.get("config", {}) if WEIGHTS in content else {}
    if not isinstance(raw, dict):
        problems.add(f"config is {shown(raw)}, not a dict with text keys")
        problems.check(WRONG)
    shapes = _bidir_shapes(state)
    if with_cycles or "run_id" in content:  # what only the trainer of B2 writes
        shapes["cycle_embedding"] = True
    stated = raw | settings
    config, unknown = read_bidir_config(
        shapes | stated,
        problems,
        needed="a bare state dict does not tell num_heads: give it (--setting num_heads=N)",
    )
    if config.cycle_embedding and CYCLES not in state:
        raise BadCheckpoint(
            f"weights of B1: they have no {CYCLES}, and B2 with a random one is another network",
            where=str(path),
            do="read it as B1, or use a checkpoint of B2",
        )
    if not config.cycle_embedding and "max_cycles" not in stated:
        notes.append(f"max_cycles is not in the file: {config.max_cycles}, as published")
    if "seq_len" not in stated:
        notes.append(f"seq_len is not in the file: {config.seq_len}, as published")
    if unknown:
        notes.append(f"unknown config fields, ignored: {named(unknown)}")
    return config, notes


def _bidir_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config fields that the weights tell: all but the heads, and S."""
    shapes = {name: tuple(t.shape) for name, t in state.items() if t.ndim == 2}
    vocab, hidden = shapes.get("token_embedding.weight", (1, 1))
    positions, _ = shapes.get("pos_encoding.pe", (5000, 0))
    cycles, _ = shapes.get(CYCLES, (PUBLISHED_CYCLES, 0))
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_h_layers": layers(state, "h_layers."),
        "num_l_layers": layers(state, "l_layers."),
        "max_cycles": cycles,
        "positions": positions,
        "seq_len": min(BidirConfig.seq_len, positions),
        "cycle_embedding": CYCLES in state,
    }


def _refuse_others(state: Mapping[str, Tensor], where: str) -> None:
    """Raise UnsupportedModel for halting heads that give another meaning to the same network."""
    sequential = sorted(name for name in state if _SEQUENTIAL.match(name))
    head, width = state.get("halt_predictor.weight"), state.get("h_to_l.weight")
    if "halt_gate" in state:
        what = "halt_gate: the halting logit is scaled, and grows with the cycle"
    elif sequential:
        what = f"{named(sequential)}: a halting head of several layers"
    elif (
        head is not None
        and width is not None
        and head.ndim == width.ndim == 2
        and head.shape[1] == 2 * width.shape[0] + 1
    ):
        what = f"halt_predictor.weight {list(head.shape)}: a halting head that reads the cycle"
    else:
        return
    raise UnsupportedModel(
        f"{what}, as a fine-tuning experiment has it",
        where=where,
        do="use a checkpoint of B1 or B2 as trained; its halting head is one linear map",
    )


def _step(path: Path, content: Mapping[Any, Any]) -> int:
    """Updates made: in the name of the original's files, in the others' dicts; 0 if untold."""
    found = STEP.fullmatch(path.name)
    step = int(found[1]) if found else content.get("global_step", 0)
    return step if type(step) is int and step >= 0 else 0


def _rotates(config: HRMConfig | BidirConfig) -> bool:
    return isinstance(config, HRMConfig) and config.pos_encodings == "rope"
