"""Opening a bundle: the files that must and must not be there, their hashes, the stamp."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from bundles import DATA, GRAPH, open_refusal, tiny_bundle, with_variant

import edgert.bundle as bundle
from edgert import cache
from edgert.bundle import Bundle, list_files, read_manifest, seal, write_manifest
from edgert.errors import BadBundle


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path) -> Path:
    """A tiny bundle that the test may break."""
    return tiny_bundle(tmp_path, name="bundle")


def test_open_returns_manifest_and_paths(root):
    """A sound bundle opens; its files have paths, others have none."""
    opened = Bundle.open(str(root))
    assert opened.root == root
    assert opened.manifest == read_manifest(root)
    assert opened.path(GRAPH) == root / GRAPH
    with pytest.raises(BadBundle, match="'none' is not listed"):
        opened.path("none")
    (root / GRAPH).unlink()
    (root / GRAPH).symlink_to("/etc/hostname")
    with pytest.raises(BadBundle, match="symbolic link"):
        opened.path(GRAPH)


@pytest.mark.parametrize("name", ["x", ".manifest.json.swp", "variants/fp32/model.plan", ".git/x"])
@pytest.mark.parametrize("verify", [True, False, "stamp"])
def test_stray_file_is_refused_by_name(root, name, verify):
    """What the manifest does not list has no business in the directory."""
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"")
    assert repr(name.partition("/x")[0]) in open_refusal(root, verify)


def _delete(path: Path) -> None:
    path.unlink()


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _link(path: Path) -> None:
    shutil.copy(path, path.parent.parent / "elsewhere")
    path.unlink()
    path.symlink_to(path.parent.parent / "elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [GRAPH, DATA, "chat_template.jinja", "reports/parity.json"])
@pytest.mark.parametrize("damage", [_delete, _grow, _cut, _link, _pipe])
def test_listed_file_must_be_there_as_listed(root, name, damage):
    """Missing, longer, shorter, linked or special: refused, naming the file, hashes or not."""
    damage(root / name)
    assert name in open_refusal(root, False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no such directory"),
        (lambda p: p.mkdir(), "it has no manifest.json"),
        (lambda p: p.write_text(""), "there is no such directory"),
        (lambda p: (p / "manifest.json").mkdir(parents=True), "a directory stands where"),
    ],
)
def test_path_that_is_no_bundle(tmp_path, make, message):
    """A wrong path is told from a broken bundle."""
    make(tmp_path / "b")
    assert message in open_refusal(tmp_path / "b")


def test_manifest_that_is_a_link_is_refused(root):
    """The manifest itself is held to the same rule."""
    (root / "manifest.json").rename(root.parent / "m.json")
    (root / "manifest.json").symlink_to(root.parent / "m.json")
    assert "a symbolic link" in open_refusal(root)


def test_every_bit_of_the_graph_counts(tmp_path):
    """Each single-bit flip of a small graph file is caught by its hash."""
    root = tiny_bundle(tmp_path)
    manifest = read_manifest(root)
    good = (root / GRAPH).read_bytes()
    (root / GRAPH).chmod(0o644)
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (root / GRAPH).write_bytes(bad)
        with pytest.raises(BadBundle, match="does not have the listed SHA-256"):
            bundle._check_hashes(root, manifest, [GRAPH], None)
    (root / GRAPH).write_bytes(good)
    Bundle.open(root, verify=True)


def flip(path: Path) -> None:
    """Change one bit and keep the size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_all_differing_files_are_listed(root):
    """One error names every file whose content differs."""
    for name in (DATA, "reports/parity.json", "chat_template.jinja"):
        flip(root / name)
    text = open_refusal(root)
    assert text.startswith("the bundle has 3 problems")
    for name in (DATA, "reports/parity.json", "chat_template.jinja"):
        assert f"files.{name}: the content does not have the listed SHA-256" in text
    assert Bundle.open(root, verify=False).root == root


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """Bytes hashed, chunk by chunk; files count as settled at once."""
    monkeypatch.setattr(bundle, "_SETTLE_NS", 0)
    return []


def test_stamp_spares_the_second_hashing(root, hashed):
    """Verified once, opened from the stamp afterwards; `True` hashes again."""
    total = sum(entry.bytes for entry in read_manifest(root).files.values())
    Bundle.open(root, progress=hashed.append)
    assert sum(hashed) == total
    Bundle.open(root, progress=hashed.append)
    assert sum(hashed) == total
    Bundle.open(root, verify=True, progress=hashed.append)
    assert sum(hashed) == 2 * total


@pytest.mark.parametrize("name", [GRAPH, DATA])
def test_change_after_the_stamp_is_noticed(root, hashed, name):
    """A flipped bit is found although size and modification time are put back."""
    Bundle.open(root)
    before = (root / name).stat()
    flip(root / name)
    os.utime(root / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert f"files.{name}" in open_refusal(root)


def test_only_the_changed_file_is_hashed_again(root, hashed):
    """A file that was touched is hashed; the others keep their verdict."""
    Bundle.open(root)
    os.utime(root / DATA)
    Bundle.open(root, progress=hashed.append)
    assert sum(hashed) == read_manifest(root).files[DATA].bytes


def test_fresh_file_is_not_stamped(root, monkeypatch):
    """A file changed within the clock's grain of its hashing could change again unseen."""
    monkeypatch.setattr(bundle, "_SETTLE_NS", 10**15)
    Bundle.open(root)
    assert cache.read_stamp(root) is None


def test_file_that_changes_during_hashing_is_not_stamped(root, hashed):
    """The stamp is for the files as they were hashed."""
    Bundle.open(root, progress=lambda n: os.utime(root / DATA))
    assert cache.read_stamp(root) is None


@pytest.mark.parametrize(
    "forge",
    [
        lambda s: {**s, "checks": 0},
        lambda s: {**s, "files": None},
        lambda s: {**s, "files": []},
        lambda s: {**s, "files": dict.fromkeys(s["files"])},
        lambda s: {},
    ],
)
def test_stamp_that_does_not_fit_is_ignored(root, hashed, forge):
    """Older checks, other types, missing parts: hashed as if there were no stamp."""
    Bundle.open(root)
    stamp = cache.read_stamp(root)
    assert stamp is not None
    assert cache.write_stamp(root, forge(stamp))
    Bundle.open(root, progress=hashed.append)
    assert sum(hashed) > 0


def test_graphs_are_checked_again_when_only_the_manifest_changed(root, hashed):
    """A stamp vouches for files with their manifest, not for another manifest."""
    Bundle.open(root)
    manifest = read_manifest(root)
    write_manifest(root, seal(with_variant(manifest, opsets={"ai.onnx": 19})))
    assert "imports 'ai.onnx' 20, declared as 19" in open_refusal(root)


def test_unwritable_cache_does_not_fail_a_load(root, monkeypatch, tmp_path):
    """Without a usable cache a bundle is hashed each time."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "file"))
    assert Bundle.open(root).root == root


def test_listing_refuses_what_a_bundle_cannot_have(tmp_path):
    """The exporter's helper applies the reader's rules."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / ".b").write_text("")
    with pytest.raises(BadBundle, match="the bundle has 2 problems"):
        list_files(tmp_path)
