"""From a session file to its bundle: found where it was, or beside the file; no other is taken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import DATA, OFFSET, TABLE, tiny_bundle, with_variant
from fake_model import PROMPT, fake_model

import edgert
from edgert.backends.ort import default_threads
from edgert.bundle import list_files, read_manifest, seal, write_manifest
from edgert.errors import (
    BadBundle,
    BadSession,
    EdgertError,
    Incompatible,
    SessionMismatch,
    UsageError,
    WrongKey,
)
from edgert.sessionfile import read_session, write_session
from edgert.spec import Manifest, TokenizerSpec

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}


def saved_with(bundle: Path, path: Path, **options: Any) -> list[int]:
    """Save a session paused in its answer; what it will have said in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with edgert.load(bundle, **options) as model, model.session() as session:
        stream = session.stream([3, 1, 4], **GREEDY)
        next(stream)
        session.save(path)
        list(stream)
        return session.tokens


def rewritten(file: Path, /, **hint: Any) -> None:
    """The same session with another hint at its bundle."""
    saved = read_session(file)
    write_session(file, replace(saved, bundle=replace(saved.bundle, **hint)))


def goes_on(path: Path, **options: Any) -> list[int]:
    """The tokens at the end of the answer, in a session that loads its own bundle."""
    with edgert.resume(path, **options) as session:
        session.generate()
        return session.tokens


# Where the bundle is


def test_the_bundle_is_found_where_it_was(tmp_path):
    """By its absolute path, wherever the session file has gone to."""
    bundle = tiny_bundle(tmp_path)
    want = saved_with(bundle, tmp_path / "s")
    assert goes_on(tmp_path / "s") == want
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "s", tmp_path / "elsewhere/t")
    assert goes_on(tmp_path / "elsewhere/t") == want


def test_bundle_and_file_that_move_together_find_each_other(tmp_path):
    """By the path as seen from the file: a folder copied to another machine."""
    bundle = tiny_bundle(tmp_path / "a/bundles")
    want = saved_with(bundle, tmp_path / "a/saved/s")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert goes_on(tmp_path / "b/saved/s") == want


def test_a_relative_path_and_a_link_lead_to_it_too(tmp_path, monkeypatch):
    """The file is found from the working directory; the bundle from the file's real folder."""
    bundle = tiny_bundle(tmp_path)
    want = saved_with(bundle, tmp_path / "saved/s")
    monkeypatch.chdir(tmp_path / "saved")
    assert goes_on(Path("s")) == want
    (tmp_path / "link").symlink_to(tmp_path / "saved/s")
    assert goes_on(tmp_path / "link") == want


def test_a_bundle_that_was_named_is_taken(tmp_path):
    """Moved alone, and named: also when something else stands where it was."""
    bundle = tiny_bundle(tmp_path)
    want = saved_with(bundle, tmp_path / "s")
    shutil.move(bundle, tmp_path / "moved")
    sibling(tmp_path, "one weight")
    assert goes_on(tmp_path / "s", bundle=tmp_path / "moved") == want
    assert goes_on(tmp_path / "s", bundle=str(tmp_path / "moved")) == want


def test_a_copy_of_the_bundle_is_the_bundle(tmp_path):
    """Identity is content: a copy under another name and path is as good."""
    bundle = tiny_bundle(tmp_path)
    want = saved_with(bundle, tmp_path / "s")
    copy = shutil.copytree(bundle, tmp_path / "copy")
    with edgert.load(copy) as model, edgert.resume(tmp_path / "s", model) as session:
        session.generate()
        assert session.tokens == want


