"""The report: one page that opens without a network, in light and in dark.

No script, no font, no image is loaded from anywhere; the JSON object is part of the page. Every
text of the result is escaped: a model's name comes from a bundle, which comes from anyone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgert.bench import svg
from edgert.bench.card import card, megabytes, milliseconds, place, power_text, speed
from edgert.bench.measure import PARTS

_STYLE = (
    svg.STYLE
    + """\
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:980px;margin:0 auto;padding:32px 20px 56px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 2px}
p{margin:0 0 12px;color:var(--soft)}
section{background:var(--panel);border:1px solid var(--rule);border-radius:10px;
padding:18px 20px;margin-top:16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:12px;
margin-top:20px}
.tile{background:var(--panel);border:1px solid var(--rule);border-radius:10px;padding:12px 16px}
.tile b{display:block;font-size:22px;font-weight:600;line-height:1.25;white-space:nowrap}
.tile b small{font-size:14px;font-weight:400;color:var(--soft)}
.tile span{color:var(--soft);font-size:13px}
.ok{color:var(--p4);font-weight:600}
svg{display:block;width:100%;height:auto;margin-top:6px}
.legend{display:flex;flex-wrap:wrap;gap:6px 20px;margin-top:10px;font-size:13.5px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.legend b{font-weight:600}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
td,th{padding:5px 10px 5px 0;border-top:1px solid var(--rule);text-align:left;
vertical-align:top;overflow-wrap:anywhere}
tr:first-child>*{border-top:0}
th{font-weight:400;color:var(--soft);width:190px;overflow-wrap:normal}
table.figures td,table.figures th{text-align:right;width:auto}
table.figures th:first-child{text-align:left}
pre{overflow:auto;margin:8px 0 0;font:12.5px/1.45 ui-monospace,Menlo,Consolas,monospace}
summary{cursor:pointer}
"""
)

_DECLARED = {
    "model": ("name", "model_params", "model_id"),
    "variant": ("variant", "variant_id"),
    "placement": ("placement", "device_name", "machine"),
    "work": ("n_prompt", "n_gen", "n_depth", "n_batch", "repeats", "warmup"),
    "prompt": ("prompt_source", "prompt_sha256"),
    "sampling": ("sampling",),
    "cache": ("cache_state", "prefix_reuse", "low_memory"),
    "clocks": ("governor", "clocks", "temp_c", "nvpmodel", "throttled"),
    "machine load": ("others_cpus", "n_cpus"),
    "versions": ("version", "python", "backend", "kernels"),
    "measured": ("test_time",),
    "output": ("output_sha256",),
}
_FIGURES = ("p50", "p90", "p95", "p99", "max", "min", "avg", "std", "count")


def page(result: Mapping[str, Any]) -> str:
    """The whole HTML document."""
    r = result
    title = f"{r['name']} {r['variant']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(r['backend'])} · {escape(place(r))} · {escape(r['cache_state'])} · "
        f'<span class="ok">verified ✓</span> · {escape(r["test_time"])}</p>',
        _tiles(r),
        *_between(r),
        _section(
            "Where a request goes",
            f"Mean of {r['repeats']} requests of {milliseconds(r['where_ms']['wall'])}; the four "
            f"named parts are {r['where_ms']['share'] * 100:.1f} % of it.",
            _parts({part: r["where_ms"][part] for part in (*PARTS, "other")}, "where it goes"),
        ),
        *_start(r),
        _section("Latency", "Milliseconds; percentiles are interpolated.", _figures(r)),
        _section("Memory and power", "", _memory(r)),
        _section("Declared and verified", _verified(r), _declared(r)),
        _details("The card", card(r)),
        _details("The JSON object", json.dumps(r, indent=1, ensure_ascii=False, allow_nan=False)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)} · edgert bench</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _section(title: str, text: str, content: str) -> str:
    note = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>"


def _details(title: str, text: str) -> str:
    return (
        f"<section><details><summary>{escape(title)}</summary><pre>{escape(text)}</pre>"
        "</details></section>"
    )


def _tiles(r: Mapping[str, Any]) -> str:
    itl, cold, memory = r["itl_ms"], r["cold_start_ms"], r["memory"]
    tiles = [
        ("first token, p50", f"{r['ttft_ms']['p50']:.1f}", "ms"),
        ("between tokens, p50", f"{itl['p50']:.2f}" if itl else "–", "ms"),
        ("decode", speed(r["avg_ts"]), "tok/s"),
        ("prefill", speed(r["prefill"]["avg_ts"]), "tok/s"),
        ("cold start", f"{cold['total']:.0f}" if cold else "–", "ms"),
        ("peak memory", megabytes(memory["peak"]) if memory else "–", "MB"),
    ]
    cells = (
        f'<div class="tile"><b>{value} <small>{unit}</small></b><span>{name}</span></div>'
        for name, value, unit in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _between(r: Mapping[str, Any]) -> list[str]:
    """The two plots of the times between tokens; none where there was only one token."""
    samples: Sequence[Sequence[float]] = r["itl_samples_ms"]
    if r["itl_ms"] is None:
        return []
    over = svg.band(samples, x="token", y="ms", label="milliseconds between tokens over position")
    marks = {name: r["itl_ms"][name] for name in ("p50", "p90", "p99")}
    pooled = [value for row in samples for value in row]
    often = svg.histogram(pooled, marks, x="ms", label="how often which time between tokens")
    return [
        _section(
            "Between tokens, over position",
            f"Line: median of {r['repeats']} requests at this token. Band: fastest to slowest.",
            over,
        ),
        _section("Between tokens, how often", f"{len(pooled)} times of all requests.", often),
    ]


def _start(r: Mapping[str, Any]) -> list[str]:
    cold = r["cold_start_ms"]
    if cold is None:
        return []
    stages = ("import", "verify", "graphs", "tokenizer", "first_token")
    text = (
        f"{cold['total']:.0f} ms, the median of {cold['starts']} starts: {cold['cache_state']}. "
        "Load is verify + graphs + tokenizer, which is read beside the graphs."
    )
    values = {stage.replace("_", " "): cold[stage] for stage in stages}
    return [_section("From process start to the first token", text, _parts(values, "cold start"))]


def _parts(values: Mapping[str, float], label: str) -> str:
    entries = (
        f'<span><i style="background:var(--p{number})"></i>{escape(name)} '
        f"<b>{milliseconds(value)}</b></span>"
        for number, (name, value) in enumerate(values.items(), 1)
    )
    return svg.parts(values, label=label) + f'<div class="legend">{"".join(entries)}</div>'


def _figures(r: Mapping[str, Any]) -> str:
    names = {"first token": "ttft_ms", "between tokens": "itl_ms", "request": "request_latency_ms"}
    head = "".join(f"<th>{name}</th>" for name in _FIGURES)
    rows = [f"<tr><th></th>{head}</tr>"]
    for label, key in names.items():
        if r[key] is not None:
            cells = (f"{r[key][n]:.0f}" if n == "count" else f"{r[key][n]:.2f}" for n in _FIGURES)
            rows.append(f"<tr><th>{label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<table class="figures">{"".join(rows)}</table>'


def _memory(r: Mapping[str, Any]) -> str:
    rows = {}
    if r["memory"]:
        rows = {name: f"{megabytes(value)} MB" for name, value in r["memory"].items()}
    else:
        rows = {"memory": "not measured"}
    return _table(rows | {"power": power_text(r)})


def _verified(r: Mapping[str, Any]) -> str:
    reference = r["reference"]
    return (
        f"All {r['repeats']} timed answers are equal, and {reference['compared']} of their "
        f"{r['n_gen']} tokens are those of {reference['path']}; {reference['unclear']} lie where "
        f"it leads by less than {reference['margin']:g}."
    )


def _declared(r: Mapping[str, Any]) -> str:
    rows = {}
    for row, keys in _DECLARED.items():
        said = [_said(r, key) for key in keys]
        rows[row] = ("\n" if max(map(len, said)) > 50 else " · ").join(said)
    return _table(rows)


def _said(r: Mapping[str, Any], key: str) -> str:
    value = r[key]
    if isinstance(value, dict):
        value = ", ".join(f"{name} {item}" for name, item in value.items())
    elif isinstance(value, float):
        value = f"{value:.2f}"
    return f"{key}: {'not readable' if value is None else value}"


def _table(rows: Mapping[str, str]) -> str:
    cells = (
        f"<tr><th>{escape(name)}</th><td>{escape(text).replace(chr(10), '<br>')}</td></tr>"
        for name, text in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"
