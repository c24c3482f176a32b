"""The card that people read: one result as a few aligned lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgert.bench.measure import PARTS

LABEL = 15
_COLUMN = 9
_COLUMNS = ("p50", "p90", "p99", "max")


def card(result: Mapping[str, Any]) -> str:
    """The lines of a card, without a newline at the end."""
    r = result
    reference = r["reference"]
    unclear = f", {reference['unclear']} too close to call" if reference["unclear"] else ""
    depth = f" behind {r['n_depth']}" if r["n_depth"] else ""
    lines = [
        f"{r['name']} {r['variant']} · {r['backend']} · {place(r)} · {r['cache_state']} · "
        "verified ✓",
        f"{r['n_prompt']} tokens of prompt{depth}, {r['n_gen']} generated, {r['repeats']} times",
        "",
        " " * LABEL + "".join(f"{name:>{_COLUMN}}" for name in _COLUMNS),
        _row("first token", r["ttft_ms"]) + f"     {speed(r['prefill']['avg_ts'])} tok/s prefill",
        _row("between tokens", r["itl_ms"]) + f"     {speed(r['avg_ts'])} tok/s decode",
        *_iterations(r),
        *_guesses(r),
        _line("where it goes", _where(r["where_ms"])),
        _line("start", _start(r["cold_start_ms"])),
        _line("memory", _memory(r["memory"])),
        _line("power", power_text(r)),
        _line("machine", _machine(r)),
        _line(
            "verified",
            f"{reference['compared']} of {r['n_gen']} tokens by {reference['path']}{unclear} · "
            f"sha256 {r['output_sha256'][:12]}",
        ),
    ]
    return "\n".join(lines)


def place(r: Mapping[str, Any]) -> str:
    """'CPU AMD EPYC, 2 threads'."""
    kind = r["device"].upper()
    count = r["n_threads"]
    threads = "threads unknown" if count is None else f"{count} thread{'s' * (count > 1)}"
    return f"{kind} {r['device_name']}, {threads}" + (", low memory" if r["low_memory"] else "")


def speed(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if value < 999.95 else f"{value:,.0f}"


def milliseconds(value: float) -> str:
    """Three digits and the unit that suits: '12.9 s', '1.01 ms', '8.4 µs'."""
    if value >= 9999.5:
        return f"{value / 1000:.1f} s"
    if value >= 99.95:
        return f"{value:.0f} ms"
    return f"{value:#.3g} ms" if value >= 0.09995 else f"{value * 1000:.1f} µs"


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f}" if abs(nbytes) >= 9.5e6 else f"{nbytes / 1e6:.2g}"


def _row(label: str, table: Mapping[str, float] | None) -> str:
    if table is None:
        return _line(label, "only one token")
    values = "".join(f"{table[name]:>{_COLUMN}.2f}" for name in _COLUMNS)
    return f"{label:<{LABEL}}{values}  ms"


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"


def _iterations(r: Mapping[str, Any]) -> list[str]:
    """How deep the loop went, for a model that has one."""
    steps = r.get("steps_taken")
    if steps is None:
        return []
    policy = r["sampling"].get("halt") or "full"
    text = f"{steps['avg']:.2f} of {r['iterations']} a token (p95 {steps['p95']:.0f}) · {policy}"
    return [_line("iterations", text)]


def _guesses(r: Mapping[str, Any]) -> list[str]:
    """How many tokens were guessed, where speculation was on."""
    found = r.get("guesses")
    if found is None:
        return []
    text = f"{100 * found['share']:.0f} % of the tokens"
    text += f" · {found['accepted']:.0f} of {found['checked']:.0f} were right"
    return [_line("guessed", f"{text} · {r['sampling']['speculate']}")]


def _where(where: Mapping[str, float]) -> str:
    parts = " │ ".join(f"{part} {milliseconds(where[part])}" for part in PARTS)
    return f"{parts}     ({where['share'] * 100:.1f} % of {milliseconds(where['wall'])})"


def _start(cold: Mapping[str, Any] | None) -> str:
    if cold is None:
        return "not measured"
    hashed = f", {megabytes(cold['hashed_bytes'])} MB hashed" if cold["hashed_bytes"] else ""
    return (
        f"import {cold['import']:.0f} + load {cold['load']:.0f} "
        f"+ first token {cold['first_token']:.0f} = {cold['total']:.0f} ms     "
        f"({cold['cache_state']}{hashed})"
    )


def _memory(memory: Mapping[str, int] | None) -> str:
    if memory is None:
        return "not measured"
    m = {name: megabytes(value) for name, value in memory.items()}
    return f"peak {m['peak']} MB = weights {m['weights']} + state {m['state']} + rest {m['rest']}"


def power_text(r: Mapping[str, Any]) -> str:
    """Rails and energy, or that there are none."""
    mode = f" · mode {r['nvpmodel']}" if r["nvpmodel"] else ""
    throttled = " · over-current throttling" if r["throttled"] else ""
    if not r["rails"]:
        return f"not measured (no rails on this machine){mode}{throttled}"
    rails = " │ ".join(f"{name} {v['mean_mw'] / 1e3:.2f} W" for name, v in r["rails"].items())
    total = ""
    if r["energy_j"] is not None:
        total = f"     {r['energy_j']:.1f} J, {r['tok_per_j']:.1f} tok/J ({r['rail']})"
    return rails + total + mode + throttled


def _machine(r: Mapping[str, Any]) -> str:
    others = r["others_cpus"]
    told = "not readable" if others is None else f"{others:.2f} of {r['n_cpus']} CPUs busy"
    return f"others kept {told} · governor {r['governor'] or 'not readable'}{_clock(r['clocks'])}"


def _clock(clocks: Mapping[str, float] | None) -> str:
    if not clocks:
        return ""
    names = {"cpu_mhz": "now", "cpu_max_mhz": "max"}
    return " · CPU " + ", ".join(f"{clocks[n]:.0f} MHz {names[n]}" for n in names if n in clocks)
