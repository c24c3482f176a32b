"""Files that torch.save wrote, read without running anything: tensors and plain values only."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgert.errors import BadCheckpoint
from edgert.models.importers.common import Problems, named, shown

MAX_ENTRIES = 1 << 17
MAX_PICKLE = 64 << 20

_HALF = (torch.bfloat16, torch.float16)


def read_torch(path: Path, *, holds: str, do: str, allowed: Sequence[Any] = ()) -> Any:
    """What the file holds; tensors stay on disk until they are used.

    holds    in words, what it may hold
    do       what to do where it holds more
    allowed  what torch's restricted unpickler may call besides, as `safe_globals` takes it
    Raises BadCheckpoint.
    """
    check_zip(path)
    where = str(path)
    # torch.load goes by this one name and would take the file for something else.
    misnamed = path.name.endswith(".safetensors")
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(list(allowed)):
            return torch.load(
                file if misnamed else path,
                map_location="cpu",
                mmap=not misnamed,  # leaves optimizer state and large tables on disk
                weights_only=True,
            )
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)|a NumPy [^\n.]*", str(error))
        what = f" ({culprit[1] or culprit[0]})" if culprit else ""
        raise BadCheckpoint(
            f"the checkpoint holds Python objects{what}, not only {holds}", where=where, do=do
        ) from error
    except Exception as error:  # a broken pickle can fail anywhere, with anything
        reason = str(error).splitlines()[0] if str(error) else ""
        raise BadCheckpoint(
            f"torch cannot read the checkpoint: {type(error).__name__} {shown(reason)}",
            where=where,
            do="download the file again",
        ) from error


def check_zip(path: Path) -> None:
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


def plain_state(
    raw: Any,
    problems: Problems,
    label: str,
    plain: Callable[[str], str],
    *,
    at: str = "",
    widened: Collection[str] = (),
) -> dict[str, Tensor]:
    """A state dict under plain names: dense float32 tensors.

    label    what messages call it
    plain    a name without the prefixes of wrappers
    at       what stands before a name in messages
    widened  names whose tensors may also be in half precision
    """
    state: dict[str, Tensor] = {}
    if not isinstance(raw, Mapping):
        problems.add(f"{label} is {shown(raw)}, not a state dict")
        return state
    for key, value in raw.items():
        if not isinstance(key, str):
            problems.add(f"{label} has the key {shown(key)}, not text")
            continue
        name = plain(key)
        said = at + named([name])
        if not isinstance(value, Tensor):
            problems.add(f"{said} is {shown(value)}, not a tensor")
        elif value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            problems.add(f"{said} is not a dense tensor with data")
        elif value.dtype != torch.float32 and not (name in widened and value.dtype in _HALF):
            problems.add(f"{said} is {value.dtype}, not torch.float32")
        elif name in state:
            problems.add(f"{said} appears twice, with different prefixes")
        else:
            state[name] = value.detach().float()
    return state
