#!/usr/bin/env python3
"""Write docs/cli.md from the command line's own parser; with --check, only say whether it differs.

python scripts/cli_docs.py            writes the page
python scripts/cli_docs.py --check    exit code 1 and a diff if the page is not what it would be
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

import edgert.cli
from edgert.cli import cli
from edgert.cli.health import leaves

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"

HEAD = """\
# The command line

Written by `scripts/cli_docs.py` from the parser: change the options, not this page.

```
pip install -e '.[cpu]'
edgert doctor
```

Results go to stdout, everything else to stderr; `--json` prints exactly one object. `-h` and
`--help` explain every verb."""

VARIABLES = """\
Every option has a variable, named in its table; an option that is given goes before its variable.
A flag's is `1` or `0`; one of an option that may be repeated holds its values separated by spaces.
`edgert doctor` lists those that are set, and says which of them nothing reads. Besides:

| variable | what it does |
|---|---|
| `EDGERT_CACHE_DIR` | where the cache is; else `$XDG_CACHE_HOME/edgert`, else `~/.cache/edgert` |
| `EDGERT_NATIVE` | 0: leave edgert's own kernels unused; avx2, avx512: whatever is newer |
| `EDGERT_PASSPHRASE` | the passphrase of encrypted sessions, without being asked for it |
| `NO_COLOR` | no colours |"""


def page() -> str:
    """All of docs/cli.md."""
    verbs = list(leaves(cli))
    parts = [
        HEAD,
        "\n".join(["| verb | |", "|---|---|", *(_row(verb, command) for verb, command in verbs)]),
        *(part for verb, command in verbs for part in _verb(verb, command)),
        "## Environment",
        VARIABLES,
        "## Exit codes",
        "\n".join(["| code | meaning |", "|---|---|", *_exit_codes()]),
    ]
    return "\n\n".join(parts) + "\n"


def _row(verb: str, command: click.Command) -> str:
    first = _paragraphs(command)[0]
    return f"| [`{verb}`](#{_title(verb).replace(' ', '-')}) | {_cell(first)} |"


def _title(verb: str) -> str:
    return f"edgert {verb}"


def _verb(verb: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=verb)
    usage = " ".join([_title(verb), *command.collect_usage_pieces(context)])
    yield f"## {_title(verb)}"
    yield f"    {usage}"
    yield from map(_prose, _paragraphs(command))
    options = [p for p in command.params if isinstance(p, click.Option)]
    if options:
        head = ["| option | default | variable | |", "|---|---|---|---|"]
        yield "\n".join([*head, *map(_option, options)])
    example = (command.epilog or "").removeprefix("example: ")
    if example:
        yield f"```\n{example}\n```"


def _paragraphs(command: click.Command) -> list[str]:
    text = inspect.cleandoc(command.help or "").split("\f")[0]
    return [" ".join(part.split()) for part in text.split("\n\n")]


def _option(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len))
    value = "" if option.is_flag else f" {_cell(option.metavar or _kind(option))}"
    default = option.default
    shown = isinstance(default, (str, int, float)) and not isinstance(default, bool)
    return (
        f"| {names}{value} | {f'`{default}`' if shown else ''} | `{option.envvar}` | "
        f"{_cell(option.help or '')}{' May be repeated.' * option.multiple}"
        f"{' Required.' * option.required} |"
    )


def _kind(option: click.Option) -> str:
    """What stands for a value that has no name of its own."""
    kind = option.type
    return "|".join(map(str, kind.choices)) if isinstance(kind, click.Choice) else kind.name.upper()


def _cell(text: str) -> str:
    """Text within a table: a bar would end the cell."""
    return _prose(text).replace("|", "\\|")


def _prose(text: str) -> str:
    """Markdown would swallow what stands in angle brackets, and join stars."""
    return re.sub(r"([*<])", r"\\\1", text)


def _exit_codes() -> Iterator[str]:
    """As the docstring of the command line lists them; a test compares it with the errors."""
    said = " ".join((edgert.cli.__doc__ or "").split())
    listed = re.search(r"`edgert\.errors`: (0 .*?)\.(?: |$)", said)
    assert listed, "edgert/cli/__init__.py does not list the exit codes"
    for part in re.split(r", (?=\d+ )", listed[1]):
        code, _, meaning = part.partition(" ")
        yield f"| {code} | {meaning} |"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.stderr.write(__doc__ or "")
        return 2
    wanted = page()
    if not arguments:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    there = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    diff = difflib.unified_diff(
        there.splitlines(), wanted.splitlines(), "docs/cli.md", "the parser", lineterm=""
    )
    lines = list(diff)
    if lines:
        print("\n".join([*lines, "", "write it again: python scripts/cli_docs.py"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
