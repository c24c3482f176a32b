"""selfcheck: whether a bundle does on this device what it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgert.cli.measure import QuietWhileTiming
from edgert.cli.options import BUNDLE, FILE, as_json, common, load_options, option, placement
from edgert.cli.show import hashing, note

if TYPE_CHECKING:
    from edgert.selfcheck import Report


@click.command(epilog="example: edgert selfcheck bundles/smollm2-135m-instruct -o report.json")
@BUNDLE
@option("-o", "--output", type=FILE, metavar="FILE.json", help="Write the report there.")
@option(
    "--expect",
    type=FILE,
    metavar="FILE.json",
    help="A report of the same model from another machine, which this one must agree with.",
)
@placement
@as_json
@common
def selfcheck(bundle: Path, **given: Any) -> None:
    """Check a bundle on this device: parity, halting, sessions, latency, power.

    All variants that the device runs are compared with each other and with themselves, whole and
    step by step; a session is saved and resumed in a fresh process; a small bench is run and
    verified. The exit code is 1 if a check failed. Weights that are wrong in every variant alike
    are not seen without --expect.
    """
    from edgert.bench.result import dumps
    from edgert.bundle import read_manifest
    from edgert.errors import EdgertError
    from edgert.files import write_atomic
    from edgert.selfcheck import selfcheck as check

    total = sum(entry.bytes for entry in read_manifest(bundle).files.values())
    with hashing(total, quiet=given["quiet"]) as advance:
        report = check(
            bundle,
            expect=given["expect"],
            reporter=QuietWhileTiming(given["quiet"]),
            hashed=advance,
            **load_options(given),
        )
    text = dumps(report.to_json())
    if given["output"] is not None:
        write_atomic(given["output"], (text + "\n").encode())
        note(f"── report in {given['output']}", quiet=given["quiet"])
    click.echo(text if given["as_json"] else "\n".join(_table(report)))
    if report.failed:
        names = ", ".join(check.name for check in report.failed)
        raise EdgertError(
            f"this bundle does not do here what it should: {names}",
            where=str(bundle),
            do="copy the bundle again from its source; if that does not help, report it with "
            "the file that -o writes",
        )


def _table(report: Report) -> Iterator[str]:
    """A line for each check."""
    about = report.bundle
    yield f"{about['name']}  {about['chosen']}, identity {about['model_id'][:12]}"
    yield f"{'on':<9} {report.device['name']}, {report.device['machine']}"
    for check in report.checks:
        yield f"{check.name:<9} {check.status:<8} {check.said}"
