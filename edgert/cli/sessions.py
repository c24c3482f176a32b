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
    from edgert.solving import Solving
    from edgert.solvingfile import SavedSolving

SESSION = click.argument("file", type=FILE)
OPTIONAL_BUNDLE = click.argument("bundle", type=FILE, required=False)
_LOADING: dict[str, Any] = {
    "device": "auto",
    "quiet": True,
    **dict.fromkeys(("precision", "kv", "lowering", "variant", "threads", "low_memory")),
}


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
    from edgert.sessionfile import SavedSession

    saved = _read(file, key_options(given))
    sequence = isinstance(saved, SavedSession)
    facts = _common(file, saved) | {"kind": "session" if sequence else "solving"}
    facts |= _facts(saved) if isinstance(saved, SavedSession) else _solving_facts(saved)
    if as_json:
        print_json(facts)
        return
    first, rest = (_lines if sequence else _solving_lines)(facts)
    lines = {
        "session": f"{file}  {size(facts['bytes'])}, {first}",
        "bundle": f"{saved.bundle.name} {saved.bundle.variant} ({saved.bundle.variant_id[:12]})",
        "last at": saved.bundle.path or "not recorded",
        "written": f"{saved.created} by {saved.written_by}",
        "place": ", ".join(f"{name} {value}" for name, value in saved.place.items()),
        **rest,
    }
    click.echo("\n".join(f"{name:<10}{text}" for name, text in lines.items()))


def _read(file: Path, keys: dict[str, Any]) -> SavedSession | SavedSolving:
    """What a session file of either kind holds."""
    from edgert.sessionfile import saved_session
    from edgert.sessionstore import SESSION, read_stored
    from edgert.solvingfile import saved_solving
    from edgert.vault import key_from

    key = key_from(keys.get("passphrase"), keys.get("key_file"))
    stored = read_stored(file, key, "take an older copy, or start anew")
    return saved_session(stored, file) if stored.kind == SESSION else saved_solving(stored, file)


def _lines(facts: dict[str, Any]) -> tuple[str, dict[str, str]]:
    request, moves = facts["request"], facts["moves"]
    lines = {
        "answer": "none yet" if request is None else _settings(request),
        "state": f"{facts['n_states']} states, {size(facts['state_bytes'])}, room for "
        f"{facts['capacity']} tokens",
        "data": ", ".join(facts["data"]) or "none",
    }
    if moves:
        lines["moved"] = _move(moves[-1])
    return f"{facts['n_session']} tokens", lines


def _move(move: dict[str, Any]) -> str:
    from edgert.cli.migrate import drift

    apart = drift(move["max_abs"], move["kl"], move["top1"])
    return f"at {move['tokens']} tokens, from {move['variant']}, state {move['how']}: {apart}"


def _solving_lines(facts: dict[str, Any]) -> tuple[str, dict[str, str]]:
    spent = f"{facts['iterations']} iterations, {facts['seconds'] * 1e3:.1f} ms so far"
    return f"{facts['n_puzzles']} puzzle{'s' * (facts['n_puzzles'] != 1)}", {
        "puzzles": f"{facts['n_done']} done, {facts['n_in_loop']} in the loop, "
        f"{facts['n_waiting']} waiting",
        "policy": f"{facts['halt']}, at most {facts['batch']} in the loop; {spent}",
        "state": size(facts["state_bytes"]),
    }


def _settings(request: dict[str, Any]) -> str:
    params = request["params"]
    how = "greedy" if params["temperature"] == 0 else f"temperature {params['temperature']:g}"
    end = request["finish_reason"] or "left before its end"
    return f"{request['n_gen']} tokens so far, {end}; {how}, seed {params['seed']}"


def _common(file: Path, saved: SavedSession | SavedSolving) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "bundle": asdict(saved.bundle),
        "place": saved.place,
        "written_by": saved.written_by,
        "created": saved.created,
    }


def _solving_facts(saved: SavedSolving) -> dict[str, Any]:
    done = len(saved.answers.index)
    return {
        "n_puzzles": len(saved.ids),
        "n_done": done,
        "n_in_loop": saved.waiting - done,
        "n_waiting": len(saved.ids) - saved.waiting,
        "halt": saved.policy,
        "batch": saved.batch,
        "iterations": saved.iterations,
        "seconds": saved.ns / 1e9,
        "graph_seconds": saved.graph_ns / 1e9,
        "state_bytes": sum(array.nbytes for array in saved.seats.carry.values()),
    }


def _facts(saved: SavedSession) -> dict[str, Any]:
    from dataclasses import asdict

    request = saved.request
    return {
        "n_session": int(saved.tokens.size),
        "capacity": saved.capacity,
        "n_states": len(saved.states),
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
        "moves": [asdict(move) for move in saved.moves],
    }


@session.command(epilog="example: edgert session verify story.session")
@SESSION
@OPTIONAL_BUNDLE
@key
@as_json
@common
def verify(file: Path, bundle: Path | None, as_json: bool, **given: Any) -> None:
    """Prove that a session is whole and can be resumed on its bundle: it is, here and now."""
    from edgert.sessionfile import SavedSession

    keys = key_options(given)
    sequence = isinstance(_read(file, keys), SavedSession)
    found: Session | Solving
    with (_resumed if sequence else _resumed_solving)(file, bundle, keys) as found:
        name, variant = found.model.manifest.name, found.model.runner.variant_name
        count, notes = _count(found), found.notes
        where = str(found.model.bundle.root)
    nbytes, what = file.stat().st_size, "tokens" if sequence else "puzzles"
    if as_json:
        facts: dict[str, Any] = {"verified": True, "bundle": where, "variant": variant}
        facts["n_session" if sequence else "n_puzzles"] = count
        print_json(facts | {"bytes": nbytes, "notes": list(notes)})
        return
    exact = "resumes bit for bit here" if not notes else "within tolerance: " + ", ".join(notes)
    click.echo(f"ok  {name} {variant} · {count} {what} · {size(nbytes)} · {exact}")


def _count(found: Session | Solving) -> int:
    from edgert.session import Session

    return len(found.tokens) if isinstance(found, Session) else len(found.ids)


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
    from edgert.cli.resumed import resumed

    return resumed(file, bundle, _LOADING, keys)


def _resumed_solving(file: Path, bundle: Path | None, keys: dict[str, Any]) -> Solving:
    from edgert.cli.resumed import resumed_solving

    return resumed_solving(file, bundle, _LOADING | {"deadline_ms": None}, keys)


def _written(session: Session, output: Path, keys: dict[str, Any]) -> None:
    nbytes = session.save(output, **keys)
    click.echo(f"session   {output}  {size(nbytes)}, {len(session.tokens)} tokens")
