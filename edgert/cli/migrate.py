"""migrate: a saved session, moved to another variant of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.options import (
    FILE,
    as_json,
    common,
    key,
    key_options,
    load_options,
    option,
    placement,
)
from edgert.cli.show import hashing, print_json, progress_bar, size
from edgert.progress import Advance

if TYPE_CHECKING:
    from edgert.migrating import Migration


@click.command(
    epilog="example: edgert migrate story.session --to bundles/smollm2-ladder --precision int4 "
    "-o small.session"
)
@click.argument("session", type=FILE)
@option(
    "--to",
    type=FILE,
    required=True,
    metavar="BUNDLE",
    help="A bundle of the session's model; --precision, --kv, --lowering and --variant choose.",
)
@option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    metavar="FILE",
    help="The session file to write.",
)
@option(
    "--replay",
    is_flag=True,
    help="Recompute the state from the tokens, also where the old one could be carried over.",
)
@key
@placement
@as_json
@common
def migrate(session: Path, to: Path, output: Path, as_json: bool, **given: Any) -> None:
    """Move a saved SESSION to another variant of its model: another precision or lowering.

    The state goes along where the new variant lays it out alike. What that changes is measured:
    the new variant reads all tokens, and its own state and next token are compared. Beyond what
    the bundle allows (max_drift; 0.5 nats of KL where it says nothing) nothing is written, and the
    exit code is 4. Where the layouts differ, or with --replay, the recomputed state is taken.

    The old file is not changed. An encrypted session stays encrypted.
    """
    from edgert.migrating import migrate

    with _progress(quiet=given["quiet"]) as (hashed, advanced):
        found = migrate(
            session,
            to,
            output,
            replay=given["replay"],
            advanced=advanced,
            progress=hashed,
            **load_options(given),
            **key_options(given),
        )
    if as_json:
        print_json(_facts(found, session, output))
    else:
        click.echo("\n".join(_lines(found, session, output)))


@contextmanager
def _progress(*, quiet: bool) -> Iterator[tuple[Advance, Callable[[int, int], None] | None]]:
    """A bar for what is hashed, then one for the tokens that are read."""
    if quiet:
        yield lambda amount: None, None
        return
    bar = progress_bar(0)
    task = bar.add_task("reading   ", total=None)
    with ExitStack() as first, ExitStack() as last:
        last.callback(bar.stop)
        hashed = first.enter_context(hashing(None, quiet=quiet))

        def advanced(done: int, total: int) -> None:
            first.close()
            bar.start()
            bar.update(task, completed=done, total=total)

        yield hashed, advanced


def _facts(found: Migration, session: Path, output: Path) -> dict[str, Any]:
    from dataclasses import asdict

    moved = asdict(found.move)
    return {
        "session": str(session),
        "output": str(output),
        "bytes": found.nbytes,
        "n_session": moved.pop("tokens"),
        "name": found.name,
        "from": moved.pop("variant"),
        "from_id": moved.pop("variant_id"),
        "variant": found.variant,
        "variant_id": found.variant_id,
        "furthest": found.state,
        "bound": found.bound,
        **moved,
    }


def _lines(found: Migration, session: Path, output: Path) -> Iterator[str]:
    move = found.move
    yield f"session   {output}  {size(found.nbytes)}, {move.tokens} tokens, from {session}"
    yield f"variant   {found.name} {move.variant} → {found.variant}"
    if move.how == "carried":
        yield "state     carried over"
    else:
        yield f"state     recomputed by {found.variant}"
    yield f"drift     {drift(move.max_abs, move.kl, move.top1)}"
    if move.how == "carried":
        yield f"          {found.bound:g} nats of KL are allowed"


def drift(max_abs: float | None, kl: float | None, top1: bool | None) -> str:
    """How far an old state was from the new variant's own, in words."""
    if top1 is None:
        return "not comparable with the old state"
    parts = [
        "state beyond any number" if max_abs is None else f"max |Δ| of the state {max_abs:.2g}",
        "KL at the next token " + ("not a number" if kl is None else f"{kl:.2g} nats"),
        "the same best token" if top1 else "another best token",
    ]
    return ", ".join(parts)
