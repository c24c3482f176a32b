"""bench and compare: how fast, how large, and whether that is the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import F, as_json, common, halt, load_options, option, placement, speculate
from edgert.cli.show import LABEL, TerminalReporter, hashing, progress_bar
from edgert.progress import Advance

if TYPE_CHECKING:
    from edgert.bench.run import Expected

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))


def count(*names: str, least: int, default: int, help: str) -> Callable[[F], F]:
    return option(
        *names,
        type=click.IntRange(least),
        default=default,
        metavar="N",
        show_default=True,
        help=help,
    )


@click.command(epilog="example: edgert bench bundles/smollm2-135m-instruct -p 256 -n 128")
@BUNDLE
@count("-p", "--prompt-tokens", least=1, default=128, help="Length of the prompt.")
@count("-n", "--gen-tokens", least=1, default=64, help="Length of the answer.")
@count("-d", "--depth", least=0, default=0, help="Tokens in the state before the prompt.")
@count("-r", "--repeats", least=1, default=5, help="Timed requests.")
@count("--warmup", least=0, default=1, help="Requests before them that are not timed.")
@option("--no-cold-start", is_flag=True, help="Do not start fresh processes.")
@option(
    "--reference",
    metavar="HASH|FILE",
    help="The answer's SHA-256, or an earlier bench's JSON: another answer is a failure.",
)
@option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Write a page with plots; it opens without a network.",
)
@halt
@speculate("off")
@placement
@as_json
@common
def bench(bundle: Path, **given: Any) -> None:
    """Measure a bundle: first token, between tokens, start, memory, power.

    The prompt is the same in every run, sampling is greedy, and the loop is the one that `run`
    uses. The tokens that were timed are verified afterwards on another path of the bundle; where
    they differ there are no figures, and the exit code is 6.
    """
    from edgert.bench.card import card
    from edgert.bench.plan import Plan
    from edgert.bench.result import dumps
    from edgert.bench.run import Placement
    from edgert.bench.run import bench as measure
    from edgert.bundle import read_manifest
    from edgert.programs import solves_puzzles

    plan = Plan(
        n_prompt=given["prompt_tokens"],
        n_gen=given["gen_tokens"],
        n_depth=given["depth"],
        repeats=given["repeats"],
        warmup=given["warmup"],
        halt=given["halt"],
        speculate=given["speculate"] or "off",
    )
    chosen = Placement(**load_options(given))
    expected = _expected(given["reference"], plan) if given["reference"] else None
    manifest = read_manifest(bundle)
    if manifest.solves:
        raise solves_puzzles(str(bundle))
    total = sum(entry.bytes for entry in manifest.files.values())
    with hashing(total, quiet=given["quiet"]) as advance:
        result = measure(
            bundle,
            plan,
            chosen,
            cold=not given["no_cold_start"],
            expected=expected,
            reporter=QuietWhileTiming(given["quiet"]),
            hashed=advance,
        )
    if given["report"]:
        from edgert.bench.page import page
        from edgert.files import write_atomic

        write_atomic(given["report"], page(result).encode())
    click.echo(dumps(result) if given["as_json"] else card(result))


def _expected(given: str, plan: Any) -> Expected:
    """--reference: a hash, or the hash of an earlier bench of the same lengths."""
    from edgert.bench.result import read_result
    from edgert.bench.run import Expected
    from edgert.errors import Incompatible

    if re.fullmatch(r"[0-9a-f]{64}", given):
        return Expected(given, "--reference")
    path = Path(given)
    if not path.exists():
        raise click.UsageError(
            f"--reference wants 64 hex digits or an earlier bench's JSON file, not {given!r}"
        )
    earlier = read_result(path)
    differ = [
        f"{name}: {earlier[name]} there, {getattr(plan, name)} here"
        for name in ("n_prompt", "n_gen", "n_depth")
        if earlier[name] != getattr(plan, name)
    ]
    if differ:
        raise Incompatible(
            "\n  - ".join(["the reference was made with other lengths:", *differ]),
            where=given,
            do="measure with its lengths, or give another reference",
        )
    return Expected(earlier["output_sha256"], given)


class QuietWhileTiming(TerminalReporter):
    """A bar that is drawn only between two requests: no thread of its own beside a timed one."""

    @contextmanager
    def stage(self, label: str, text: str, total: int | None = None) -> Iterator[Advance]:
        if self.quiet:
            yield lambda amount: None
            return
        bar = progress_bar(total)
        bar.live.auto_refresh = False
        with bar:
            task = bar.add_task(f"{label:<{LABEL}}{text}", total=total)
            bar.refresh()

            def advance(amount: int) -> None:
                bar.advance(task, amount)
                bar.refresh()

            yield advance
        self.line(label, text)


@click.command(epilog="example: edgert compare before.json after.json")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@as_json
@common
def compare(a: Path, b: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Set bench B against bench A: both are files that `bench --json` printed.

    Refused are runs that did not measure the same thing: another model, precision, length, batch,
    number of threads, prompt, sampling or kind of device. The exit code is 4 then. Versions,
    backends and lowerings may differ: that is what one compares.
    """
    from edgert.bench.compare import check_comparable, table
    from edgert.bench.compare import compare as compared
    from edgert.bench.result import dumps, read_result

    left, right = read_result(a), read_result(b)
    check_comparable(left, right, f"{a} and {b}")
    click.echo(dumps(compared(left, right)) if as_json else table(left, right))
