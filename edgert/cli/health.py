"""doctor, eval, recipes, completion: what this machine can do, how good a model is, what there
is to export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import BUNDLE, FILE, as_json, common, option, placement
from edgert.cli.show import note, print_json, progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgert.doctor import Row, Setting
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

    from edgert.cli.talk import load_bundle
    from edgert.evaluate import perplexity, read_text

    text = read_text(data)
    with load_bundle(bundle, given | {"quiet": quiet}) as model:
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


@click.command(epilog="example: edgert doctor --json")
@as_json
@common
@click.pass_context
def doctor(context: click.Context, as_json: bool, quiet: bool, debug: bool) -> None:
    """What this machine has of what edgert needs, and what to do about the rest.

    The exit code is 0 if a bundle can run here, and 4 if not. CUDA, TensorRT and the rows about
    Jetson were written after NVIDIA's documentation and tested on file trees and stand-ins of a
    driver: they have not been run on a Jetson or another GPU.
    """
    from edgert._version import __version__
    from edgert.doctor import examine
    from edgert.errors import Incompatible

    report = examine(settings=_settings(context.find_root().command))
    if as_json:
        print_json(
            {
                "edgert": __version__,
                "can_run": not report.lacking,
                "rows": [
                    {"name": r.name, "finding": r.finding, "status": r.status, "do": r.do}
                    for r in report.rows
                ],
                "settings": dict(report.settings),
            }
        )
    else:
        click.echo("\n".join(_table(report.rows)))
    if report.lacking:
        row = report.lacking[0]
        raise Incompatible(f"no bundle can run here: {row.name}: {row.finding}", do=row.do)


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Name, finding, status in columns, and below a row what to do about it."""
    first = max(len(row.name) for row in rows)
    second = min(56, max(len(row.finding) for row in rows))
    for row in rows:
        yield f"{row.name:<{first}}  {row.finding:<{second}}  {row.status}"
        if row.do:
            yield f"{'':<{first}}  do: {row.do}"


SHARED = {
    "EDGERT_DEVICE": "auto",
    "EDGERT_PRECISION": "the bundle's best",
    "EDGERT_KV": "the bundle's best",
    "EDGERT_LOWERING": "the device's fastest",
    "EDGERT_THREADS": "0",
    "EDGERT_LOW_MEMORY": "0",
}
"""Defaults of `placement`, which all verbs that load a bundle share."""


def _settings(root: click.Command) -> list[Setting]:
    """The variables that the command line reads."""
    from edgert.doctor import Setting

    takers: dict[str, list[str]] = {variable: [] for variable in SHARED}
    options: dict[str, click.Option] = {}
    for verb, command in leaves(root):
        for parameter in command.params:
            if isinstance(parameter, click.Option) and isinstance(parameter.envvar, str):
                options.setdefault(parameter.envvar, parameter)
                takers.setdefault(parameter.envvar, []).append(verb)
    found = [
        Setting(
            variable,
            f"{max(options[variable].opts, key=len)} of {', '.join(verbs)}",
            SHARED.get(variable),
            partial(_problem, options[variable]),
        )
        for variable, verbs in takers.items()
    ]
    own = {
        "EDGERT_CACHE_DIR": "where the cache is",
        "EDGERT_NATIVE": "whether edgert's own kernels are used",
        "EDGERT_PASSPHRASE": "of encrypted sessions",
    }
    return found + [Setting(variable, of) for variable, of in own.items()]


def leaves(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Verbs that do something, with the names of the groups they are in: 'session info'."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    for key, inner in command.commands.items():
        yield from leaves(inner, f"{name} {key}".lstrip())


def _problem(option: click.Option, value: str) -> str | None:
    """Why the value of a variable would be refused."""
    from edgert.backends import DEVICES

    if option.name == "device" and value not in DEVICES:
        return f"choose one of: {', '.join(DEVICES)}"
    given = option.type.split_envvar_value(value) if option.multiple else value
    try:
        option.type_cast_value(click.Context(click.Command("doctor")), given)
    except click.UsageError as error:
        return error.message
    return None


@click.command(epilog="example: edgert recipes smollm2-135m-instruct")
@click.argument("name", required=False)
@option("--path", "as_path", is_flag=True, help="Print where the recipe's file is.")
@as_json
@common
def recipes(name: str | None, as_path: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """The recipes that come with edgert; with a NAME, the recipe itself.

    A recipe is exported by its path: edgert export "$(edgert recipes NAME --path)" -o BUNDLE.
    """
    from edgert.recipebook import find, recipes

    if as_path and name is None:
        raise click.UsageError("--path wants the NAME of a recipe")
    found = recipes() if name is None else [find(name)]
    if as_json:
        facts = [
            {"name": e.name, "source": e.source, "makes": e.makes, "path": str(e.path)}
            for e in found
        ]
        print_json({"recipes": facts} if name is None else facts[0] | {"text": found[0].text})
    elif name is None:
        click.echo("\n".join(f"{e.name}  {e.makes}, from {e.source}" for e in found))
    else:
        click.echo(str(found[0].path) if as_path else found[0].text, nl=as_path)


@click.command(epilog="example: edgert completion bash")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
@click.pass_context
def completion(context: click.Context, shell: str, quiet: bool, debug: bool) -> None:
    """Print a script that completes verbs and options in a SHELL.

    bash: put eval "$(edgert completion bash)" into ~/.bashrc; zsh: the same with zsh into ~/.zshrc;
    fish: edgert completion fish > ~/.config/fish/completions/edgert.fish.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, shell
    click.echo(kind(context.find_root().command, {}, "edgert", "_EDGERT_COMPLETE").source())
