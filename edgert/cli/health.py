"""doctor, eval, recipes, completion: what this machine can do, how good a model is, what there
is to export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import BUNDLE, FILE, as_json, common, option, placement
from edgert.cli.show import hashing, note, print_json, progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgert.evaluate import Evaluation


@click.command("eval", epilog="example: edgert eval bundles/smollm2-135m-instruct --data book.txt")
@BUNDLE
@option(
    "--data",
    type=FILE,
    required=True,
    metavar="FILE",
    help="A text file, UTF-8, at most 1 GiB.",
)
@option(
    "--window",
    type=click.IntRange(2),
    metavar="N",
    help="Tokens the model sees at once (default: 1024, or its context).",
)
@option(
    "--stride",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens from one window to the next; the rest is context (default: half a window).",
)
@option("--limit", type=click.IntRange(2), metavar="TOKENS", help="Read so many tokens at most.")
@placement
@as_json
@common
def evaluate(bundle: Path, data: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """How well a bundle's model predicts a text: perplexity, and bits per byte.

    Windows slide over the text as in transformers' guide on perplexity: each starts with an empty
    state, the first window - stride tokens are context, and the others are scored, so that each
    token is scored once. A token with nothing before it in its window is not scored; no BOS is put
    before the text. Special-token text in the file is plain text.
    """
    import hashlib
    from dataclasses import asdict
    from math import isfinite

    from edgert.bundle import read_manifest
    from edgert.evaluate import perplexity, read_text
    from edgert.model import load

    text = read_text(data)
    total = sum(entry.bytes for entry in read_manifest(bundle).files.values())
    with hashing(total, quiet=quiet) as advance:
        model = load(
            bundle,
            given["device"],
            precision=given["precision"],
            lowering=given["lowering"],
            threads=given["threads"],
            prepack=not given["low_memory"],
            progress=advance,
        )
    with model:
        with _scoring(quiet) as progress:
            found = perplexity(
                model,
                text,
                window=given["window"],
                stride=given["stride"],
                limit=given["limit"],
                progress=progress,
            )
        place, name, variant = model.placement, model.manifest.name, model.runner.variant_name
        model_id = model.manifest.model_id
    speed = found.tokens / found.seconds
    note(f"── {found.seconds:.1f} s · {speed:.0f} tok/s · {place}", quiet=quiet)
    if not as_json:
        click.echo("\n".join(_explained(found, data)))
        return
    encoded = text.encode()
    value = asdict(found) | {
        "perplexity": found.perplexity if isfinite(found.perplexity) else None,
        "tokens_per_s": speed,
        "first_token": "not scored",
        "data": str(data),
        "data_bytes": len(encoded),
        "data_sha256": hashlib.sha256(encoded).hexdigest(),
        "bundle": str(bundle),
        "model": name,
        "model_id": model_id,
        "variant": variant,
        "placement": place,
    }
    print_json(value)


def _explained(found: Evaluation, data: Path) -> Iterator[str]:
    yield f"perplexity     {found.perplexity:.4f}"
    bits = found.bits_per_byte
    yield f"bits per byte  {'none: these tokens have no text' if bits is None else f'{bits:.4f}'}"
    over = "" if found.bytes is None else f", {found.bytes:,} bytes of text"
    yield f"scored         {found.tokens:,} of {found.read:,} tokens{over}, of {data}"
    yield f"               in a window of {found.window:,} tokens, stride {found.stride:,}"
    least = found.window - found.stride
    if least:
        yield f"               each given {least:,} to {found.window - 1:,} tokens before it,"
        yield "               fewer in the first window; the first token of the text is not scored"
    else:
        yield f"               each given 1 to {found.window - 1:,} tokens before it;"
        yield "               the first token of each window is not scored"


@contextmanager
def _scoring(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with tokens per second and the time that is left."""
    if quiet:
        yield None
        return
    from rich.progress import TextColumn, TimeRemainingColumn

    bar = progress_bar(0)
    speed = TextColumn("{task.fields[speed]}")
    bar.columns = (*bar.columns, speed, TextColumn("left"), TimeRemainingColumn())
    task = bar.add_task("scoring   ", total=None, speed="")

    def progress(done: int, total: int) -> None:
        rate = bar.tasks[0].speed
        said = f"{rate:.0f} tok/s" if rate else ""
        bar.update(task, completed=done, total=total, speed=said)

    with bar:
        yield progress
