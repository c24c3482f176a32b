"""What scripts/aarch64 does on both machines and compares, and the page that says what came out.

Both see one folder: a file that one saves is what the other reads. Bundles are small: two with
random weights, so every token hangs on small differences of logits, and the one that is shipped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

TESTS = Path(__file__).resolve().parent
LOOPED_SOURCE = TESTS / "cases/hagi/model_d/step-00001234.pt"
FROZEN, SHIPPED = TESTS / "frozen/v1", TESTS.parent / "examples/hrm-sudoku4"
IDS = "1,2,3,4,9,33,21,7"
PUZZLES = 60
SAMPLED = ("--temp", 1, "--seed", 5, "--ignore-eos")
POLICY = "settle:1.0"  # random weights hardly settle: with this some tokens end behind two of three
HALTING = f"""
import json, edgert
with edgert.load("looped", variant="VARIANT") as model:
    made = model.generate([{IDS}], max_tokens=24, temperature=1.0, seed=5, halt="{POLICY}")
print(json.dumps({{"tokens": made.tokens, "iterations": made.timings.iterations}}))
"""
KERNELS = f"""
import json, os
import edgert

found = {{}}
for native in ("1", "0"):
    os.environ["EDGERT_NATIVE"] = native
    with edgert.load("decoder", variant="fp32-ort") as model:
        made = model.generate([{IDS}], max_tokens=24, temperature=1.0, seed=5)
        found["kernels of " + model.runner.backend.build["kernels"]] = made.tokens
del os.environ["EDGERT_NATIVE"]
print(json.dumps(found))
"""
"""The same with edgert's kernels and with ONNX Runtime's."""
LADDER = tuple(f"{p}{kv}-ort" for p in ("fp32", "int8", "int4") for kv in ("", "-kv8"))

INTRODUCTION = """# The runtime on aarch64, emulated

Written by `scripts/aarch64`, which made a Debian root for arm64, installed the slim runtime's
aarch64 wheels and this version of edgert into it, and ran the commands below there and on x86-64.
The processor is emulated ({emulator}, as a {cpu}); libraries and their kernels are the real ones.

**What this shows:** the wheels exist and load, the runtime does on aarch64 what it does on x86-64,
and files that one saves the other reads. **What it does not show:** anything about speed (emulated
times mean nothing; none are given), about a GPU, or about a Jetson: nothing here has run on one.