def test_a_bundle_that_is_gone_is_reported_with_where_it_was(tmp_path):
    bundle = tiny_bundle(tmp_path)
    saved_with(bundle, tmp_path / "s")
    shutil.rmtree(bundle)
    with pytest.raises(SessionMismatch, match="bundle is not where it was") as caught:
        edgert.resume(tmp_path / "s")
    assert "was saved with tiny fp32-ort" in str(caught.value)
    assert str(bundle) in str(caught.value)
    assert f"edgert run BUNDLE --session {tmp_path / 's'}" in str(caught.value)
    assert caught.value.exit_code == 4
    rewritten(tmp_path / "s", path=None, relative=None)
    with pytest.raises(SessionMismatch, match="not where it was") as caught:
        edgert.resume(tmp_path / "s")
    assert "at a place that is not recorded" in str(caught.value)


@pytest.mark.parametrize(
    "hint",
    ["/proc/self/mem", "x" * 4000, "/" + "y/" * 2000, "", ".", "/dev/zero", "/opt/\xa0none", "~"],
    ids=lambda hint: ascii(hint)[1:17],
)
def test_a_hint_that_leads_nowhere_is_only_a_hint(tmp_path, hint):
    """Whatever somebody wrote there: a typed error, or the other hint."""
    bundle = tiny_bundle(tmp_path)
    want = saved_with(bundle, tmp_path / "s")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("/")
        if hint.isprintable():
            rewritten(tmp_path / "s", path=hint)
            assert goes_on(tmp_path / "s") == want
            rewritten(tmp_path / "s", relative=hint)
            with pytest.raises(SessionMismatch, match="not where it was"):
                edgert.resume(tmp_path / "s")
        else:
            rewritten(tmp_path / "s", path=hint)
            with pytest.raises(BadSession, match="bundle.path cannot be"):
                edgert.resume(tmp_path / "s")


