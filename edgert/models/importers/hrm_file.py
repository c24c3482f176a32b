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

import torch
from torch import Tensor

from edgert.errors import BadCheckpoint
from edgert.models.importers.common import Problems, named, shown
from edgert.models.importers.published import MAX_PICKLE, _check_zip

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
            content = archive.read(pickles[0])
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
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
    _check_zip(path)
    where = str(path)
    # torch.load goes by this one name and would take the file for something else.
    misnamed = path.name.endswith(".safetensors")
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(
                file if misnamed else path,
                map_location="cpu",
                mmap=not misnamed,  # leaves optimizer state and a large puzzle table on disk
                weights_only=True,
            )
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)|a NumPy [^\n.]*", str(error))
        what = f" ({culprit[1] or culprit[0]})" if culprit else ""
        raise BadCheckpoint(
            f"the checkpoint holds Python objects{what}, not only tensors, plain values and "
            "NumPy's float64 scalars",
            where=where,
            do="loading them would run code from the file; save it again without them",
        ) from error
    except Exception as error:  # a broken pickle can fail anywhere, with anything
        reason = str(error).splitlines()[0] if str(error) else ""
        raise BadCheckpoint(
            f"torch cannot read the checkpoint: {type(error).__name__} {shown(reason)}",
            where=where,
            do="download the file again",
        ) from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"not an HRM checkpoint: it holds {shown(content)}", where=where)
    return content


def state_dict(content: Mapping[Any, Any], problems: Problems) -> dict[str, Tensor]:
    """The weights under their plain names: dense float32 tensors.

    The initial states are converted to float32 from what the trainer computed in.
    """
    state: dict[str, Tensor] = {}
    raw = content.get(WEIGHTS, content)
    if not isinstance(raw, Mapping):
        problems.add(f"{WEIGHTS} is {shown(raw)}, not a state dict")
        return state
    for key, value in raw.items():
        if not isinstance(key, str):
            problems.add(f"the state dict has the key {shown(key)}, not text")
            continue
        name = key
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if not isinstance(value, Tensor):
            problems.add(f"{named([name])} is {shown(value)}, not a tensor")
        elif value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            problems.add(f"{named([name])} is not a dense tensor with data")
        elif name in ("H_init", "L_init") and value.dtype in (torch.bfloat16, torch.float16):
            state[name] = value.detach().float()
        elif value.dtype != torch.float32:
            problems.add(f"{named([name])} is {value.dtype}, not torch.float32")
        elif name in state:
            problems.add(f"{named([name])} appears twice, with different prefixes")
        else:
            state[name] = value.detach()
    return state
