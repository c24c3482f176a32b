"""Writes checkpoints: a folder `step-<next step>` that is there whole, or not at all.

The format is described where it is read: edgert/models/importers/trained.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from edgert.errors import EdgertError
from edgert.files import fsync_path
from edgert.models.importers import trained
from edgert.models.trainable import Config, Family, positions

_UNFINISHED = ".step-*.tmp"


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds. Tensors may be views of what training goes on with.

    weights   published name -> weight to use: the average if there is one
    tensors   what else training needs, by '<kind>.<name>'
    training  JSON
    eos       of a text model, with either byte_offset or tokenizer_json
    task      of a model that solves: what its puzzles are
    """

    name: str
    step: int
    family: Family
    config: Config
    weights: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    training: Mapping[str, Any]
    byte_offset: int | None = None
    tokenizer_json: str | None = None
    eos: int | None = None
    task: str | None = None


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def write_checkpoint(run: Path, snapshot: Snapshot) -> Path:
    """Write one checkpoint below `run` and return its folder, which is on disk for good.

    A folder of the same step is replaced. Raises EdgertError if the system refuses; older
    checkpoints are untouched then, and nothing of the new one is left.
    """
    final = run / folder_name(snapshot.step)
    temp = run / f".{final.name}.{os.urandom(6).hex()}.tmp"
    try:
        temp.mkdir()
        try:
            _fill(temp, snapshot)
            fsync_path(temp)
            _place(temp, final)
            fsync_path(run)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
    except OSError as error:
        kept = trained.step_folders(run)
        raise EdgertError(
            f"the checkpoint of step {snapshot.step} cannot be written: {error.strerror or error}",
            where=str(final),
            do="free some space, then train on with --resume; "
            + (f"{kept[0].name} is kept" if kept else "no checkpoint has been written before"),
        ) from error
    return final


def sweep(run: Path) -> None:
    """Remove what a killed process has left half written. The caller holds the run's lock."""
    for temp in run.glob(_UNFINISHED):
        shutil.rmtree(temp, ignore_errors=True)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, of each format; 0 keeps all."""
    for old in trained.step_folders(run)[keep:] if keep else ():
        condemned = old.with_name(f".{old.name}.old.tmp")
        try:
            os.rename(old, condemned)  # half a checkpoint must not look like one
        except OSError:
            continue
        shutil.rmtree(condemned, ignore_errors=True)
    for old in sorted(run.glob("step-*.pt"), reverse=True)[keep:] if keep else ():
        if trained.STEP.fullmatch(old.stem):
            old.unlink(missing_ok=True)


def _place(temp: Path, final: Path) -> None:
    old = None
    if os.path.lexists(final):
        old = final.with_name(f".{final.name}.{os.urandom(6).hex()}.old.tmp")
        os.rename(final, old)
    os.rename(temp, final)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _fill(folder: Path, snapshot: Snapshot) -> None:
    files = {
        trained.WEIGHTS: write_tensors(folder / trained.WEIGHTS, snapshot.weights),
        trained.TENSORS: write_tensors(folder / trained.TENSORS, snapshot.tensors),
        trained.TRAINING: _write_json(folder / trained.TRAINING, snapshot.training),
    }
    if snapshot.tokenizer_json is not None:
        data = snapshot.tokenizer_json.encode()
        files[trained.TOKENIZER] = _write(folder / trained.TOKENIZER, data)
    tokenizer = (
        {"kind": "file", "file": trained.TOKENIZER}
        if snapshot.byte_offset is None
        else {"kind": "bytes", "offset": snapshot.byte_offset}
    )
    reads = {"tokenizer": tokenizer, "eos": snapshot.eos}
    config: dict[str, Any] = {
        "format": trained.FORMAT,
        "format_version": trained.VERSION,
        "name": snapshot.name,
        "step": snapshot.step,
        "family": snapshot.family.name,
        "context": positions(snapshot.config),
        **(reads if snapshot.task is None else {"task": snapshot.task}),
        "config": snapshot.config.published(),
        "files": files,
    }
    _write_json(folder / trained.CONFIG, config | {"sha256": trained.digest(config)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file of float32 tensors, one after the other; its SHA-256.

    Streams: holds one contiguous tensor at a time. Source: huggingface/safetensors, README
    "Format". Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def put(file: BinaryIO, data: bytes | memoryview) -> None:
        digest.update(data)
        file.write(data)

    with path.open("xb") as file:
        put(file, len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            put(file, flat.astype("<f4", copy=False).reshape(-1).view("u1").data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> str:
    return _write(path, (json.dumps(value, indent=1) + "\n").encode())


def _write(path: Path, data: bytes) -> str:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()
