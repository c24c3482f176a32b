"""Checkpoints of `edgert train`: a folder of JSON and safetensors, or a run's newest sound one.

    step-00000300/
      config.json             format, family, published config, tokenizer or task, SHA-256 of every
                              file
      model.safetensors       weights to use, published names, [out, in], float32
      training.safetensors    what only training needs: moments, raw weights if averaged, and the
                              state of a batch that is carried from step to step
      training.json           where training stands: step, random numbers, recipe, versions
      tokenizer.json          of a text model, unless the tokenizer is plain bytes

docs/training.md says what each file holds. `sha256` in config.json is that of the rest of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgert.errors import BadCheckpoint, MissingDependency, NewerFormat
from edgert.models.importers.assets import checked_ids, read_text, read_tokenizer
from edgert.models.importers.common import (
    MAX_CONTEXT,
    Fields,
    Imported,
    Problems,
    Progress,
    sha256,
    shown,
    slug,
)
from edgert.models.trainable import TRAINABLE, Config, Family, Model, rotary_order

FORMAT = "edgert-checkpoint"
VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TENSORS = "training.safetensors"
TRAINING = "training.json"
TOKENIZER = "tokenizer.json"
MAX_JSON = 16 << 20
MAX_TENSORS = 1 << 17

STEP = re.compile(r"step-(\d{8,18})")
_REQUIRED = (WEIGHTS, TENSORS, TRAINING)
_TASK = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Checkpoint:
    """What config.json says, checked; `files` maps names to their SHA-256.

    A text model has `eos` and either `byte_offset` or a tokenizer.json, one that solves has `task`.
    """

    folder: Path
    name: str
    step: int
    family: Family
    config: Config
    byte_offset: int | None
    eos: int | None
    task: str | None
    files: dict[str, str]

    def verify(self, name: str) -> Path:
        """The path of a file whose content has its recorded hash. Raises BadCheckpoint."""
        path = self.folder / name
        if not path.is_file() or path.is_symlink():
            raise BadCheckpoint(f"{name} is missing, or not a regular file", where=str(path))
        try:
            found = sha256(path)
        except OSError as error:
            raise BadCheckpoint(f"{name} cannot be read: {error}", where=str(path)) from error
        if found != self.files[name]:
            raise BadCheckpoint(
                f"{name} is not the file that was written: its SHA-256 is {found[:12]}..., "
                f"{CONFIG} says {self.files[name][:12]}...",
                where=str(path),
                do="use an older checkpoint of the run, or a copy of this one",
            )
        return path

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of a verified safetensors file, float32, possibly mapped from it."""
        path = self.verify(name)
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise MissingDependency("safetensors", "train", why="it reads weights") from error
        problems = Problems(str(path))
        found: dict[str, Tensor] = {}
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                if len(keys) > MAX_TENSORS:
                    raise ValueError(f"{len(keys)} tensors")
                for key in keys:
                    found[key] = file.get_tensor(key)
        except Exception as error:  # the library has one class, its file access several
            raise BadCheckpoint(
                f"{name} is not a sound safetensors file: {shown(str(error))}", where=str(path)
            ) from error
        for key, tensor in found.items():
            if tensor.dtype != torch.float32:
                problems.add(f"{shown(key)} is {tensor.dtype}, not torch.float32")
        problems.check(f"{name} is unusable")
        return found

    def training(self) -> dict[str, Any]:
        """The verified content of training.json."""
        path = self.verify(TRAINING)
        return _json(path)

    def model(self, progress: Progress | None = None) -> Model:
        """The model with the weights to use, in eval mode, without gradients.

        Raises BadCheckpoint naming every tensor that disagrees with the config.
        """
        where = self.folder / WEIGHTS
        state = self.tensors(WEIGHTS)
        size = where.stat().st_size
        return self.family.assemble(self.config, state, Problems(str(where)), size, progress)

    def tokenizer_json(self) -> str | None:
        if TOKENIZER not in self.files:
            return None
        return read_tokenizer(self.verify(TOKENIZER), self.config.vocab_size)


