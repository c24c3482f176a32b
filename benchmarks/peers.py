"""edgert beside llama.cpp, ONNX Runtime GenAI, OpenVINO GenAI and torch: the same weights, tokens
and threads, on this machine, in one command.

    python benchmarks/peers.py [--sides edgert-int4,genai-int4,...] [--rounds 5] [--resume]

Each side is set up in an environment of its own under the cache. Each round runs every side once,
each in a process of its own, in turning order. Before anything is reported, tokens are compared
where sides compute the same, and the perplexity of each says that it computes the model. See
benchmarks/README.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from peers_goals import ACCEPTED, MET
from peers_page import goal_threads, page, show, summary
from peers_report import REFERENCE, Work
from peers_rounds import Plan, Results, Rounds
from runtimes.setups import PEERS, Bundles, Side, export_bundle, set_up
from runtimes.workshop import Workshop

from edgert.bundle import Bundle
from edgert.errors import EdgertError, UsageError
from edgert.files import write_atomic
from edgert.machine import instruction_set
from edgert.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WINDOW = 512
LEAN = "edgert-int4-lean"
LEAN_RECIPE = ROOT / "export" / "smollm2-135m-lean.toml"
PICTURED = {"prompt": 256, "depth": 512}


def note(text: str) -> None:
    click.echo(text, err=True)


def thread_counts(text: str) -> tuple[int, ...]:
    """'1,2' -> (1, 2). Raises UsageError."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1 or len(set(counts)) != len(counts):
        raise UsageError(f"--threads {text!r} is not a list of different numbers", do="such as 1,2")
    return counts


def side_names(asked: str | None, precisions: list[str]) -> list[str]:
    """The sides to compare, edgert's first. Raises UsageError for one that there is not."""
    ours = [f"edgert-{precision}" for precision in precisions]
    known = [*ours, *([LEAN] if "int4" in precisions else []), *PEERS]
    mapped = [f"{name}-mapped" for name in ours]
    names = known if asked is None else asked.split(",")
    unknown = [name for name in names if name not in (*known, *mapped)]
    if unknown or len(set(names)) != len(names):
        raise UsageError(
            f"--sides: {', '.join(unknown) or 'one is named twice'}",
            do=f"choose from {', '.join([*known, *mapped])}",
        )
    return sorted(names, key=lambda name: not name.startswith("edgert-"))


def text_ids(bundle: Bundle, text: str, least: int) -> list[int]:
    """The ids of a text. Raises UsageError if there are fewer than `least`."""
    spec = bundle.manifest.tokenizer
    if spec is None:
        raise UsageError("this bundle has no tokenizer", where=str(bundle.root))
    ids = load_tokenizer(spec, bundle.path(spec.file) if spec.file else None).encode(text)
    if len(ids) < least:
        raise UsageError(
            f"the text has {len(ids)} tokens, not {least}", do="give a longer one: --text FILE"
        )
    return ids


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    cpu = "not known"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith(("model name", "hardware")):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "instructions": instruction_set(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
    }


def set_up_all(
    shop: Workshop, names: list[str], bundles: Bundles
) -> tuple[dict[str, Side], dict[str, str]]:
    """Sides, and why others are not to be had."""
    sides, missing = {}, {}
    for name in names:
        try:
            sides[name] = set_up(shop, name, bundles)
        except (EdgertError, OSError) as error:
            missing[name] = str(error)
            note(f"{name} is left out: {error}")
    return sides, missing


def manifest_hash(bundle: Path) -> str:
    return hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


def write(path: Path, text: str) -> None:
    write_atomic(path, text.encode())


