"""What this machine has of what edgert needs and uses: a row for each thing, with a way out.

Probes read Linux's own files below a root folder, and the packages of this Python. Reading is
bounded, and a probe that fails is a row that says so. The CUDA driver is looked for as files; only
where both its library and a device are there, a process of its own calls cuInit, so that a broken
driver can neither crash nor stall this one. No TensorRT object is made: its Runtime kills a process
that has no driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgert.doctor import host, jetson
from edgert.doctor.machine import Machine, Row, Setting
from edgert.doctor.settings import cache, settings_in_effect, variables
from edgert.errors import EdgertError

__all__ = ["Machine", "Report", "Row", "Setting", "examine"]

Probe = Callable[[Machine], Iterable[Row]]

PROBES: Mapping[str, Probe] = {
    "python": host.python,
    "cpu": host.cores,
    "memory": host.memory,
    "onnxruntime": host.onnxruntime,
    "kernels": host.kernels,
    "libraries": host.libraries,
    "CUDA driver": jetson.cuda,
    "TensorRT": jetson.tensorrt,
    "JetPack": jetson.jetson,
    "power": jetson.power,
    "cache": cache,
}


@dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...]
    settings: Mapping[str, dict[str, str]]

    @property
    def lacking(self) -> list[Row]:
        """What keeps every bundle from running here."""
        return [row for row in self.rows if row.needed and row.status == "missing"]


def examine(machine: Machine | None = None, settings: Sequence[Setting] = ()) -> Report:
    """Look at everything. Never raises for what it finds."""
    machine = machine or Machine()
    rows: list[Row] = []
    for name, probe in PROBES.items():
        rows.extend(_guarded(name, machine, probe))
    chosen = settings_in_effect(machine, settings)
    for name, value in chosen.items():
        rows.append(Row(name.replace("_", " "), f"{value['value']} ({value['from']})"))
    rows.extend(_guarded("variables", machine, lambda machine: variables(machine, settings)))
    return Report(tuple(map(_printable, rows)), chosen)


def _guarded(name: str, machine: Machine, probe: Probe) -> Iterator[Row]:
    try:
        yield from probe(machine)
    except Exception as error:  # whatever a strange machine holds: the other rows still count
        said = error.what if isinstance(error, EdgertError) else f"{type(error).__name__}: {error}"
        yield Row(name, f"could not be examined: {said}", "warning", "see whether you may read it")


def _printable(row: Row) -> Row:
    """Files and variables may hold anything; a terminal should not obey them."""
    name, finding = (
        "".join(c if c.isprintable() else "�" for c in text) for text in (row.name, row.finding)
    )
    return Row(name, finding[:500], row.status, row.do, row.needed)
