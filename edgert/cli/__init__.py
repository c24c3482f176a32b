"""The command line: verbs, streams and exit codes.

The answer goes to stdout, everything else to stderr. Exit codes are those of `edgert.errors`:
0 ok, 1 run-time failure, 2 usage, 3 bad or untrusted file, 4 incompatible device, engine or
session, 5 out of memory or refused beforehand, 6 parity gate failed, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from edgert.cli import make, use
from edgert.errors import EdgertError

INTERRUPTED = 130


class Verbs(click.Group):
    """Verbs in the order of a first session, with a suggestion for a misspelt one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option has a variable: --max-tokens is EDGERT_MAX_TOKENS. "
    "EDGERT_CACHE_DIR moves the cache; NO_COLOR turns colours off.",
)
def cli() -> None:
    """Export small, unusual models and run them on CPUs and Jetson."""


for command in (make.export, use.run, use.inspect, use.verify, use.version):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        cli.main(args=None if arguments is None else list(arguments), standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        click.echo(f"error: {error.format_message()}{where}", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except EdgertError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # The reader (`| head`) has gone; point stdout elsewhere so that the exit is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            raise
        click.echo(f"error: {error.strerror or error}\n  where  {error.filename}", err=True)
        return 1
    return 0
