"""The published checkpoint format, optimizer state included: written for others, and read back.

    step-00000300.pt   torch.save of {model, step, config, optimizer}; `step` is the next one to run

AdamW's state is numbered: first all weights that decay, then the others, each in published order.
The Muon hybrid has two states: Muon's, then AdamW's, which has one group.

Source: ShmidtS/HAGI @ 286a65d, prototype/training (loop.py, optim.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgert.errors import BadCheckpoint
from edgert.files import write_atomic
from edgert.models.importers.common import Problems, shown
from edgert.models.importers.published import HEAD
from edgert.models.trainable import TextModel as Model
from edgert.train.optim import MOMENTS, MOMENTUM, Optimizer, decays


def write_published(path: Path, model: Model, step: int, optimizer: Optimizer | None) -> None:
    """Write one file, whole or not at all. Raises EdgertError if the system refuses."""
    weights = {name: _own(view) for name, view in model.published().items()}
    content: dict[str, Any] = {
        "model": weights | {HEAD: weights["embed.weight"]},
        "step": step,
        "config": model.config.published(),
    }
    if optimizer is not None:
        content["optimizer"] = optimizer_state(optimizer)
    write_atomic(path, lambda file: torch.save(content, file))


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer as torch and the published trainer would save it."""
    state, names = optimizer.state(), order(optimizer)
    adamw: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(name for group in names for name in group):
        if f"{MOMENTS[0]}.{name}" in state:
            step = torch.tensor(float(optimizer.updates))
            adamw[index] = {"step": step} | {
                slot: _own(state[f"{slot}.{name}"]) for slot in MOMENTS
            }
    settings = [s | {"foreach": None, "fused": None} for s in optimizer.settings()]
    groups = _numbered(settings, names)
    if not optimizer.muon:
        return {"state": adamw, "param_groups": groups}
    muon = {
        index: {MOMENTUM: _own(optimizer.buffers[name])}
        for index, name in enumerate(optimizer.muon)
        if name in optimizer.buffers
    }
    group = {
        "lr": settings[0]["lr"],
        "momentum": optimizer.config.muon_momentum,
        "nesterov": True,
        "ns_steps": optimizer.config.muon_ns_steps,
    }
    return {
        "optimizers": [
            {"state": muon, "param_groups": _numbered([group], [list(optimizer.muon)])},
            {"state": adamw, "param_groups": groups},
        ]
    }


def order(optimizer: Optimizer) -> list[list[str]]:
    """The names of AdamW's groups in the order that its state is numbered."""
    names = [name for name in optimizer.names if name not in optimizer.muon]
    if optimizer.muon:
        return [names]
    return [
        [name for name in names if decays(name, optimizer.names[name]) is wanted]
        for wanted in (True, False)
    ]


def moments(raw: Any, optimizer: Optimizer, where: str) -> tuple[int, dict[str, Tensor]]:
    """A file's `optimizer` -> updates made, and moments as `Optimizer.restore` takes them.

    Raises BadCheckpoint with everything that is wrong.
    """
    problems = Problems(where)
    found: dict[str, Tensor] = {}
    updates: set[int] = set()
    parts = [raw]
    if optimizer.muon:
        parts = raw.get("optimizers", []) if isinstance(raw, Mapping) else []
        if not isinstance(parts, list) or len(parts) != 2:
            problems.add("optimizer holds no states of Muon and AdamW")
            problems.check("the optimizer's state is not that of the recipe's optimizer")
        _read(parts[0], [list(optimizer.muon)], (MOMENTUM,), "muon", found, updates, problems)
    names = order(optimizer)
    _read(parts[-1], names, ("step", *MOMENTS), "adamw", found, updates, problems)
    problems.check("the optimizer's state is not that of the recipe's optimizer")
    if len(updates) > 1:
        raise BadCheckpoint(
            f"weights with different numbers of updates, {min(updates)} and {max(updates)}: "
            "the trainer updates all of them together",
            where=where,
        )
    return max(updates, default=0), found


def _read(
    raw: Any,
    names: list[list[str]],
    slots: tuple[str, ...],
    kind: str,
    found: dict[str, Tensor],
    updates: set[int],
    problems: Problems,
) -> None:
    """One optimizer's state into `found` and `updates`."""
    state = raw.get("state") if isinstance(raw, Mapping) else None
    groups = raw.get("param_groups") if isinstance(raw, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        problems.add(f"{kind}: {shown(raw)} is no optimizer state")
        return
    sizes = [len(g["params"]) if _is_group(g) else None for g in groups]
    if sizes != [len(group) for group in names]:
        problems.add(
            f"{kind} has groups of {sizes} weights, the model {[len(group) for group in names]}"
        )
        return
    flat = [name for group in names for name in group]
    for index, entry in state.items():
        if type(index) is not int or not 0 <= index < len(flat) or not isinstance(entry, Mapping):
            problems.add(f"{kind}.{shown(index)} belongs to no weight")
            continue
        for slot in slots:
            value = entry.get(slot)
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                problems.add(f"{kind}.{index}.{slot} is {shown(value)}, not a tensor")
            elif slot == "step":
                if value.numel() != 1 or not 0 <= float(value) < 2**53:
                    problems.add(f"{kind}.{index}.step is not a number of updates")
                else:
                    updates.add(int(value))
            elif value.dtype != torch.float32:
                problems.add(f"{kind}.{index}.{slot} is {value.dtype}, not torch.float32")
            else:
                found[f"{slot}.{flat[index]}"] = value


def _is_group(group: Any) -> bool:
    return isinstance(group, Mapping) and isinstance(group.get("params"), list)


def _numbered(settings: list[dict[str, Any]], names: list[list[str]]) -> list[dict[str, Any]]:
    groups, start = [], 0
    for setting, members in zip(settings, names, strict=False):
        groups.append(setting | {"params": list(range(start, start + len(members)))})
        start += len(members)
    return groups


def _own(view: Tensor) -> Tensor:
    """A copy with memory of its own: torch.save would write all of what a view looks at."""
    return view.detach().to("cpu").clone(memory_format=torch.contiguous_format)
