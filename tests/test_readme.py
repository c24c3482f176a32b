"""What the documentation tells people to type exists, parses, and, where it is cheap, runs."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from wheels import ROOT

import edgert
from edgert.cli import cli, main
from edgert.doctor.machine import Machine
from edgert.errors import EdgertError

PAGES = sorted(
    page for folder in (".", "docs", "engines", "export") for page in (ROOT / folder).glob("*.md")
)


@dataclass(frozen=True)
class Typed:
    """A command line of a page, without the program's name."""

    page: str
    line: str

    @property
    def arguments(self) -> list[str]:
        words = shlex.split(self.line, comments=True)[1:]
        return words[: words.index(">")] if ">" in words else words  # the shell's own part

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def fenced(text: str) -> Iterator[str]:
    """The lines of all fenced blocks, with continued lines joined."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


COMMANDS = [
    Typed(str(page.relative_to(ROOT)), line.strip().removeprefix("$ "))
    for page in PAGES
    for line in fenced(page.read_text(encoding="utf-8"))
    if re.match(r"\s*(\$ )?edgert [a-z]", line)
]
commands = pytest.mark.parametrize("typed", COMMANDS, ids=str)


def test_the_readme_shows_commands() -> None:
    """So that the tests below are about something."""
    verbs = {typed.arguments[0] for typed in COMMANDS if typed.page == "README.md"}
    assert verbs >= {"export", "run", "inspect"}


@commands
def test_every_command_parses(typed, tmp_path, monkeypatch) -> None:
    """The verb and each option exist, and take such values."""
    monkeypatch.chdir(tmp_path)
    for argument in typed.arguments:
        if Path(argument).suffix == ".txt":
            (tmp_path / argument).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / argument).touch()  # a file to be read is opened at once
    verb, *rest = typed.arguments
    command = cli.commands[verb]
    with command.make_context(verb, rest) as context:
        assert isinstance(context, click.Context)


@commands
def test_every_recipe_that_is_named_is_there(typed) -> None:
    """`export NAME.toml` names a recipe of the project."""
    for argument in typed.arguments:
        if argument.endswith(".toml") and not argument.startswith("-"):
            assert (ROOT / argument).is_file()


PUZZLES, PAUSED = "puzzles.txt", "puzzles.session"


@pytest.fixture(scope="module")
def files(tiny_bundle, saved_session, copier_bundle, tmp_path_factory) -> dict[str, Path]:
    """What stands in for a named file, by its name or its ending: puzzles, and some left off; a
    session of more than 40 tokens, a text, and a bench of the tiny bundle."""
    folder = tmp_path_factory.mktemp("files")
    puzzles, paused = folder / PUZZLES, folder / PAUSED
    puzzles.write_text("1324|4231|2413|3142\n")
    with edgert.load(copier_bundle) as model:
        model.solving(puzzles.read_text().split()).save(paused)
    session, text, bench = (folder / f"a{end}" for end in (".session", ".txt", ".json"))
    with edgert.resume(saved_session) as story:
        story.generate(max_tokens=40, ignore_eos=True)
        story.save(session)
    text.write_text("The sun is a star. " * 20)
    command = ["bench", str(tiny_bundle), "-p", "4", "-n", "4", "-r", "2", "--no-cold-start"]
    with bench.open("w") as out, contextlib.redirect_stdout(out):
        assert main([*command, "--json"]) == 0
    found = {path.suffix: path for path in (session, text, bench)}
    return found | {PUZZLES: puzzles, PAUSED: paused}


RECORD = "docs/aarch64.md"
"""What scripts/aarch64 ran, over files that it had made: those commands have run already."""


def cheap(typed: Typed) -> bool:
    """No training or export, no report of an earlier one, no record; GPUs are looked for below."""
    verb, *rest = typed.arguments
    if typed.page == RECORD:
        return False
    return verb not in ("export", "train", "halt") and not {"--halt", "--expect"} & set(rest)


def needs_gpu(typed: Typed) -> bool:
    verb, *rest = typed.arguments
    builds = verb == "build" and not {"--dry-run", "rtx-check"} & set(rest)
    return builds or "tensorrt" in rest


@pytest.mark.parametrize(
    "typed", [typed for typed in COMMANDS if needs_gpu(typed) and cheap(typed)], ids=str
)
def test_what_needs_a_gpu_says_so_where_there_is_none(typed, tiny_bundle, capsys) -> None:
    if Machine().root.joinpath("dev/nvhost-ctrl-gpu").exists() or shutil.which("nvidia-smi"):
        pytest.skip("there may be a GPU")
    arguments = (str(tiny_bundle) if a.startswith("bundles/") else a for a in typed.arguments)
    assert main(list(arguments)) == 4
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed", [typed for typed in COMMANDS if cheap(typed) and not needs_gpu(typed)], ids=str
)
def test_what_is_cheap_runs(
    typed,
    tiny_bundle,
    model_a_bundle,
    copier_bundle,
    ladder_bundle,
    files,
    tmp_path,
    monkeypatch,
    capsys,
) -> None:
    """With a tiny bundle and files in place of those that are named, and somebody at the keyboard
    who says one thing."""
    if "rtx-check" in typed.arguments:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Where are you?\n")))
    for argument in typed.arguments:
        if stand_in := files.get(argument) or files.get(Path(argument).suffix):
            (tmp_path / argument).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(stand_in, tmp_path / argument)
    bundle = model_a_bundle if "--ids" in typed.arguments else tiny_bundle
    if "bundles/sudoku4" in typed.arguments:
        bundle = copier_bundle
    if {"--precision", "--kv"} & set(typed.arguments):
        bundle = ladder_bundle

    def meant(argument: str) -> str:
        if argument.startswith("bundles/") and Path(argument).suffix not in files:
            return str(bundle)
        return str(ROOT / argument) if argument.startswith("examples/") else argument

    assert main([meant(argument) for argument in typed.arguments]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_into_the_project_lead_somewhere(page) -> None:
    """Relative links of a page name files that exist."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_the_readme_knows_every_exit_code() -> None:
    """Those of the error classes, success and interruption."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    sentence = re.search(r"Exit codes: (.*?130 \w+)", text)
    assert sentence

    def codes(kind: type[EdgertError]) -> set[int]:
        return {kind.exit_code}.union(*map(codes, kind.__subclasses__()))

    listed = {int(n) for n in re.findall(r"(?:^|, )(\d+) ", sentence[1])}
    assert listed == codes(EdgertError) | {0, 130}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_variables_that_are_named_exist(page) -> None:
    """An EDGERT_* variable of a page is an option's, or one that the code reads."""
    options = {
        parameter.envvar
        for command in cli.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }
    files = [*(ROOT / "edgert").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    files += [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    read = {name for file in files for name in re.findall(r"EDGERT_[A-Z0-9_]+", file.read_text())}
    named = set(re.findall(r"EDGERT_[A-Z0-9_]+", page.read_text(encoding="utf-8")))
    assert named <= options | read


def test_pages_are_found() -> None:
    """The README, the documentation and the recipes' page are all looked at."""
    assert {Path("README.md"), Path("docs/bundle.md"), Path("export/README.md")} <= {
        page.relative_to(ROOT) for page in PAGES
    }
