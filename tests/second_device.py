"""A second device that is none: its tensors are kept on the CPU, and compute with no others.

torch reserves a device for backends from outside; here it is one in Python. What is computed on it
is what the CPU computes, bit for bit, so whatever differs is a tensor in the wrong place; mostly
that is refused, as CUDA refuses it.

As a script: trains recipes on it and on the CPU, and prints what came out as one JSON object.
CUDA would take a number or an index from the CPU; a number may be here, too, an index not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "second"
CROSSING = {"aten::copy_", "aten::_to_copy"}  # what may see tensors of both


class Elsewhere(torch.Tensor):
    """A tensor on the second device; `kept` is where it really is."""

    kept: torch.Tensor

    @staticmethod
    def __new__(cls, kept: torch.Tensor) -> Elsewhere:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            kept.size(),
            strides=kept.stride(),
            storage_offset=kept.storage_offset(),
            dtype=kept.dtype,
            device=torch.device(NAME, 0),
        )
        self.kept = kept
        return self

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.kept.untyped_storage()

    def tolist(self) -> Any:
        return self.kept.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Sees what makes tensors from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation. Raises RuntimeError where a GPU would: tensors of two devices, unless a
    number."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in given if isinstance(x, Elsewhere)]
    here = [x for x in given if not isinstance(x, Elsewhere) and x.ndim]
    if there and here and func.name() not in CROSSING:
        shapes = [list(x.shape) for x in here]
        raise RuntimeError(f"{func.name()}: tensors on the {NAME} device and on the CPU, {shapes}")
    result_there = bool(there)
    if func.name() == "aten::copy_":
        result_there = isinstance(args[0], Elsewhere)
    if kwargs.get("device") is not None:
        result_there = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}

    def unwrapped(x: Any) -> Any:
        return x.kept if isinstance(x, Elsewhere) else x

    out = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    same = {id(x.kept): x for x in there}  # of an operation in place, the tensor itself

    def wrapped(x: Any) -> Any:
        if not result_there or not isinstance(x, torch.Tensor):
            return x
        return same[id(x)] if id(x) in same else Elsewhere(x)

    return tree_map(wrapped, out)


def register() -> None:
    """Once in a process, before its first gradient: torch counts devices then."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    _KEPT.append(library)
    # `torch.tensor` passes by the mode.
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")


_KEPT: list[torch.library.Library] = []  # for as long as the process runs


def _empty_strided(*args: Any, **kwargs: Any) -> torch.Tensor:
    return compute(torch.ops.aten.empty_strided.default, args, kwargs)


def _copy_from(source: torch.Tensor, target: torch.Tensor, waits: bool = False) -> torch.Tensor:
    return compute(torch.ops.aten.copy_.default, (target, source), {})


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within it, the device; `register` has been called."""
    with _Dispatch():
        yield torch.device(NAME, 0)


def main(folder: Path) -> None:
    """For each recipe FOLDER/*/tiny.toml: what a run on each device, and one on both, ends with."""
    from edgert.models.importers import trained
    from edgert.train import job
    from edgert.train.recipe import read_recipe

    def train(path: Path, name: str, **options: Any) -> dict[str, Any]:
        run = path.parent / name
        outcome = job.train(read_recipe(path), run, **options)
        files = trained.newest(run)[0].files
        value = outcome.to_json()
        said = {key: value[key] for key in ("device", "first", "last", "heldout", "notes")}
        return said | {"files": [files[trained.WEIGHTS], files[trained.TENSORS]]}

    register()
    found: dict[str, Any] = {}
    paths = sorted(folder.glob("*/tiny.toml"))
    for path in paths:
        found[path.parent.name] = {"cpu": train(path, "cpu")}
    choose = job.choose
    with second_device() as device:
        for path in paths:
            job.choose = lambda *_: device
            result = found[path.parent.name]
            result["second"] = train(path, "second")
            train(path, "both", until=5)
            job.choose = choose
            result["then cpu"] = train(path, "both", resume=True)
        try:
            torch.ones(2, device=device) * torch.ones(2)
        except RuntimeError as error:
            found["refusal"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
