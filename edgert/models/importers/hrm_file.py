"""HRM files on disk: told apart without unpickling, then read as tensors and plain values.

The trainer of B2 writes its metrics as NumPy scalars, which torch refuses by default. They are let
through by an allow-list of three names, each of which stands for something of ours that can only
make a Python float: NumPy itself is never called with what a file says.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from edgert.errors import BadCheckpoint
from edgert.models.importers.common import Problems, shown
from edgert.models.importers.torch_file import MAX_PICKLE, plain_state, read_torch

STEP = re.compile(r"step_(\d{1,18})")
"""A checkpoint of the original trainer. Its dumps of predictions have longer names."""

CONFIG = "all_config.yaml"
WEIGHTS = "model_state_dict"  # what the bidirectional trainers put their weights under

_MARKS = (b"H_level.layers.", b"L_level.layers.", b"h_to_l.", b"l_to_h.", b"halt_predictor.")
_PREFIXES = ("_orig_mod.", "module.", "model.", "inner.")


def is_hrm(path: Path) -> bool:
    """Whether a file has weights of HRM in it, or a folder its config and checkpoints.

    Reads the names in a torch.save file, a few KB, and no tensor. False for what is unreadable.
    """
    try:
        if path.is_dir():
            return (path / CONFIG).is_file() and newest_step(path) is not None
        with zipfile.ZipFile(path) as archive:
            pickles = [e for e in archive.infolist() if e.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
                return False
            if pickles[0].compress_type != zipfile.ZIP_STORED:  # torch.save packs nothing
                return False
            content = archive.read(pickles[0])
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile):
        return False
    return any(mark in content for mark in _MARKS)


def newest_step(folder: Path) -> Path | None:
    """The step_<n> of a folder with the highest n."""
    found = [p for p in folder.iterdir() if STEP.fullmatch(p.name) and p.is_file()]
    return max(found, key=lambda p: int(p.name.partition("_")[2]), default=None)


class _Float64:
    """Stands for NumPy's float64 dtype; it knows nothing else."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or state[1:2] != ("<",):
            raise pickle.UnpicklingError("a NumPy dtype that is not a little-endian float64")


def _dtype(*args: Any) -> _Float64:
    """Stands for numpy.dtype."""
    if args[:1] != ("f8",):
        raise pickle.UnpicklingError(f"a NumPy dtype {shown(args[:1])} that is not float64")
    return _Float64()


def _scalar(*args: Any) -> float:
    """Stands for NumPy's reconstruction of a scalar: dtype and eight bytes -> a Python float."""
    kind, data = args if len(args) == 2 else (None, None)
    if type(kind) is not _Float64 or not isinstance(data, bytes) or len(data) != 8:
        raise pickle.UnpicklingError("a NumPy scalar that is not a float64")
    return float(struct.unpack("<d", data)[0])


_ALLOWED: list[Any] = [
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 calls it
    (_dtype, "numpy.dtype"),
    (_Float64, "numpy.dtypes.Float64DType"),
]


def unpickle(path: Path) -> Mapping[Any, Any]:
    """The dict in a torch.save file: tensors, plain values and float64 scalars, nothing else.

    Raises BadCheckpoint.
    """
    content = read_torch(
        path,
        holds="tensors, plain values and NumPy's float64 scalars",
        do="loading them would run code from the file; save it again without them",
        allowed=_ALLOWED,
    )
    if not isinstance(content, dict):
        raise BadCheckpoint(f"not an HRM checkpoint: it holds {shown(content)}", where=str(path))
    return content


def state_dict(content: Mapping[Any, Any], problems: Problems) -> dict[str, Tensor]:
    """The weights under their plain names: dense float32 tensors.

    The initial states are converted to float32 from what the trainer computed in.
    """
    raw = content.get(WEIGHTS, content)
    return plain_state(raw, problems, "the state dict", _plain, widened=("H_init", "L_init"))


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
