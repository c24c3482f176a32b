"""Hostile and broken input at the command line: exit code, what, where, do, and nothing written.

What each parser refuses in detail is in the parsers' own tests; here is what a user sees of it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from bundles import DATA, GRAPH, tiny_manifest, tiny_model
from command import Result

from edgert.bundle import list_files, seal, write_manifest
from edgert.files import MANIFEST

FORM = re.compile(r"error: (?P<what>.+)\n  where  (?P<where>.+)\n  do     (?P<do>.+)\n", re.DOTALL)


def told(got: Result, code: int) -> re.Match[str]:
    """The parts of the message; nothing on stdout, no traceback."""
    assert (got.code, got.out) == (code, "")
    assert "Traceback" not in got.err
    parts = FORM.fullmatch(got.err[got.err.rindex("error: ") :])
    assert parts, got.err
    return parts


# ------------------------------------------------- prompts


@pytest.mark.parametrize("way", ["-p", "-f", "--ids", "--chat"])
def test_a_prompt_beyond_capacity_is_5(run, tiny_bundle, tmp_path, way) -> None:
    """Refused before anything is computed, however it was given; how many, and how many fit."""
    text = "~" * 16400
    (tmp_path / "long.txt").write_text(text)
    arguments = {
        "-p": ["-p", text],
        "-f": ["-f", tmp_path / "long.txt"],
        "--ids": ["--ids", ",".join(["5"] * 16400)],
        "--chat": ["--chat", "-p", text],
    }[way]
    got = run("run", tiny_bundle, *arguments)
    assert (got.code, got.out) == (5, "")
    assert re.match(
        r"error: 164\d\d tokens are more than this model's context of 16384\n  do  ", got.err
    )


@pytest.mark.parametrize("arguments", [["-p", ""], ["--ids", ""], ["--ids", ", ,"]])
def test_an_empty_prompt_is_2(run, tiny_bundle, arguments) -> None:
    """Nothing to continue."""
    got = run("run", tiny_bundle, *arguments)
    assert (got.code, got.out) == (2, "")
    assert got.err.startswith("error: there is nothing to continue: the prompt is empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "error: there is nothing to continue: the prompt is empty"),
        (b"caf\xe9", "error: the prompt file is not UTF-8: 'utf-8' codec can't decode byte 0xe9"),
        (b"a\xff\xfe" * 1000, "error: the prompt file is not UTF-8"),
        (b"\xed\xa0\x80", "error: the prompt file is not UTF-8"),  # a surrogate, spelled out
    ],
)
def test_what_is_no_prompt_on_stdin_is_2(tiny_bundle, content, message) -> None:
    """As a pipe delivers it."""
    got = subprocess.run(
        [sys.executable, "-m", "edgert", "run", tiny_bundle, "-f", "-"],
        input=content,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (got.returncode, got.stdout) == (2, b"")
    assert got.stderr.decode().startswith(message)


@pytest.mark.parametrize("ids", ["99999999999999999999999999", "-1", "4294967296", "1" * 5000])
def test_ids_that_no_model_has_are_2(run, tiny_bundle, ids) -> None:
    """However large."""
    got = run("run", tiny_bundle, "--ids", ids)
    assert (got.code, got.out) == (2, "")
    assert got.err.startswith("error: ")
    assert len(got.err) < 6000


# ------------------------------------------------- bundles


def sealed(root: Path, model: onnx.ModelProto | None = None, **changes: object) -> None:
    """Give the changed content of a bundle sound hashes: hashes do not say who made them."""
    if model is not None:
        (root / GRAPH).write_bytes(model.SerializeToString())
    write_manifest(root, seal(replace(tiny_manifest(), files=list_files(root), **changes)))


def edited(root: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


def truncated_manifest(root: Path) -> None:
    data = (root / MANIFEST).read_bytes()
    (root / MANIFEST).write_bytes(data[: len(data) // 2])


def oversized_manifest(root: Path) -> None:
    with (root / MANIFEST).open("ab") as file:
        file.write(b" " * (5 << 20))


def nested_manifest(root: Path) -> None:
    (root / MANIFEST).write_text("[" * 100_000)


def linked_manifest(root: Path) -> None:
    (root / MANIFEST).rename(root.parent / "elsewhere.json")
    (root / MANIFEST).symlink_to(root.parent / "elsewhere.json")


def path_upward(root: Path) -> None:
    edited(root, lambda m: m["files"].update({"../x": m["files"][DATA]}))


def linked_folder(root: Path) -> None:
    (root / "variants").rename(root.parent / "variants")
    (root / "variants").symlink_to(root.parent / "variants")


def linked_weights(root: Path) -> None:
    (root / DATA).rename(root.parent / "weights.data")
    (root / DATA).symlink_to(root.parent / "weights.data")


def truncated_weights(root: Path) -> None:
    os.truncate(root / DATA, 1000)


def truncated_graph(root: Path) -> None:
    os.truncate(root / GRAPH, 100)
    sealed(root)


def graph_that_is_text(root: Path) -> None:
    (root / GRAPH).write_text("not a graph")
    sealed(root)


def external_data_upward(root: Path) -> None:
    model = tiny_model()
    table = next(t for t in model.graph.initializer if t.name == "table")
    next(entry for entry in table.external_data if entry.key == "location").value = "../../secret"
    sealed(root, model)


def external_data_past_the_end(root: Path) -> None:
    model = tiny_model()
    table = next(t for t in model.graph.initializer if t.name == "table")
    next(entry for entry in table.external_data if entry.key == "offset").value = str(1 << 40)
    sealed(root, model)


BROKEN = {
    truncated_manifest: "manifest.json is not sound JSON",
    oversized_manifest: r"the file has 5,\d+,\d+ bytes, 4,194,304 are allowed",
    nested_manifest: "nested more than 16 deep",
    linked_manifest: "a symbolic link stands where a bundle has a regular file",
    path_upward: "'../x' is not a file name inside a bundle: it has the part '..'",
    linked_folder: "'variants' is a symbolic link",
    linked_weights: "'variants/fp32/weights.data' is a symbolic link",
    truncated_weights: r"has 1,000 bytes, 360,064 are listed",
    truncated_graph: "not a sound ONNX file",
    graph_that_is_text: "not a sound ONNX file",
    external_data_upward: r"tensor 'table' is stored in '\.\./\.\./secret'",
    external_data_past_the_end: r"tensor 'table' ends at byte 1,099,511,987,776 of",
}


@pytest.mark.parametrize("verb", ["run", "verify", "inspect"])
@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_a_hostile_bundle_is_3(run, tmp_path, damage, verb) -> None:
    """Every verb refuses it, names the place and says what to do."""
    from bundles import tiny_bundle

    root = tiny_bundle(tmp_path)
    damage(root)
    parts = told(run(verb, root, *(["--ids", "1"] if verb == "run" else [])), 3)
    assert re.search(BROKEN[damage], parts["what"]), parts["what"]
    assert str(root) in parts["where"]


BYTES_AS_TOKENIZER = {
    "truncated": (lambda text: text[:-40], "the tokenizer cannot be loaded"),
    "not UTF-8": (lambda text: b"\xff" + text, "the tokenizer is not UTF-8"),
    "empty": (lambda text: b"", "the tokenizer cannot be loaded"),
    "deeply nested": (lambda text: b"[" * 100_000, "the tokenizer cannot be loaded"),
    "a list": (lambda text: b"[1, 2]", "the tokenizer cannot be loaded"),
}


@pytest.mark.parametrize("name", BYTES_AS_TOKENIZER)
def test_a_hostile_tokenizer_is_3(run, tiny_bundle, copied, name) -> None:
    """With hashes that fit, so that it is really read."""
    from edgert.bundle import read_manifest

    change, message = BYTES_AS_TOKENIZER[name]
    root = copied(tiny_bundle)
    (root / "tokenizer.json").write_bytes(change((root / "tokenizer.json").read_bytes()))
    manifest = read_manifest_loosely(root)
    write_manifest(root, seal(replace(manifest, files=list_files(root))))
    assert read_manifest(root)
    parts = told(run("run", root, "-p", "the star"), 3)
    assert parts["what"].startswith(message)
    assert parts["where"] == str(root / "tokenizer.json")


def read_manifest_loosely(root: Path):
    from edgert.manifest import manifest_from_bytes

    return manifest_from_bytes((root / MANIFEST).read_bytes(), "")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "__class__"),
        ("{% set n = namespace(a=[1]) %}{% for i in range(70) %}{% set n.a = [n.a, n.a] %}"
         "{% endfor %}{{ n.a == [n.a] }}", "it (makes|takes) more than"),
        ("{{ 'a' * 10 ** 10 }}", "it makes more than"),
        ("{% include '/etc/passwd' %}", "may not load other files"),
    ],
    ids=["escape", "exponential", "large", "file"],
)  # fmt: skip
def test_a_hostile_template_is_3(run, tiny_bundle, copied, template, message) -> None:
    """The sandbox's refusal ends the command, soon."""
    root = copied(tiny_bundle)
    manifest = read_manifest_loosely(root)
    (root / str(manifest.chat_template)).write_text(template)
    write_manifest(root, seal(replace(manifest, files=list_files(root))))
    parts = told(run("run", root, "-p", "hi", "--chat"), 3)
    assert re.search(message, parts["what"])
    assert parts["where"] == "the chat template, line 1"