Compared are token ids, answers, halting steps and hashes of answers. Logits are not: kernels of two
processors may differ in the last bits.
"""


class Machine(Protocol):
    name: str

    def python(self, code: str) -> str: ...

    def edgert(self, *words: object) -> dict[str, Any]: ...


def make_bundles(work: Path) -> None:
    """looped: iterations until it settles; decoder: every precision; solver: sudoku; frozen: files
    of format version 1, sessions among them."""
    from tiny_decoder import speaking

    from edgert.export.pipeline import export_source
    from edgert.export.write import ExportOptions, export_bundle

    export_source(LOOPED_SOURCE, work / "looped")
    ladder = ExportOptions("fp32,int8,int4", ("ort",), kv="fp32,int8")
    export_bundle(speaking(), work / "decoder", ladder)
    shutil.copytree(SHIPPED, work / "solver")
    shutil.copytree(FROZEN, work / "frozen")


def write_puzzles(file: Path) -> None:
    from edgert.tasks.sudoku import FOUR
    from edgert.tasks.sudoku_make import make_set

    made = make_set(FOUR, PUZZLES, 7)
    pairs = zip(made.questions, made.answers, strict=True)
    file.write_text("".join(f"{FOUR.text(q)},{FOUR.text(a)}\n" for q, a in pairs))


@dataclass
class Transcript:
    """Sections of the page, and a row for each comparison."""

    say: Callable[[str], None]
    rows: list[tuple[str, str, bool]] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    def section(self, title: str, text: str, *commands: Sequence[object]) -> None:
        self.parts.append(f"\n## {title}\n\n{text}\n")
        if commands:
            shown = "\n".join("$ edgert " + " ".join(map(_quoted, words)) for words in commands)
            self.parts.append(f"\n```\n{shown}\n```\n")

    def compare(self, what: str, compared: str, found: dict[str, Any]) -> None:
        """`found`: what each machine, or each way, gives; all should be the same."""
        first, *others = found.values()
        same = all(other == first for other in others)
        self.rows.append((what, compared, same))
        self.say(f"{'same' if same else 'DIFFERS':<10}{what}: {compared}")
        if same:
            self.parts.append(f"\n{what}: the same on {' and '.join(found)}: `{_short(first)}`\n")
        else:
            lines = "\n".join(f"{name}: {_short(value)}" for name, value in found.items())
            self.parts.append(f"\n{what}: **they differ**\n\n```\n{lines}\n```\n")


def _quoted(word: object) -> str:
    text = str(word)
    return text if text.replace("-", "").replace(":", "").isalnum() or "'" in text else f'"{text}"'


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 400 else f"{text[:400]} …"


def generate(page: Transcript, machines: Sequence[Machine]) -> None:
    kinds = {"greedy": ("--temp", 0, "--ignore-eos"), "sampled": SAMPLED}
    cases = [("looped", v, k) for v in ("fp32-ort", "fp32-portable") for k in kinds]
    cases += [("decoder", variant, "sampled") for variant in LADDER]
    commands = {
        (bundle, variant, kind): ("run", bundle, "--variant", variant, "--ids", IDS, "-n", 24)
        for bundle, variant, kind in cases
    }
    text = "24 tokens behind 8, of each variant: greedy, and sampled with a seed."
    words = commands["looped", "fp32-ort", "sampled"]
    page.section("Generate", text, (*words, *SAMPLED))
    for (bundle, variant, kind), words in commands.items():
        found = {m.name: m.edgert(*words, *kinds[kind])["tokens"] for m in machines}
        page.compare(f"{bundle} {variant}, {kind}", "24 token ids", found)


def own_kernels(page: Transcript, machines: Sequence[Machine]) -> None:
    text = "edgert's own kernels, compiled for each machine, and ONNX Runtime's: EDGERT_NATIVE=0."
    page.section("Kernels", text)
    found = {
        f"{m.name} with {kernels}": tokens
        for m in machines
        for kernels, tokens in json.loads(m.python(KERNELS)).items()
    }
    page.compare("decoder fp32-ort, sampled", f"24 token ids, {len(found)} ways", found)


def save_and_resume(page: Transcript, machines: Sequence[Machine]) -> None:
    for bundle, variant in (("looped", "fp32-ort"), ("decoder", "int4-kv8-ort")):
        whole = ("run", bundle, "--variant", variant, "--ids", IDS, *SAMPLED, "-n", 24)
        start = (*whole[:-1], 10, "--save", f"{bundle}.session")
        rest = ("run", bundle, "--session", f"{bundle}.session", "-n", 14)
        text = "10 tokens, a saved session, 14 more on the other machine; and all 24 at once."
        page.section(f"Save here, resume there: {bundle} {variant}", text, start, rest, whole)
        for saver, resumer in (machines, machines[::-1]):
            began = saver.edgert(*start)["tokens"]
            went_on = resumer.edgert(*rest)["tokens"]
            found = {
                f"{saver.name} alone": saver.edgert(*whole)["tokens"],
                f"{saver.name}, then {resumer.name}": began + went_on,
            }
            page.compare(f"{bundle}, {saver.name} to {resumer.name}", "24 token ids", found)


def frozen(page: Transcript, machines: Sequence[Machine]) -> None:
    """Sessions of format version 1, saved on x86-64 and kept in the repository."""
    text = "Sessions of format version 1, saved on x86-64 and kept in this repository since."
    key = ("--key-file", "frozen/key")
    plain = ("run", "--session", "frozen/plain-session", "--threads", 1)
    locked = ("run", "--session", "frozen/locked-session", *key, "-n", 12, *SAMPLED)
    page.section("Frozen sessions", text, plain, locked)
    for name, words in (("plain", plain), ("encrypted", locked)):
        found = {m.name: m.edgert(*words)["tokens"] for m in machines}
        page.compare(f"{name} session", "token ids", found)


def halt(page: Transcript, machines: Sequence[Machine]) -> None:
    text = f"Iterations of each of 23 tokens with the policy `{POLICY}`; and a bench."
    bench = ("bench", "looped", "-p", 16, "-n", 12, "-r", 2, "--halt", POLICY)
    page.section("Halt and bench", text, bench)
    for variant in ("fp32-ort", "fp32-portable"):
        found = {m.name: m.python(HALTING.replace("VARIANT", variant)).strip() for m in machines}
        page.compare(f"looped {variant}", "token ids and iterations of each", found)
    names = ("output_sha256", "verified", "steps_taken", "halt_rate")
    found = {m.name: {n: r[n] for n in names} for m in machines for r in [m.edgert(*bench)]}
    page.compare("bench", "hash of the answer, verified, steps taken (no times)", found)


def solve(page: Transcript, machines: Sequence[Machine]) -> None:
    text = f"{PUZZLES} puzzles: answers and the segment that each ended behind."
    whole = ("solve", "solver", "-f", "puzzles.txt")
    start = (*whole, "--max-steps", 1, "--save", "solver.session")
    rest = ("solve", "--session", "solver.session")
    report = ("halt", "solver", "--data", "puzzles.txt", "--rounds", 1, "--dry-run")
    page.section("Solve, leave off, go on; the halting report", text, whole, start, rest, report)

    def answers(result: dict[str, Any]) -> list[tuple[str, int, bool]]:
        return [(s["answer"], s["steps"], s["solved"]) for s in result["solutions"]]

    at_once = {m.name: answers(m.edgert(*whole)) for m in machines}
    page.compare("solver", "answers, steps, solved", at_once)
    for saver, resumer in (machines, machines[::-1]):
        saver.edgert(*start)
        found = {
            f"{saver.name} alone": at_once[saver.name],
            f"{saver.name}, then {resumer.name}": answers(resumer.edgert(*rest)),
        }
        page.compare(f"solver, {saver.name} to {resumer.name}", "answers, steps, solved", found)
    names = ("policy", "iterations_mean", "iterations_p95", "exact", "halted")
    reports = {
        m.name: [{n: p[n] for n in names} for p in m.edgert(*report)["points"]] for m in machines
    }
    page.compare("halting report", "policies, iterations, exact accuracy", reports)


def transcript(
    machines: Sequence[Machine],
    work: Path,
    emulator: str,
    cpu: str,
    resolved: dict[str, dict[str, str]],
    say: Callable[[str], None],
) -> tuple[str, bool]:
    """The page, and whether anything differs."""
    write_puzzles(work / "puzzles.txt")
    page = Transcript(say)
    versions = {m.name: m.edgert("version") for m in machines}
    for check in (generate, own_kernels, save_and_resume, frozen, halt, solve):
        check(page, machines)
    lines = [INTRODUCTION.format(emulator=emulator, cpu=cpu), "\n## Versions\n"]
    names = list(versions)
    lines += ["", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {key} | {' | '.join(str(versions[name][key]) for name in names)} |"
        for key in versions[names[0]]
    ]
    lines += ["\n## Result\n", "| What | Compared | |", "|---|---|---|"]
    lines += [f"| {a} | {b} | {'same' if ok else '**differs**'} |" for a, b, ok in page.rows]
    text = "\n".join(lines) + "\n" + "".join(page.parts) + _resolved(resolved)
    return text, not all(ok for _, _, ok in page.rows)


def _resolved(resolved: dict[str, dict[str, str]]) -> str:
    """What pip would install on the Jetsons' own Pythons, which Debian does not have."""
    heads = list(resolved)
    names = sorted({name for versions in resolved.values() for name in versions})
    lines = [
        "\n## Wheels for the Pythons of JetPack 6 and 7\n",
        "Resolved for aarch64 by a dry run, from wheels alone, and not executed: ",
        "`edgert[cpu,crypto,tensorrt]`. TensorRT itself comes with JetPack.\n",
        f"| | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name in names:
        lines.append(f"| {name} | {' | '.join(resolved[h].get(name, '') for h in heads)} |")
    return "\n".join(lines) + "\n"
