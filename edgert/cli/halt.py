"""halt: how early a model's loop may end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.measure import BUNDLE, count
from edgert.cli.options import as_json, common, option, placement
from edgert.cli.show import print_json, progress_bar

if TYPE_CHECKING:
    from edgert.halting_report import Report


@click.command(epilog="example: edgert halt bundles/deep-tiny --data text.txt")
@BUNDLE
@option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="A text in UTF-8, of the kind that the model is for.",
)
@count("--tokens", least=2, default=2000, help="Tokens of it that are read.")
@count("--window", least=2, default=256, help="Tokens behind each other; the context at most.")
@option(
    "--agreement",
    type=click.FloatRange(0, 1),
    default=0.999,
    show_default=True,
    metavar="SHARE",
    help="Best tokens that must stay those of full depth.",
)
@option(
    "--threshold",
    "thresholds",
    type=click.FloatRange(0),
    multiple=True,
    metavar="X",
    help="A threshold of `settle`; may be repeated (default: a range that the text suggests).",
)
@option("--dry-run", is_flag=True, help="Do not store the report in the bundle.")
@placement
@as_json
@common
def halt(bundle: Path, **given: Any) -> None:
    """Measure how early a model's loop may end, and recommend when.

    Decodes the text with every policy and compares with full depth: iterations, agreement of the
    best token, perplexity, latency. The report goes into the bundle as halting.json, and `--halt
    auto` of run, chat and bench takes what it recommends.
    """
    from edgert.cli.talk import load_bundle
    from edgert.evaluate import read_text
    from edgert.halting_report import store, sweep, to_json

    text = read_text(given["data"])
    with load_bundle(bundle, given) as model:
        window = min(given["window"], model.manifest.context)
        with _bar(quiet=given["quiet"]) as moved:
            report = sweep(
                model,
                text,
                thresholds=given["thresholds"] or None,
                tokens=given["tokens"],
                window=window,
                agreement=given["agreement"],
                progress=moved,
            )
        content = to_json(report, model)
        if not given["dry_run"]:
            store(model.bundle, content)
    if given["as_json"]:
        print_json(content)
        return
    click.echo("\n".join(_halting_card(report)))


def _halting_card(report: Report) -> list[str]:
    full = report.points[0]
    width = max(len(p.policy) for p in report.points) + 2
    lines = [
        f"{'policy':<{width}}{'iterations':>12}{'p95':>6}{'agreement':>12}{'perplexity':>12}"
        f"{'ms a token':>12}{'speed':>8}"
    ]
    for p in report.points:
        chosen = "  <- recommended" if p.policy == report.recommended else ""
        lines.append(
            f"{p.policy:<{width}}{p.iterations_mean:>12.2f}{p.iterations_p95:>6.0f}"
            f"{p.agreement * 100:>10.2f} %{p.perplexity:>12.4f}{p.latency_ms_mean:>12.3f}"
            f"{full.latency_ms_mean / p.latency_ms_mean:>7.2f}x{chosen}"
        )
    line = report.line
    lines += [
        "",
        f"a decode step takes {line.intercept_ms:.3f} + {line.slope_ms:.3f} x iterations ms "
        f"(R² {line.r2:.4f} over 1 to {report.iterations})",
        f"{report.tokens} tokens, windows of {report.window} · skipped iterations filled by "
        f"{report.fill} · {report.placement}",
    ]
    return lines


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over the policies; None where nobody wants one."""
    if quiet:
        yield None
        return
    with progress_bar(0) as bar:
        task = bar.add_task("measuring policies")
        yield lambda done, total: bar.update(task, completed=done, total=total)
