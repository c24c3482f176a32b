"""Cores and memory, as /sys and /proc tell them."""

from __future__ import annotations

import os

import pytest

from edgert import machine


@pytest.mark.parametrize(
    ("siblings", "allowed", "cores"),
    [
        (["0-1", "0-1", "2-3", "2-3"], {0, 1, 2, 3}, 2),  # two threads in a core
        (["0", "1", "2", "3"], {0, 1, 2, 3}, 4),
        (["0,2", "1,3", "0,2", "1,3"], {0, 2}, 1),  # this process may use one core of two
        (["0,2", "1,3", "0,2", "1,3"], {2, 3}, 2),
        ([], {0, 1, 2}, 3),  # the system does not say
    ],
)
def test_threads_of_one_core_count_once(siblings, allowed, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed)
    for number, text in enumerate(siblings):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    assert machine.physical_cores(tmp_path) == cores


def test_available_memory(tmp_path):
    table = tmp_path / "meminfo"
    assert machine.available_memory(table) is None
    table.write_text("MemTotal:       8000 kB\nMemAvailable:   2000 kB\nHugePages_Total: 0\n")
    assert machine.available_memory(table) == 2_048_000
    table.write_text("MemTotal:       8000 kB\n")  # kernels before 3.14
    assert machine.available_memory(table) is None