# ------------------------------------------------- sources of an export


def gguf_magic(path: Path) -> None:
    path.write_bytes(b"GGUX" + bytes(100))


def gguf_counts(path: Path) -> None:
    path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)


def gguf_truncated(path: Path) -> None:
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(7))


def gguf_offset(path: Path) -> None:
    """One tensor of 4 floats that lies beyond the end."""
    entry = (1).to_bytes(8, "little") + b"t" + (1).to_bytes(4, "little")
    entry += (4).to_bytes(8, "little") + bytes(4) + (1 << 40).to_bytes(8, "little")
    path.write_bytes(b"GGUF\3\0\0\0" + (1).to_bytes(8, "little") + bytes(8) + entry + bytes(64))


def checkpoint_of_wrong_names(path: Path) -> None:
    """One name lost, one new, one tensor of another shape."""
    import torch
    from cases import cases

    case = next(case for case in cases("hagi") if case.name == "model_a")
    content = torch.load(case.checkpoint, weights_only=True)
    model = content["model"]
    del model["final_norm.weight"]
    model["surprise"] = torch.zeros(3)
    model["embed.weight"] = model["embed.weight"][:-1].clone()
    torch.save(content, path)


def checkpoint_truncated(path: Path) -> None:
    checkpoint_of_wrong_names(path)
    os.truncate(path, path.stat().st_size // 2)


def checkpoint_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"not a pickle")


