"""Two benches side by side: B against A, and only if they measured the same thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgert.errors import Incompatible

SAME = (
    *("model_id", "precision", "n_prompt", "n_gen", "n_depth", "n_batch", "n_threads"),
    *("sampling", "prompt_sha256", "device", "cache_state"),
)
"""What two runs must share for their figures to be comparable."""

DIFFERENT = (
    *("version", "variant", "backend", "kernels", "device_name", "machine", "low_memory"),
    *("governor", "nvpmodel", "others_cpus", "python", "repeats", "output_sha256", "test_time"),
)
"""What may differ, since it is what one compares, and is then shown."""


@dataclass(frozen=True)
class Row:
    """One figure of both runs; `ratio` is B / A. `better` is 'lower' or 'higher'."""

    name: str
    unit: str
    a: float | None
    b: float | None
    better: str

    @property
    def ratio(self) -> float | None:
        return self.b / self.a if self.a and self.b is not None else None


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any], where: str) -> None:
    """Raise Incompatible listing everything that makes the two runs unlike."""
    differences = [
        f"{key}: {_short(a.get(key))} and {_short(b.get(key))}"
        for key in SAME
        if a.get(key) != b.get(key)
    ]
    if differences:
        raise Incompatible(
            "\n  - ".join(["the two benches did not measure the same thing:", *differences]),
            where=where,
            do="measure both with the same model, lengths and threads",
        )


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Rows and differences as one JSON object. Both must be comparable."""
    return {
        "a": {key: a.get(key) for key in DIFFERENT},
        "b": {key: b.get(key) for key in DIFFERENT},
        "same": {key: a.get(key) for key in SAME},
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows(a, b)],
    }


def rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    def row(name: str, unit: str, better: str, *path: str, scale: float = 1.0) -> Row:
        return Row(name, unit, _at(a, path, scale), _at(b, path, scale), better)

    return [
        row("first token p50", "ms", "lower", "ttft_ms", "p50"),
        row("first token max", "ms", "lower", "ttft_ms", "max"),
        row("between tokens p50", "ms", "lower", "itl_ms", "p50"),
        row("between tokens p99", "ms", "lower", "itl_ms", "p99"),
        row("decode", "tok/s", "higher", "avg_ts"),
        row("prefill", "tok/s", "higher", "prefill", "avg_ts"),
        row("request p50", "ms", "lower", "request_latency_ms", "p50"),
        row("cold start", "ms", "lower", "cold_start_ms", "total"),
        row("cold load", "ms", "lower", "cold_start_ms", "load"),
        row("peak memory", "MB", "lower", "memory", "peak", scale=1e-6),
        row("anonymous memory", "MB", "lower", "memory", "anonymous", scale=1e-6),
        row("state", "MB", "lower", "state_bytes", scale=1e-6),
        row("energy", "tok/J", "higher", "tok_per_j"),
    ]


def _at(value: Any, path: tuple[str, ...], scale: float) -> float | None:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value * scale if number and abs(value) < 1e18 else None


def table(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What people read: what differs, then the figures with B / A."""
    lines = [
        f"{_short(a['name'])} {_short(a['precision'])} · {a['n_prompt']} + {a['n_gen']} tokens"
        + (f" behind {a['n_depth']}" if a["n_depth"] else "")
        + f" · {_short(a['device']).upper()}, threads {_short(a.get('n_threads'))}",
        "",
        f"{'':<20}{'A':>12}{'B':>12}{'B / A':>9}",
    ]
    for row in rows(a, b):
        if row.a is None and row.b is None:
            continue
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append(
            f"{row.name:<20}{_figure(row.a):>12}{_figure(row.b):>12}{ratio:>9}  "
            f"{row.unit:<6}{row.better} is better"
        )
    lines.append("")
    for key in DIFFERENT:
        left, right = _short(a.get(key)), _short(b.get(key))
        if left != right:
            lines.append(f"{key:<20}{left} → {right}")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _short(value: Any) -> str:
    """A declared value on one line: hashes cut, nothing that moves a terminal's cursor."""
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{_short(key)} {_short(item)}" for key, item in sorted(value.items()))
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text[:12] if len(text) == 64 and text.isalnum() else text[:80]
