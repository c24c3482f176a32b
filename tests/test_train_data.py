"""From text to training windows: the corpus, its split, shards, the sampler."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_recipe
from cases import cases

from edgert.errors import BadCheckpoint, BadFile, BadTokenizer, EdgertError, UsageError
from edgert.progress import Reporter
from edgert.tokenizer import HFTokenizer
from edgert.train import corpus, prepare
from edgert.train.data import Sampler, open_shard, shard_paths, write_shards
from edgert.train.recipe import read_recipe

(STREAM,) = cases("hagi", lambda case: case.name == "data_stream")


def stream(seed: int = 42) -> Sampler:
    return Sampler([open_shard(path) for path in shard_paths(STREAM.folder)], 32, seed)


def test_the_published_batches_are_drawn():
    """Shard by shard and start by start, as the published sampler does: exact."""
    sampler = stream(STREAM.meta["config"]["sampler_seed"])
    for x, y in zip(STREAM["x"], STREAM["y"], strict=True):
        got = sampler.batch(len(x))
        np.testing.assert_array_equal(got[0], x)
        np.testing.assert_array_equal(got[1], y)


def test_a_sampler_goes_on_from_its_state():
    """Through JSON, which has to carry integers of 128 bits."""
    one, two = stream(), stream(7)
    one.batch(5)
    two.restore(json.loads(json.dumps(one.state)))
    np.testing.assert_array_equal(one.batch(50)[0], two.batch(50)[0])


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        {},
        {"bit_generator": "MT19937"},
        {"bit_generator": "PCG64", "state": {"state": "x"}},
    ],
)
def test_a_strange_state_is_refused(state):
    with pytest.raises(BadCheckpoint, match="state of the sampler's random numbers is unusable"):
        stream().restore(state)


def test_a_state_that_numpy_would_bend_is_refused():
    """A floating number is not silently made a whole one."""
    with pytest.raises(BadCheckpoint, match="it is not what numpy writes"):
        stream().restore(stream().state | {"uinteger": 3.7})


def test_a_window_longer_than_a_shard_is_refused():
    with pytest.raises(UsageError, match="a window of 400 tokens needs shards of 402: shard 2"):
        Sampler([open_shard(path) for path in shard_paths(STREAM.folder)], 400, 1)


def test_shards_are_cut_between_documents(tmp_path):
    """Little-endian uint16, an end token behind each document, none inside of two shards."""
    documents = [np.arange(n, dtype=np.uint16) + 1 for n in (5, 3, 4, 300)]
    paths = write_shards(tmp_path, documents, 0, shard_tokens=8)
    assert [p.name for p in paths] == ["shard_00000.bin", "shard_00001.bin"]
    assert paths[0].read_bytes() == bytes((1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 0, 0)) + bytes(
        (1, 0, 2, 0, 3, 0, 0, 0)
    )
    assert open_shard(paths[1]).tolist() == [1, 2, 3, 4, 0, *range(1, 301), 0]


@pytest.mark.parametrize("data", [b"", b"odd"])
def test_a_broken_shard_is_refused(tmp_path, data):
    path = tmp_path / "shard_00000.bin"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=f"a shard of {len(data)} bytes does not hold"):
        open_shard(path)


def test_the_builtin_corpus_is_large_and_the_same_each_time():
    """At least 4 MB of text; the Python version is said, and the hash is that of the content."""
    one, two = corpus.builtin(), corpus.builtin()
    assert one.size >= corpus.BUILTIN_BYTES
    assert one.sha256() == two.sha256()
    assert one.origin["python"].startswith("3.")
    names = [document.name for document in one.documents]
    assert len(set(names)) == len(names)
    assert "topics/while" in names
    assert "argparse.py" in names
    assert not any("site-packages" in name or "/test" in name for name in names)


def test_a_library_without_sources_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(EdgertError, match=r"source text has [\d,]+ bytes here, 4,000,000"):
        corpus.builtin()


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", ".git/x", "a/.hidden", "empty"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty" else f"text of {name}\n")
    found = corpus.from_path(tmp_path)
    assert [d.name for d in found.documents] == ["a/z.txt", "b.txt"]
    assert found.documents[1].read() == "text of b.txt\n"


def test_invalid_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "bad.txt").write_bytes(b"ab\xffcd")
    with pytest.raises(BadFile, match=r"byte 0xff at offset 2") as caught:
        corpus.from_path(tmp_path)
    assert caught.value.where == str(tmp_path / "bad.txt")


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_no_text_is_an_error(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(BadFile, match="there is no text to train on"):
        corpus.from_path(tmp_path)


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="no such file or folder of text"):
        corpus.from_path(tmp_path / "nothing")


@pytest.mark.parametrize("holdout", [0.0, 0.1, 0.25, 0.5])
def test_a_split_loses_nothing_and_keeps_lines_whole(tmp_path, holdout):
    """The training part and what is held out are the text; the border is behind a line."""
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"line of file {i}, ünïcode\n" * 10)
    whole = corpus.from_path(tmp_path)
    got = corpus.split(whole, holdout)
    train = "".join(d.read() for d in got.train)
    assert train + got.heldout == "".join(d.read() for d in whole.documents)
    assert train.endswith("\n")
    assert sum(d.size for d in got.train) == len(train.encode())
    assert len(got.heldout.encode()) == pytest.approx(holdout * whole.size, abs=30)


def test_a_text_of_one_line_is_cut_at_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("ü" * 100)
    got = corpus.split(corpus.from_path(tmp_path), 0.105)
    assert got.train[0].read() + got.heldout.rstrip("\n") == "ü" * 100


def prepared(path: Path, run: Path) -> prepare.Prepared:
    run.mkdir()
    recipe = read_recipe(path)
    prepare.prepare(recipe, run, Reporter())
    return prepare.open_data(recipe, run)


def test_bytes_become_shards_and_held_out_text(tmp_path):
    """id = byte + 1, 0 ends a document; what is held out is a text file."""
    got = prepared(tiny_recipe.write(tmp_path), tmp_path / "run")
    text = (tmp_path / "text.txt").read_text()
    heldout = (tmp_path / "run" / "heldout.txt").read_text()
    assert text.endswith(heldout)
    assert got.heldout.tolist() == [b + 1 for b in heldout.encode()]
    (shard,) = got.shards
    assert shard.tolist() == [b + 1 for b in text[: -len(heldout)].encode()] + [0]
    assert (got.byte_offset, got.eos, got.tokenizer_json) == (1, 0, None)
    assert got.lengths.tolist() == [0] + [1] * 256


def test_a_vocabulary_is_learnt_from_the_training_text(tmp_path):
    """The same each time, id 0 ends a text, and every byte has an id."""
    path = tiny_recipe.write(tmp_path, ("[train]", "bpe = 300\n\n[train]"))
    one, two = (prepared(path, tmp_path / name) for name in ("one", "two"))
    assert one.tokenizer_json == two.tokenizer_json
    assert (one.byte_offset, one.eos) == (None, 0)
    tokenizer = HFTokenizer(one.tokenizer_json.encode(), where="here")
    text = (tmp_path / "text.txt").read_text()
    assert tokenizer.decode(one.shards[0].tolist()) + tokenizer.decode(one.heldout.tolist()) == text
    assert int(one.shards[0].max()) < 300
    assert int(one.lengths[one.heldout].sum()) == len((tmp_path / "one/heldout.txt").read_bytes())
    assert tokenizer.decode(tokenizer.encode("→ \x00 ü", special=False)) == "→ \x00 ü"


def test_a_tokenizer_file_must_say_what_ends_a_text(tmp_path):
    learnt = prepared(
        tiny_recipe.write(tmp_path, ("[train]", "bpe = 300\n\n[train]")), tmp_path / "one"
    )
    (tmp_path / "mine.json").write_text(
        learnt.tokenizer_json.replace("<|endoftext|>", "<fin>"), encoding="utf-8"
    )
    entry = 'tokenizer = "mine.json"\n'
    sized = ("use_gdr = true", "use_gdr = true\nvocab_size = 300")
    with pytest.raises(BadTokenizer, match="none of the customary tokens that end a text"):
        prepared(tiny_recipe.write(tmp_path, sized, ("[train]", entry + "[train]")), tmp_path / "2")
    with pytest.raises(BadTokenizer, match="has not '<stop>'"):
        prepared(
            tiny_recipe.write(tmp_path, sized, ("[train]", entry + 'eos = "<stop>"\n[train]')),
            tmp_path / "3",
        )
    path = tiny_recipe.write(tmp_path, sized, ("[train]", entry + 'eos = "<fin>"\n[train]'))
    assert prepared(path, tmp_path / "4").eos == 0


def shards(folder: Path, highest: int = 97) -> Path:
    rng = np.random.default_rng(0)
    (folder / "tokens").mkdir()
    for i in range(3):
        ids = rng.integers(33, highest, 400 + i).astype("<u2")
        ids[100] = 0
        (folder / "tokens" / f"shard_{i:05}.bin").write_bytes(ids.tobytes())
    return tiny_recipe.write(folder, ('path = "text.txt"', 'shards = "tokens"'))


def test_of_ready_shards_the_last_is_held_out(tmp_path):
    """As text without end tokens, and read back as the same tokens."""
    got = prepared(shards(tmp_path), tmp_path / "run")
    assert [len(s) for s in got.shards] == [400, 401]
    last = np.fromfile(tmp_path / "tokens" / "shard_00002.bin", "<u2")
    np.testing.assert_array_equal(got.heldout, last[last != 0])


def test_ready_shards_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(BadFile, match="the shard holds token 29., the model has 257 entries"):
        prepared(shards(tmp_path, 299), tmp_path / "run")


def test_changed_data_is_noticed(tmp_path):
    """A run trains on what it was started with, or says what is not."""
    path, run = tiny_recipe.write(tmp_path), tmp_path / "run"
    prepared(path, run)
    for name in ("heldout.txt", "data/shard_00000.bin"):
        data = (run / name).read_bytes()
        (run / name).write_bytes(data[:-2] + b"zz")
        with pytest.raises(BadFile, match="not what this run was started with") as caught:
            prepare.open_data(read_recipe(path), run)
        assert caught.value.where == str(run / name)
        (run / name).write_bytes(data)
    (run / "run.json").write_text("[]")
    with pytest.raises(BadFile, match=r"run\.json is not one that this version writes"):
        prepare.open_data(read_recipe(path), run)