def model_folder(path: Path, header: bytes) -> None:
    path.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        **{"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
        **{"num_attention_heads": 1, "max_position_embeddings": 8},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(header)


def safetensors_length(path: Path) -> None:
    model_folder(path, b"\xff" * 8 + b"{}")


def safetensors_offsets(path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,1099511627776]}}'
    model_folder(path, len(text).to_bytes(8, "little") + text)


def safetensors_link(path: Path) -> None:
    model_folder(path, b"")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("/etc/passwd")


def safetensors_names(path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    model_folder(path, len(text).to_bytes(8, "little") + text + bytes(4))


SOURCES = {
    gguf_magic: "not a model file that is known here",
    gguf_counts: "the number of tensors is 18446744073709551615, above the limit of 65536",
    gguf_truncated: "the number of tensors needs 8 bytes, the file has 7 left",
    gguf_offset: r"the tensor 't' is said to lie at bytes 10995\d+ to",
    checkpoint_of_wrong_names: "(?s)1 unexpected.*surprise.*embed.weight is .*"
    "the config wants .*final_norm.weight .* is missing",
    checkpoint_truncated: "a broken zip archive",
    checkpoint_of_text: "torch cannot read the checkpoint|holds Python objects",
    safetensors_length: "model.safetensors is not a sound safetensors file",
    safetensors_offsets: "model.safetensors is not a sound safetensors file",
    safetensors_link: "model.safetensors is a link that leads out of the folder",
    safetensors_names: "(?s)1 unexpected.*model.embed_tokens.weight .* is missing",
}


@pytest.mark.parametrize("make", SOURCES, ids=lambda f: f.__name__)
def test_a_hostile_source_is_3(run, tmp_path, make) -> None:
    """All that is wrong at once; nothing appears where the bundle was to be."""
    source = tmp_path / "source"
    make(source)
    got = run("export", source, "-o", tmp_path / "out" / "model", "-q")
    assert (got.code, got.out) == (3, "")
    assert re.search(SOURCES[make], got.err), got.err
    assert f"\n  where  {source}" in got.err
    assert not (tmp_path / "out").exists()


class Trap:
    """Pickled as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_3_and_does_not_run(run, tmp_path) -> None:
    """The message names what it would have called."""
    import torch

    trap = tmp_path / "ran"
    torch.save({"model": {}, "config": Trap(trap)}, tmp_path / "step-1.pt")
    parts = told(run("export", tmp_path / "step-1.pt", "-o", tmp_path / "out", "-q"), 3)
    assert "holds Python objects (posix.mkdir)" in parts["what"]
    assert "would run code" in parts["do"]
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


# ------------------------------------------------- outputs


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "deeper" / "model"


def read_only_system(folder: Path) -> Path:
    return Path("/proc/edgert/model")


def name_too_long(folder: Path) -> Path:
    return folder / ("x" * 250)


@pytest.mark.parametrize(
    "output", [below_a_file, read_only_system, name_too_long], ids=lambda f: f.__name__
)
def test_an_unwritable_output_is_1(run, model_a_checkpoint, tmp_path, output) -> None:
    """Told before the work begins, with the system's reason; also root cannot write there."""
    path = output(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    parts = told(run("export", model_a_checkpoint, "-o", path, "-q"), 1)
    reasons = "File exists|Not a directory|No such file|not permitted|Read-only|name too long"
    assert re.search(f"cannot write the bundle: .*({reasons})", parts["what"])
    assert sorted(tmp_path.rglob("*")) == before


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of so many bytes; skips where this process may not mount one."""
    folder.mkdir()
    options = f"size={nbytes},mode=755"
    command = ["mount", "-t", "tmpfs", "-o", options, "edgert-test", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [64, 224], ids=["weights", "graph"])
def test_a_full_disk_is_1(run, model_a_checkpoint, tmp_path, kilobytes) -> None:
    """Full (ENOSPC) while the weights are written, or behind them: nothing is left of it."""
    with small_disk(tmp_path / "disk", kilobytes << 10) as disk:
        got = run("export", model_a_checkpoint, "-o", disk / "model", "--lowering", "ort", "-q")
        parts = told(got, 1)
        assert parts["what"] == f"cannot write the bundle: {os.strerror(errno.ENOSPC)}"
        assert str(disk) in parts["where"]
        assert "free space" in parts["do"]
        assert os.listdir(disk) == []


@pytest.mark.slow
def test_a_file_beyond_the_quota_is_1(run, model_a_checkpoint, tmp_path) -> None:
    """The same where nothing can be mounted: the system refuses a file of more than 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        out = tmp_path / "out"
        got = run("export", model_a_checkpoint, "-o", out / "model", "--lowering", "ort", "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    parts = told(got, 1)
    assert parts["what"] == f"cannot write the bundle: {os.strerror(errno.EFBIG)}"
    assert os.listdir(out) == []


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_bundle(run, model_a_bundle, model_a_checkpoint, tmp_path):
    """An export over a sound bundle that fails halfway leaves that one in its place."""
    import shutil

    with small_disk(tmp_path / "disk", 700 << 10) as disk:
        shutil.copytree(model_a_bundle, disk / "model")
        (disk / "ballast").write_bytes(bytes(200 << 10))
        told(run("export", model_a_checkpoint, "-o", disk / "model", "--lowering", "ort", "-q"), 1)
        assert sorted(os.listdir(disk)) == ["ballast", "model"]
        assert run("verify", disk / "model").code == 0