def test_a_hint_that_may_not_be_looked_at_is_only_a_hint(tmp_path, monkeypatch):
    """A directory of somebody else's, as a session from another machine may name."""
    saved_with(tiny_bundle(tmp_path), tmp_path / "s")
    rewritten(tmp_path / "s", path="/secret", relative=None)
    real = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).startswith("/secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(SessionMismatch, match="not where it was"):
        edgert.resume(tmp_path / "s")


def test_a_path_that_text_cannot_carry_is_left_out(tmp_path):
    """A folder whose name has a line break: saved without the hint, and the bundle is named."""
    bundle = tiny_bundle(tmp_path / "two\nlines")
    want = saved_with(bundle, tmp_path / "s")
    assert read_session(tmp_path / "s").bundle.path is None
    assert read_session(tmp_path / "s").bundle.relative is None
    with pytest.raises(SessionMismatch, match="not where it was"):
        edgert.resume(tmp_path / "s")
    assert goes_on(tmp_path / "s", bundle=bundle) == want


# Another bundle


def _one_weight(root: Path) -> Manifest:
    """One bit of one number of the table."""
    table = TABLE.copy()
    table.view(np.uint32)[17, 17] ^= 1
    (root / DATA).write_bytes(bytes(OFFSET) + table.tobytes())
    return read_manifest(root)


def _changed(change: Callable[[Manifest], Manifest]) -> Callable[[Path], Manifest]:
    return lambda root: change(read_manifest(root))


SIBLINGS: dict[str, Callable[[Path], Manifest]] = {
    "one weight": _one_weight,
    "tokenizer": _changed(lambda m: replace(m, tokenizer=TokenizerSpec("bytes", offset=1))),
    "precision": _changed(lambda m: with_variant(m, precision="fp16")),
    "lowering": _changed(lambda m: with_variant(m, lowering="portable")),
    "end token": _changed(lambda m: replace(m, eos=(255,))),
    "context": _changed(lambda m: replace(m, context=63)),
    "chat template": _changed(lambda m: replace(m, chat_template=None)),
}


def sibling(folder: Path, name: str) -> Path:
    """The tiny bundle, sound and sealed, but for one thing."""
    root = tiny_bundle(folder)
    changed = SIBLINGS[name](root)
    write_manifest(root, seal(replace(changed, files=list_files(root))))
    return root


@pytest.mark.parametrize("name", SIBLINGS)
@pytest.mark.parametrize("how", ["where it was", "named", "loaded"])
def test_a_sibling_that_differs_in_one_thing_is_refused(tmp_path, name, how):
    """Of the same name and shapes: SessionMismatch says which is which. The file stays."""
    bundle = tiny_bundle(tmp_path)
    saved_with(bundle, tmp_path / "s")
    old = (tmp_path / "s").read_bytes()
    ids = [read_manifest(bundle).variants["fp32-ort"].variant_id]
    bundle = sibling(tmp_path, name)
    ids.append(read_manifest(bundle).variants["fp32-ort"].variant_id)
    assert ids[0] != ids[1]
    options: dict[str, Any] = {"bundle": bundle} if how == "named" else {}
    if how == "loaded":
        options["model"] = edgert.load(bundle)
    with pytest.raises(SessionMismatch, match="belongs to another bundle") as caught:
        edgert.resume(tmp_path / "s", **options)
    assert type(caught.value) is SessionMismatch
    assert caught.value.exit_code == 4
    assert "was saved with tiny fp32-ort" in str(caught.value)
    assert str(bundle) in str(caught.value)
    assert "resume it with the bundle it was saved with" in str(caught.value)
    if how == "loaded":
        assert all(each[:12] in str(caught.value) for each in ids)
    assert (tmp_path / "s").read_bytes() == old


def test_what_is_not_part_of_a_model_does_not_matter(tmp_path):
    """Its name, its summary, its sampling defaults: the session goes on."""
    bundle = tiny_bundle(tmp_path)
    want = saved_with(bundle, tmp_path / "s")
    tiny_bundle(
        tmp_path,
        edit=lambda m: replace(m, name="renamed", summary="other", sampling={"temperature": 0.9}),
    )
    assert goes_on(tmp_path / "s") == want


def test_another_variant_of_the_same_bundle_is_refused_by_name(tiny_exported_bundle, tmp_path):
    """And the way out is the option that loads the right one."""
    saved_with(tiny_exported_bundle, tmp_path / "s", lowering="portable")
    model = edgert.load(tiny_exported_bundle, lowering="ort")
    with pytest.raises(SessionMismatch) as caught:
        edgert.resume(tmp_path / "s", model)
    assert "variant fp32-portable of this bundle, and fp32-ort is loaded" in str(caught.value)
    assert "--variant fp32-portable" in str(caught.value)


def test_a_broken_bundle_is_reported_as_broken(tmp_path):
    bundle = tiny_bundle(tmp_path)
    saved_with(bundle, tmp_path / "s")
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(BadBundle):
        edgert.resume(tmp_path / "s")


def test_a_bundle_that_was_named_and_is_none_is_reported(tmp_path):
    saved_with(tiny_bundle(tmp_path), tmp_path / "s")
    with pytest.raises(BadBundle):
        edgert.resume(tmp_path / "s", bundle=tmp_path / "none")


# How it is loaded


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_it_is_loaded_as_it_was(tiny_exported_bundle, tmp_path, lowering, more):
    """The session's own lowering, threads and prepacking, so that nothing is to be noted."""
    threads = default_threads() + more
    options: dict[str, Any] = {"threads": threads, "prepack": False, "lowering": lowering}
    want = saved_with(tiny_exported_bundle, tmp_path / "s", **options)
    with edgert.resume(tmp_path / "s") as session:
        build = session.model.runner.backend.build
        assert (build["threads"], build["prepack"]) == (str(threads), "false")
        assert session.model.runner.variant_name == f"fp32-{lowering}"
        assert session.notes == ()
        session.generate()
        assert session.tokens == want


def test_what_is_given_wins_and_is_noted(tiny_exported_bundle, tmp_path):
    """Options that are None are not given."""
    saved_with(tiny_exported_bundle, tmp_path / "s", threads=default_threads() + 1, prepack=False)
    with edgert.resume(tmp_path / "s", threads=1, prepack=True, lowering=None) as session:
        assert session.notes == (
            "prepack false → true",
            f"threads {default_threads() + 1} → 1",
        )


@pytest.mark.parametrize("threads", ["", "0", "-1", "many", "1e3", "99999999", "\u0663"])
def test_a_number_of_threads_that_is_none_is_not_taken(tmp_path, threads):
    """What somebody wrote into the file decides nothing that it cannot decide."""
    want = saved_with(tiny_bundle(tmp_path), tmp_path / "s")
    saved = read_session(tmp_path / "s")
    write_session(tmp_path / "s", replace(saved, place={"threads": threads}))
    assert goes_on(tmp_path / "s", threads=1) == want


@pytest.mark.parametrize("name", ["precision", "kv", "lowering"])
def test_the_variant_cannot_be_chosen(tmp_path, name):
    saved_with(tiny_bundle(tmp_path), tmp_path / "s")
    value = {"precision": "fp32", "kv": "fp32", "lowering": "ort"}[name]
    with pytest.raises(UsageError, match=f"{name} cannot be chosen: .* belongs to fp32-ort"):
        edgert.resume(tmp_path / "s", **{name: value})


@pytest.mark.parametrize("options", [{"threads": 2}, {"bundle": "b"}])
def test_a_model_is_not_loaded_with_other_arguments(tmp_path, options):
    session = fake_model().session()
    session.append(PROMPT)
    session.save(tmp_path / "s")
    with pytest.raises(UsageError, match="a model is given"):
        edgert.resume(tmp_path / "s", session.model, **options)


def test_closing_a_session_that_loaded_its_model_closes_both(tmp_path):
    """And a model that was given stays open."""
    bundle = tiny_bundle(tmp_path)
    saved_with(bundle, tmp_path / "s")
    session = edgert.resume(tmp_path / "s")
    session.close()
    with pytest.raises(UsageError, match="the model is closed"):
        session.model.session()
    with edgert.load(bundle) as model:
        edgert.resume(tmp_path / "s", model).close()
        assert model.generate([3], **GREEDY).tokens


def test_a_session_that_does_not_fit_closes_the_model_it_loaded(tmp_path, monkeypatch):
    """Sealed, of this variant, and senseless: nothing stays loaded behind the error."""
    from edgert.model import Model

    saved_with(tiny_bundle(tmp_path), tmp_path / "s")
    saved = read_session(tmp_path / "s")
    write_session(tmp_path / "s", replace(saved, capacity=65))
    closed: list[Model] = []
    close = Model.close
    monkeypatch.setattr(Model, "close", lambda self: (closed.append(self), close(self)))
    with pytest.raises(BadSession, match="in a capacity of 65"):
        edgert.resume(tmp_path / "s")
    assert len(closed) == 1


def test_the_key_goes_with_it(tmp_path):
    """Given to `resume` as to `save`; a wrong one is refused before any bundle is looked for."""
    bundle = tiny_bundle(tmp_path)
    (tmp_path / "key").write_bytes(bytes(range(16)))
    with edgert.load(bundle) as model, model.session() as session:
        session.generate([3, 1, 4], **GREEDY)
        session.save(tmp_path / "s", key_file=tmp_path / "key")
        tokens = session.tokens
    with edgert.resume(tmp_path / "s", key_file=tmp_path / "key") as session:
        assert session.tokens == tokens
    shutil.rmtree(bundle)
    with pytest.raises(WrongKey):
        edgert.resume(tmp_path / "s", passphrase="other")


def test_a_closed_model_takes_no_session(tmp_path):
    session = fake_model().session()
    session.append(PROMPT)
    session.save(tmp_path / "s")
    session.model.close()
    with pytest.raises(UsageError, match="the model is closed"):
        edgert.resume(tmp_path / "s", session.model)


def test_every_refusal_is_an_edgert_error():
    """So that one `except` around `resume` is enough."""
    assert issubclass(SessionMismatch, Incompatible)
    assert issubclass(SessionMismatch, EdgertError)
    assert issubclass(BadSession, EdgertError)