@click.command()
@click.option("--sides", metavar="LIST", help="Such as edgert-int4,genai-int4 (default: all).")
@click.option("--precision", default="fp32,int8,int4", show_default=True, metavar="LIST")
@click.option(
    "--bundle",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Of these precisions (default: exported into the cache).",
)
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    default=ROOT / "export" / "smollm2-135m-instruct.toml",
    help="What is exported, or --bundle was (default: the recipe of SmolLM2-135M-Instruct).",
)
@click.option(
    "--lean",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help=f"The bundle of {LEAN} (default: its recipe's, exported into the cache).",
)
@click.option("--threads", default="1,2", show_default=True, metavar="LIST")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--repeats", type=click.IntRange(1, 100), default=1, show_default=True)
@click.option(
    "--attempts",
    type=click.IntRange(1, 10),
    default=3,
    show_default=True,
    help="How often a side that others disturbed is measured.",
)
@click.option(
    "--patience",
    type=click.FloatRange(0, 3600),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="Before each process, wait at most so long for others to leave the machine alone.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=HERE / "text.txt",
    help="The prompt, and what perplexity is measured on (default: benchmarks/text.txt).",
)
@click.option("--cache", type=click.Path(path_type=Path), default=ROOT / ".cache" / "benchmarks")
@click.option("--resume", is_flag=True, help="Keep what the same run has measured before.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--markdown", "page_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Picture (SVG).")
@click.option("--strict", is_flag=True, help="Exit with 1 unless every goal is met.")
def main(
    sides: str | None,
    precision: str,
    bundle: Path | None,
    source: Path,
    lean: Path | None,
    threads: str,
    rounds: int,
    repeats: int,
    attempts: int,
    patience: float,
    text: Path,
    cache: Path,
    resume: bool,
    json_file: Path | None,
    page_file: Path | None,
    plot: Path | None,
    strict: bool,
) -> None:
    """Compare edgert with other runtimes: speed, start, memory, perplexity."""
    try:
        names = side_names(sides, precision.split(","))
        counts, work, cache = thread_counts(threads), Work(), cache.resolve()
        bundle = (bundle or export_bundle(cache, source, precision, note)).resolve()
        if LEAN in names:
            lean = (lean or export_bundle(cache, LEAN_RECIPE, None, note)).resolve()
        opened = Bundle.open(bundle, True)
        ids = text_ids(opened, text.read_text(encoding="utf-8"), work.capacity())
        shop = Workshop(cache, source, opened.manifest.weights_id, note)
        scored = names if REFERENCE in names else [*names, REFERENCE]
        ready, missing = set_up_all(shop, scored, Bundles(bundle, lean))
        if not any(name in ready for name in names):
            raise EdgertError("no side could be set up", do="see the reasons above")
        plan = Plan(ids, work, WINDOW, counts, rounds, repeats, attempts, patience)
        about: dict[str, Any] = {
            "machine": machine(),
            "manifests": [manifest_hash(path) for path in (bundle, lean) if path],
            "ids": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
            "plan": {"work": asdict(work), "window": WINDOW, "repeats": repeats},
            "sides": {name: side.facts() for name, side in ready.items()},
        }
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        results = Results(cache / "runs" / f"{key}.json", about, resume)
        run = Rounds(plan, ready, names, cache / "workers.log", note)
        try:
            run.run(results)
        except KeyboardInterrupt:
            note("interrupted; the same command with --resume goes on. So far:")
    except EdgertError as error:
        note(f"error: {error}")
        sys.exit(error.exit_code)
    facts = {name: about["sides"][name] for name in run.timed}
    found = summary(results, plan, facts, missing | run.failed)
    show(found)
    if json_file is not None:
        write(json_file, json.dumps(asdict(found) | {"rounds": results.rounds}, indent=1) + "\n")
    if page_file is not None:
        write(page_file, page(found))
    if plot is not None:
        from peers_picture import picture

        at = goal_threads(plan)
        picture(found.sides, found.table[at], plot, threads=at, **PICTURED)
    missed = strict and any(goal.verdict not in (MET, ACCEPTED) for goal in found.goals)
    sys.exit(1 if found.wrong or run.failed or missed else 0)


if __name__ == "__main__":
    main()
