"""The command line: verbs, streams and exit codes.

The answer goes to stdout, everything else to stderr. Exit codes are those of `edgert.errors`:
0 ok, 1 run-time failure, 2 usage, 3 bad or untrusted file, 4 incompatible device, engine or
session, 5 out of memory or refused beforehand, 6 parity gate failed, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click

from edgert.cli import (
    build,
    halt,
    health,
    make,
    measure,
    migrate,
    selfcheck,
    sessions,
    solve,
    talk,
    train,
    use,
)
from edgert.errors import EdgertError, OutOfMemory, UsageError

INTERRUPTED = 130


class Verbs(click.Group):
    """Verbs in the order of a first session."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option has a variable: --max-tokens is EDGERT_MAX_TOKENS; one that may be "
    "repeated takes its values from there separated by spaces. "
    "EDGERT_CACHE_DIR moves the cache; EDGERT_NATIVE=0 leaves edgert's own kernels unused; "
    "NO_COLOR turns colours off.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Export small, unusual models and run them on CPUs and Jetson."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(UsageError.exit_code)


for command in (
    train.train,
    make.export,
    build.build,
    talk.run,
    talk.chat,
    solve.solve,
    sessions.session,
    migrate.migrate,
    use.inspect,
    use.verify,
    measure.bench,
    measure.compare,
    selfcheck.selfcheck,
    halt.halt,
    health.evaluate,
    health.doctor,
    health.recipes,
    health.completion,
    use.version,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    With --debug (or EDGERT_DEBUG) a failure is raised instead, for its traceback.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in given or os.environ.get("EDGERT_DEBUG", "0") not in ("", "0", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character
    try:
        code: object = cli.main(args=given, prog_name="edgert", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        click.echo(f"error: {error.format_message()}{where}", err=True)
        return UsageError.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as end:  # how click reports a broken pipe, and ends shell completion
        return _reader_gone() if end.code else 0
    except Exception as error:
        if debug:
            raise
        known = _as_edgert_error(error)
        click.echo(f"error: {known}", err=True)
        return known.exit_code
    return code if isinstance(code, int) else 0


def _as_edgert_error(error: Exception) -> EdgertError:
    if isinstance(error, EdgertError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory(f"out of memory: {error}", do="close other programs, or add swap")
    if isinstance(error, OSError):
        where = None if error.filename is None else str(error.filename)
        return EdgertError(f"{error.strerror or error}", where=where)
    return EdgertError(
        f"{type(error).__name__}: {error}",
        where="inside edgert: this should not happen",
        do="run the command again with --debug, and report what it shows",
    )


def _reader_gone() -> int:
    """The reader (`| head`) has left; point stdout elsewhere so that the exit is silent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 1
