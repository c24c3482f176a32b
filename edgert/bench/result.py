"""One bench as one JSON object: put together, and read back from a file.

docs/bench.md lists the fields. What was not measured is null.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgert._version import __version__
from edgert.bench import facts, power
from edgert.bench.measure import PARTS, Request
from edgert.bench.plan import Work
from edgert.bench.statistics import rates, summary
from edgert.bench.verify import Verified
from edgert.errors import BadFile, EdgertError, NewerFormat
from edgert.files import read_at_most
from edgert.model import Model
from edgert.sampler import OFF, SamplingParams

FORMAT = 1
MAX_BYTES = 16 << 20
MARK = "edgert_bench"

Result = dict[str, Any]


def device_of(device: str) -> str:
    """The kind of device that runs: 'auto' is the CPU, the only one this version has."""
    return "cpu" if device == "auto" else device


def declared(model: Model, work: Work, *, device: str, prepack: bool) -> Result:
    """What decides the figures, as far as it can be known."""
    manifest, runner = model.manifest, model.runner
    graphs = runner.variant.graphs.values()
    files = {g.file for g in graphs} | {data for g in graphs for data in g.data}
    threads = runner.backend.build.get("threads", "")
    plan = work.plan
    return {
        MARK: FORMAT,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "build_commit": None,  # a released package does not know it
        "python": platform.python_version(),
        "name": manifest.name,
        "model_id": manifest.model_id,
        "model_params": manifest.parameters,
        "model_size": sum(manifest.files[f].bytes for f in files if f in manifest.files),
        "variant": runner.variant_name,
        "variant_id": runner.variant.variant_id,
        "precision": runner.variant.precision,
        "lowering": runner.variant.lowering,
        "device": device_of(device),
        "device_name": facts.device_name(),
        "backend": runner.backend.build.get("backend", runner.backend.name),
        "kernels": runner.backend.build.get("kernels", runner.backend.name),
        "machine": runner.backend.build.get("machine", platform.machine()),
        "placement": model.placement,
        "n_threads": int(threads) if threads.isdigit() else None,
        "n_cpus": len(os.sched_getaffinity(0)),
        "low_memory": not prepack,
        "iterations": runner.loop.iterations if runner.loop else 1,
        "n_batch": 1,
        "n_prompt": plan.n_prompt,
        "n_gen": plan.n_gen,
        "n_depth": plan.n_depth,
        "repeats": plan.repeats,
        "warmup": plan.warmup,
        "sampling": _sampling(work.params),
        "prompt_source": work.source,
        "prompt_sha256": work.sha256,
        "cache_state": "warm" if plan.warmup else "model loaded, nothing warmed up",
        "prefix_reuse": False,
        "governor": facts.governor(),
        "clocks": facts.clocks(),
        "temp_c": facts.temperatures(),
    }


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """Without speculation it is what earlier versions wrote, so that their runs compare."""
    chosen = {"temperature": 0.0, "ignore_eos": True, "halt": params.halt}
    return chosen if params.speculate == OFF else chosen | {"speculate": params.speculate}


def measured(
    timed: Sequence[Request],
    work: Work,
    memory: Mapping[str, int] | None,
    cold: Mapping[str, Any] | None,
    verified: Verified,
    model_size: int,
    iterations: int,
) -> Result:
    """The figures. `iterations` is the full depth of the model's loop, 1 without one.

    Times are in milliseconds, those of `samples_ns` and the like in nanoseconds."""
    plan = work.plan
    walls = [one.wall_ns for one in timed]
    decode = [sum(one.between_ns) for one in timed]
    state = max(one.state_bytes for one in timed)
    steps = [float(n) for one in timed for n in one.iterations]
    return {
        # The top level has llama-bench's generation test, `prefill` its prompt test.
        **rates(plan.n_gen - 1, decode),
        "prefill": rates(plan.n_prompt, [one.prefill_ns for one in timed]),
        "ttft_ms": _ms([one.first_ns for one in timed]),
        "itl_ms": _ms([ns for one in timed for ns in one.between_ns]),
        "request_latency_ms": _ms(walls),
        "itl_samples_ms": [[round(ns / 1e6, 4) for ns in one.between_ns] for one in timed],
        "where_ms": _where(timed),
        "cold_start_ms": dict(cold) if cold else None,
        "memory": _memory(memory, model_size, state),
        "state_bytes": state,
        "steps_taken": summary(steps) if iterations > 1 else None,
        "halt_rate": float(np.mean(np.less(steps, iterations))) if iterations > 1 else None,
        "guesses": _guesses(timed) if plan.speculate != OFF else None,
        "output_sha256": verified.sha256,
        "verified": True,
        "reference": {
            "path": verified.path,
            "compared": verified.compared,
            "unclear": verified.unclear,
            "margin": verified.margin,
        },
    }


def _guesses(timed: Sequence[Request]) -> dict[str, float]:
    """Mean counts of a request, and the share of its tokens that were guessed."""
    checked = sum(one.guesses.checked for one in timed) / len(timed)
    accepted = sum(one.guesses.accepted for one in timed) / len(timed)
    return {
        "checked": checked,
        "accepted": accepted,
        "share": accepted / len(timed[0].tokens),
    }


def _ms(nanoseconds: Sequence[int]) -> dict[str, float] | None:
    return summary([ns / 1e6 for ns in nanoseconds])


def _where(timed: Sequence[Request]) -> dict[str, float]:
    """Mean of each part over the requests, in ms; `share` of the wall time that PARTS explain."""
    count = len(timed) * 1e6
    found = {part: sum(one.parts[part] for one in timed) / count for part in PARTS}
    wall = sum(one.wall_ns for one in timed) / count
    named = sum(found.values())
    return found | {"other": wall - named, "wall": wall, "share": named / wall}


def _memory(memory: Mapping[str, int] | None, weights: int, state: int) -> dict[str, int] | None:
    """`rest` may be negative: weights that are mapped count only where they were read."""
    if memory is None:
        return None
    rest = memory["peak"] - weights - state
    return {"peak": memory["peak"], "weights": weights, "state": state, "rest": rest} | {
        "anonymous": memory["anonymous"]
    }


def power_fields(
    meter: power.Meter | None, timed: Sequence[Request], events: int | None
) -> dict[str, Any]:
    """`events`: over-current events that the board counted during the measurement, if it counts."""
    windows = [(one.begun, one.begun + one.wall_ns) for one in timed]
    tokens = sum(len(one.tokens) for one in timed)
    return power.report(meter, windows, tokens) | {
        "nvpmodel": power.power_mode(),
        "throttled": None if events is None else events > 0,
    }


def read_result(path: Path) -> Result:
    """A bench that `edgert bench --json` printed, from a file.

    Raises BadFile if it is not one, or has more than MAX_BYTES; NewerFormat for a later format.
    """
    try:
        with path.open("rb") as file:
            data = read_at_most(file, MAX_BYTES + 1)
    except OSError as error:
        raise BadFile(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    do = "give a file that `edgert bench ... --json` wrote"
    if len(data) > MAX_BYTES:
        raise BadFile(
            f"the file has more than {MAX_BYTES:,} bytes: it is not a bench", where=str(path), do=do
        )
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"the file is not JSON: {error}", where=str(path), do=do) from error
    form = value.get(MARK) if isinstance(value, dict) else None
    if type(form) is int and form > FORMAT:
        raise NewerFormat(
            f"the bench has format {form}, this version of edgert reads {FORMAT}",
            where=str(path),
            do="install a newer edgert",
        )
    problems = (
        _problems(value)
        if type(form) is int and form == FORMAT
        else [f"it has no {MARK}: {FORMAT}"]
    )
    if problems:
        raise BadFile(
            "\n  - ".join(["the file is not a bench of edgert:", *problems]),
            where=str(path),
            do=do,
        )
    return dict(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


_TEXTS = (
    *("model_id", "precision", "lowering", "variant", "version", "backend", "placement", "name"),
    *("device", "device_name", "output_sha256", "prompt_sha256", "test_time", "cache_state"),
)
_COUNTS = ("n_prompt", "n_gen", "n_depth", "n_batch", "repeats", "model_size", "state_bytes")
_TABLES = ("ttft_ms", "itl_ms", "request_latency_ms", "where_ms", "prefill", "memory")


_SCALARS = (
    *("n_threads", "low_memory", "kernels", "machine", "governor", "nvpmodel", "others_cpus"),
    "python",
)


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _problems(value: Mapping[str, Any]) -> list[str]:
    """Where the object lacks what reading it relies on: kinds and numbers, not their sense."""
    problems = [
        f"{name} is not text" for name in _TEXTS if not isinstance(value.get(name), str)
    ] + [
        f"{name} is not a count"
        for name in _COUNTS
        if type(value.get(name)) is not int or value[name] < 0
    ]
    for name in (*_TABLES, "cold_start_ms"):
        table = value.get(name)
        if table is not None and not isinstance(table, dict):
            problems.append(f"{name} is not an object")
    problems += [f"{name} is not one value" for name in _SCALARS if not _scalar(value.get(name))]
    sampling = value.get("sampling")
    if not isinstance(sampling, dict) or not all(map(_scalar, sampling.values())):
        problems.append("sampling is not a flat object")
    if value.get("verified") is not True:
        problems.append("verified is not true")
    return problems


def dumps(result: Mapping[str, Any]) -> str:
    """Compact JSON. Raises EdgertError if a figure is not a number."""
    try:
        return json.dumps(result, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise EdgertError(f"a figure is not a number: {error}") from error
