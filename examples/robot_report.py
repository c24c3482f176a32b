"""What robot_loop.py reports: its figures in words, and the histogram as a picture."""

from __future__ import annotations

import math
from typing import Any

EDGES_MS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""Of the histogram: from each to the next, and from the last on."""


def in_words(report: dict[str, Any]) -> list[str]:
    """The report for people: a line per subject, then the histogram."""
    lines = [f"control     {told(report)}"]
    if report["baseline"]:
        lines.append(
            f"baseline    {told(report['baseline'])} · at {report['late_5_ms_like_baseline']} of "
            f"{report['late_5_ms']} ticks over 5 ms it was late, too"
        )
    lines.append(
        f"joint       follows its target within {report['tracking_error_degrees']:.2f}° (RMS) · "
        f"{priorities(report)} · {report['stolen_ms']} ms of CPU taken by the host"
    )
    if talk := report["generation"]:
        lines.append(
            f"generation  {talk['answers']} answers, {talk['met']} within {talk['deadline_ms']:g} "
            f"ms, {talk['dropped']} late and dropped · {talk['tokens']} tokens, "
            f"{talk['tokens_per_s']:.1f} tok/s · {report['placement']}"
        )
    if kept := report["session"]:
        began = f"resumed at {kept['tokens_at_start']} tokens" if kept["resumed"] else "new"
        file = f"saved to {kept['file']}" if kept["file"] else "not saved"
        lines.append(
            f"session     {began} · {kept['tokens']} tokens now, rewound {kept['rewinds']} times · "
            f"{file} · ended by {report['ended_by']} within {report['shutdown_seconds']:.2f} s"
        )
    lines += ["", "late by          ticks  (bars are logarithmic)"]
    counts = report["histogram"]["ticks"]
    last = max(index for index, count in enumerate(counts) if count)
    for index, count in enumerate(counts[: last + 1]):
        edges = [f"{edge:g}" for edge in EDGES_MS[index : index + 2]]
        span = " – ".join(edges) if len(edges) == 2 else f"from {edges[0]}"
        bar = "█" * round(40 * log_share(count, max(counts)))
        lines.append(f"{span:>12} ms {count:>6}  {bar}".rstrip())
    return lines


def priorities(report: dict[str, Any]) -> str:
    talk = report["generation"]
    return f"{report['priority']} priority" + (f", generation {talk['priority']}" if talk else "")


def told(report: dict[str, Any]) -> str:
    late = report["lateness_ms"]
    return (
        f"{report['ticks']} ticks at {report['hz']:g} Hz, {report['missed_ticks']} missed · late "
        f"by p50 {late['p50']:.2f} ms, p99 {late['p99']:.2f} ms, max {late['max']:.2f} ms · "
        f"{report['late_1_ms']} over 1 ms, {report['late_5_ms']} over 5 ms"
    )


def log_share(count: int, most: int) -> float:
    """0 for none, 1 for the most; a single tick is to be seen beside thousands."""
    return math.log1p(count) / math.log1p(most) if count else 0.0


def picture(report: dict[str, Any]) -> str:
    """The histogram as SVG, with that of the baseline where there is one."""
    shown = [("#2368b0", "generating" if report["generation"] else "no model", report)]
    if report["baseline"]:
        shown.append(("#9aa5b1", "baseline", report["baseline"]))
    most = max(max(one["histogram"]["ticks"]) for _, _, one in shown)
    width, height, left, base, tallest = 860, 330, 30, 270, 190
    slot = (width - 2 * left) / len(EDGES_MS)
    bar = slot * 0.84 / len(shown)
    parts = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    for place, (colour, name, one) in enumerate(shown):
        y = 24 + 20 * place
        parts.append(f'<rect x="{left}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{left + 18}" y="{y}">{name}: {told(one)}</text>')
        for index, count in enumerate(one["histogram"]["ticks"]):
            if count:
                x = left + slot * (index + 0.08) + place * bar
                top = base - tallest * log_share(count, most)
                parts.append(
                    f'<rect x="{x:.1f}" y="{top:.1f}" width="{bar:.1f}" '
                    f'height="{base - top:.1f}" fill="{colour}"/>'
                    f'<text x="{x + bar / 2:.1f}" y="{top - 4:.1f}" font-size="10" '
                    f'text-anchor="middle">{count}</text>'
                )
    for index, low in enumerate(EDGES_MS):
        x = left + slot * index
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{low:g}</text>')
    parts.append(f'<path d="M{left} {base}H{width - left}" stroke="#333333"/>')
    parts.append(
        f'<text x="{width / 2}" y="{base + 42}" text-anchor="middle">how late a control tick came, '
        "in ms: from one mark to the next; heights are logarithmic</text>"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222222">'
    )
    return "\n".join([head, *parts, "</svg>", ""])