def recognised(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours, or a run that may hold some."""
    path = folder / CONFIG
    if not path.is_file():
        return bool(step_folders(folder))
    try:
        return _json(path).get("format") == FORMAT
    except BadCheckpoint:
        return False


def step_folders(run: Path) -> list[Path]:
    """The step-* folders of a run that have a config.json, newest first."""
    try:
        found = [p for p in run.iterdir() if STEP.fullmatch(p.name) and (p / CONFIG).is_file()]
    except OSError:
        return []
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]), reverse=True)


def digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config.json without its own `sha256`, keys sorted."""
    rest = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_checkpoint(folder: Path, context: int | None = None) -> Checkpoint:
    """Read and check config.json; the other files are verified when they are used.

    Raises BadCheckpoint with everything that is wrong, NewerFormat.
    """
    path = folder / CONFIG
    raw = _json(path)
    problems = Problems(str(path))
    fields = Fields(raw, problems)
    if fields.text("format") != FORMAT:
        raise BadCheckpoint(f"format is {shown(raw.get('format'))}, not {FORMAT}", where=str(path))
    version = fields.integer("format_version", high=1 << 30)
    if version > VERSION:
        raise NewerFormat(
            f"the checkpoint has format {version}, this version reads up to {VERSION}",
            where=str(path),
            do="update edgert",
        )
    try:
        own = digest(raw)
    except RecursionError as error:
        raise BadCheckpoint(f"{CONFIG} is nested too deeply", where=str(path)) from error
    if raw.get("sha256") != own:
        raise BadCheckpoint(
            f"{CONFIG} is not what was written: it does not have its own SHA-256",
            where=str(path),
            do="use an older checkpoint of the run, or a copy of this one",
        )
    name = fields.text("name")
    step = fields.integer("step", low=0, high=1 << 60)
    positions = fields.integer("context", high=MAX_CONTEXT)
    family = TRAINABLE.get(fields.text("family") or "")
    if family is None:
        problems.add(f"family is {shown(raw.get('family'))}, known are: {', '.join(TRAINABLE)}")
    offset = eos = task = None
    reads = family is None or family.kind == "text"
    if reads:
        eos = fields.integer("eos", low=0, high=1 << 32)
        offset = _tokenizer(fields.section("tokenizer"), problems)
    else:
        task = _task(fields, problems)
    files = _files(fields.section("files").data, reads and offset is None, problems)
    problems.check("the checkpoint is wrong")
    assert family is not None
    config, unknown = family.read_config(
        raw.get("config"), problems, context or positions, wrong="the checkpoint is wrong"
    )
    for key in unknown:
        problems.add(f"{key} is not known")
    if offset is not None and offset + 256 > config.vocab_size:
        problems.add(f"bytes from id {offset} on do not fit {config.vocab_size} entries")
    problems.check("the checkpoint is wrong")
    if eos is not None:
        checked_ids([eos], config.vocab_size, "eos", str(path))
    return Checkpoint(folder, name or "model", step, family, config, offset, eos, task, files)


def newest(folder: Path, context: int | None = None) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint of a run all of whose files are what was written, or the folder's own.

    Also says which newer ones are damaged, and how. Raises BadCheckpoint if none is sound.
    """
    if (folder / CONFIG).is_file():
        return read_checkpoint(folder, context), []
    damaged: list[str] = []
    first: BadCheckpoint | None = None
    for candidate in step_folders(folder):
        try:
            found = read_checkpoint(candidate, context)
            for name in found.files:
                found.verify(name)
            return found, damaged
        except BadCheckpoint as error:
            first = first or error
            damaged.append(f"{candidate.name} is passed over: {error.what.splitlines()[0]}")
    if first is not None:
        raise first
    raise BadCheckpoint(
        "there is no checkpoint in this folder", where=str(folder), do="train it first"
    )


def load(path: Path, *, context: int | None, progress: Progress | None) -> Imported:
    """Read a checkpoint, or the newest sound one of a run. Raises BadCheckpoint, NewerFormat."""
    found, notes = newest(path, context)
    order = rotary_order(found.config)
    return Imported(
        model=found.model(progress),
        name=slug(found.name, "model"),
        tokenizer_json=found.tokenizer_json(),
        chat_template=None,
        bos=None,
        eos=() if found.eos is None else (found.eos,),
        sampling={},
        provenance={
            "source": FORMAT,
            "name": found.name,
            "file": f"{found.folder.resolve().name}/{WEIGHTS}",
            "sha256": found.files[WEIGHTS],
            "step": found.step,
        }
        | ({} if order is None else {"rotary_order": order}),
        notes=tuple(notes),
        byte_offset=found.byte_offset,
        task=found.task,
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises BadCheckpoint."""
    if not path.is_file():  # a pipe would keep us waiting
        raise BadCheckpoint(f"{path.name} is missing, or not a regular file", where=str(path))
    try:
        value = json.loads(read_text(path, MAX_JSON, BadCheckpoint))
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path.name} is not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path.name} is {shown(value)}, not an object", where=str(path))
    return value


def _tokenizer(fields: Fields, problems: Problems) -> int | None:
    """The offset of a byte tokenizer, or None for a file."""
    kind = fields.text("kind")
    if kind == "bytes":
        return fields.integer("offset", low=0, high=1 << 16)
    if kind != "file" or fields.text("file") != TOKENIZER:
        problems.add(f"tokenizer is {shown(dict(fields.data))}: neither bytes nor {TOKENIZER}")
    return None


def _task(fields: Fields, problems: Problems) -> str | None:
    """The name of what the puzzles are; whoever solves them knows which there are."""
    task = fields.text("task")
    if task is None or not _TASK.fullmatch(task):
        problems.add(f"task is {shown(task)}, not the name of one")
    return task


def _files(given: Mapping[str, Any], tokenizer: bool, problems: Problems) -> dict[str, str]:
    wanted = {*_REQUIRED, TOKENIZER} if tokenizer else set(_REQUIRED)
    files: dict[str, str] = {}
    for name, value in given.items():
        if name not in wanted:
            problems.add(f"files.{shown(name)} does not belong to a checkpoint")
        elif not isinstance(value, str) or not _SHA256.fullmatch(value):
            problems.add(f"files.{name} is {shown(value)}, not a SHA-256")
        else:
            files[name] = value
    for name in sorted(wanted - set(given)):
        problems.add(f"files.{name} is missing")
    return files
