"""session: what a saved session is, whether it is sound, and copies of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import FILE, as_json, common, key, key_options, option
from edgert.cli.show import print_json, size

if TYPE_CHECKING:
    from edgert.session import Session
    from edgert.sessionfile import SavedSession

SESSION = click.argument("file", type=FILE)
OPTIONAL_BUNDLE = click.argument("bundle", type=FILE, required=False)


@click.group()
def session() -> None:
    """Look at, check, cut and copy saved sessions."""


@session.command(epilog="example: edgert session info story.session")
@SESSION
@key
@as_json
@common
def info(file: Path, as_json: bool, **given: Any) -> None:
    """What a session file holds; its bundle is not needed."""
    from edgert.sessionfile import read_session
    from edgert.vault import key_from

    keys = key_options(given)
    saved = read_session(file, key_from(keys.get("passphrase"), keys.get("key_file")))
    facts = _facts(file, saved)
    if as_json:
        print_json(facts)
        return
    request = facts["request"]
    settings = "none yet" if request is None else _settings(request)
    lines = {
        "session": f"{file}  {size(facts['bytes'])}, {facts['n_session']} tokens",
        "bundle": f"{saved.bundle.name} {saved.bundle.variant} ({saved.bundle.variant_id[:12]})",
        "last at": saved.bundle.path or "not recorded",
        "written": f"{saved.created} by {saved.written_by}",
        "place": ", ".join(f"{name} {value}" for name, value in saved.place.items()),
        "answer": settings,
        "state": f"{len(saved.states)} states, {size(facts['state_bytes'])}, room for "
        f"{saved.capacity} tokens",
        "data": ", ".join(saved.data) or "none",
    }
    click.echo("\n".join(f"{name:<10}{text}" for name, text in lines.items()))


def _settings(request: dict[str, Any]) -> str:
    params = request["params"]
    how = "greedy" if params["temperature"] == 0 else f"temperature {params['temperature']:g}"
    end = request["finish_reason"] or "left before its end"
    return f"{request['n_gen']} tokens so far, {end}; {how}, seed {params['seed']}"


def _facts(file: Path, saved: SavedSession) -> dict[str, Any]:
    from dataclasses import asdict

    request = saved.request
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "bundle": asdict(saved.bundle),
        "place": saved.place,
        "written_by": saved.written_by,
        "created": saved.created,
        "n_session": int(saved.tokens.size),
        "capacity": saved.capacity,
        "state_bytes": sum(array.nbytes for array in saved.states.values()),
        "pending": saved.pending is not None,
        "stream": saved.stream,
        "forks": saved.forks,
        "request": request
        and {
            "params": asdict(request.params),
            "n_gen": int(saved.tokens.size) - request.start,
            "finish_reason": request.finish_reason,
        },
        "data": saved.data,
    }


@session.command(epilog="example: edgert session verify story.session")
@SESSION
@OPTIONAL_BUNDLE
@key
@as_json
@common
def verify(file: Path, bundle: Path | None, as_json: bool, **given: Any) -> None:
    """Prove that a session is whole and can be resumed on its bundle: it is, here and now."""
    with _resumed(file, bundle, key_options(given)) as found:
        name, variant = found.model.manifest.name, found.model.runner.variant_name
        count, notes = len(found.tokens), found.notes
        where = str(found.model.bundle.root)
    nbytes = file.stat().st_size
    if as_json:
        facts = {"verified": True, "bundle": where, "variant": variant, "n_session": count}
        print_json(facts | {"bytes": nbytes, "notes": list(notes)})
        return
    exact = "resumes bit for bit here" if not notes else "within tolerance: " + ", ".join(notes)
    click.echo(f"ok  {name} {variant} · {count} tokens · {size(nbytes)} · {exact}")


output = option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    metavar="FILE",
    help="The session file to write.",
)


@session.command(epilog="example: edgert session trim story.session 40 -o start.session")
@SESSION
@click.argument("position", type=click.IntRange(0))
@OPTIONAL_BUNDLE
@output
@key
@common
def trim(file: Path, position: int, bundle: Path | None, output: Path, **given: Any) -> None:
    """Cut a session at POSITION, so that it has that many tokens."""
    keys = key_options(given)  # once: it may ask on the terminal
    with _resumed(file, bundle, keys) as found:
        found.trim(position)
        _written(found, output, keys)


@session.command(epilog="example: edgert session fork story.session -o other.session")
@SESSION
@OPTIONAL_BUNDLE
@output
@key
@common
def fork(file: Path, bundle: Path | None, output: Path, **given: Any) -> None:
    """Copy a session so that it goes on with random draws of its own."""
    keys = key_options(given)
    with _resumed(file, bundle, keys) as found:
        with found.fork() as other:
            _written(other, output, keys)
        found.save(file, **keys)  # it knows now that it was forked once more


def _resumed(file: Path, bundle: Path | None, keys: dict[str, Any]) -> Session:
    from edgert.cli.talk import resumed

    unset = dict.fromkeys(("precision", "lowering", "variant", "threads", "low_memory"))
    loading = {"device": "auto", "quiet": True, **unset}
    return resumed(file, bundle, loading, keys)


def _written(session: Session, output: Path, keys: dict[str, Any]) -> None:
    nbytes = session.save(output, **keys)
    click.echo(f"session   {output}  {size(nbytes)}, {len(session.tokens)} tokens")
