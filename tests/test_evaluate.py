"""Perplexity: what is scored given what, computed by hand on a model that is a hash."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
from fake_model import CONTEXT, VOCAB, Graph, fake_model, hashed, ids

import edgert.evaluate
from edgert.errors import EdgertError, UsageError
from edgert.evaluate import Evaluation, cross_entropy, parts, perplexity, read_text, windows
from edgert.runner import SCORE_CHUNK

TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps"


def cost(history: list[int], token: int) -> float:
    """-ln p of a token behind a history, for a model that answers with `hashed`."""
    logits = hashed(np.array(history)).astype(np.float64)
    return float(np.log(np.exp(logits).sum()) - logits[token])


def by_hand(tokens: list[int], window: int, stride: int) -> list[float]:
    """The loop of transformers' guide, token by token: a token that an earlier window scored is
    context, and the first of a window has nothing before it."""
    costs, known = [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        for place in range(max(known, begin + 1), end):
            costs.append(cost(tokens[begin:place], tokens[place]))
        known = end
        if end == len(tokens):
            break
    return costs


@pytest.mark.parametrize(
    ("window", "stride", "tokens"),
    [
        pytest.param(16, 16, 59, id="no overlap: four windows, whose first tokens are not scored"),
        pytest.param(16, 8, 62, id="half a window of context: all but the first token"),
        pytest.param(16, 5, 62, id="a stride that does not divide the window"),
        pytest.param(16, 1, 62, id="as much context as there can be"),
        pytest.param(2, 2, 31, id="pairs"),
        pytest.param(100, 50, 62, id="a window that holds all"),
    ],
)
def test_perplexity_is_what_the_loop_gives_by_hand(window, stride, tokens):
    """Each token once, given what its window holds before it; bytes of scored tokens only."""
    history = ids(TEXT)
    want = by_hand(history, window, stride)
    got = perplexity(fake_model(), TEXT, window=window, stride=stride)
    assert (got.tokens, got.read, got.bytes) == (len(want), len(TEXT), len(want))
    assert len(want) == tokens
    assert got.nll == pytest.approx(sum(want), rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(sum(want) / len(want)), rel=1e-6)
    assert got.bits_per_byte == pytest.approx(sum(want) / len(want) / math.log(2), rel=1e-6)
    assert (got.window, got.stride) == (window, stride)
    assert got.seconds > 0


def test_ids_are_scored_like_their_text():
    """Ids give the same numbers, and need no tokenizer; bits per byte do."""
    with_text = perplexity(fake_model(), TEXT, window=16)
    with_ids = perplexity(fake_model(), ids(TEXT), window=16)
    bare = perplexity(fake_model(tokenizer=None), ids(TEXT), window=16)
    assert with_ids.nll == with_text.nll == bare.nll
    assert with_ids.bits_per_byte == with_text.bits_per_byte
    assert (bare.bytes, bare.bits_per_byte) == (None, None)


def test_ids_without_text_have_no_bits_per_byte():
    """Special tokens only: perplexity, and no bytes to divide by."""
    got = perplexity(fake_model(), [1, 1, 1, 1])
    assert (got.tokens, got.bytes, got.bits_per_byte) == (3, None, None)


def test_the_default_is_half_a_window_of_context():
    """1024 and 512 where the context is long enough, else what there is."""
    long, short = perplexity(fake_model(), "ab"), perplexity(fake_model(context=40), "ab")
    assert (long.window, long.stride) == (1024, 512)
    assert (short.window, short.stride) == (40, 20)


def test_long_windows_are_scored_in_chunks():
    """The first window without its last token, the second one behind 127 tokens of context in one
    step; never more logits than a chunk has at once."""
    assert SCORE_CHUNK == 64
    graph = Graph()
    window, text = 4 * SCORE_CHUNK, "x" * (6 * SCORE_CHUNK)
    got = perplexity(fake_model(graph), text, window=window, stride=window // 2)
    assert got.tokens == len(text) - 1
    assert [tokens for tokens, _ in graph.calls] == [64, 64, 64, 63, 127, 64, 64]
    want = by_hand(ids(text), window, window // 2)
    assert got.nll == pytest.approx(sum(want), rel=1e-6)


def test_limit_and_progress():
    """The text beyond the limit is not read; progress ends at what is."""
    seen: list[tuple[int, int]] = []
    got = perplexity(
        fake_model(), TEXT, window=16, stride=8, limit=30, progress=lambda *at: seen.append(at)
    )
    assert got.nll == perplexity(fake_model(), TEXT[:30], window=16, stride=8).nll
    assert (got.read, got.tokens) == (30, 29)
    assert seen == [(16, 30), (24, 30), (30, 30)]


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    """And the bits of a byte that follow from it."""
    model = fake_model(lambda ids, select, lens, kept: uniform(select, kept))
    got = perplexity(model, TEXT, window=16, stride=16)
    assert got.perplexity == pytest.approx(VOCAB, rel=1e-12)
    assert got.bits_per_byte == pytest.approx(math.log2(VOCAB), rel=1e-12)


def uniform(select, kept, value: float = 3.0):
    logits = np.full((*select.shape, VOCAB), value, np.float32)
    return {"logits": logits, "token": logits.argmax(-1), "kept_next": kept}


def test_cross_entropy_keeps_its_precision():
    """Logits far from zero neither overflow nor lose small probabilities."""
    logits = np.array([[1e4, 1e4 - 40, -1e4], [-500.0, -500.0, -500.0]], np.float32)
    got = cross_entropy(logits, np.array([1, 2]))
    assert got == pytest.approx([40.0, math.log(3)], rel=1e-12)


def test_improbable_beyond_floats_is_infinite_not_an_overflow():
    """A mean above 709 nats has no exponential in float64."""

    def wrong(ids, select, lens, kept):
        answer = uniform(select, kept)
        answer["logits"][..., 0] = 1e6
        return answer

    got = perplexity(fake_model(wrong), TEXT)
    assert got.perplexity == math.inf
    assert got.nll == pytest.approx((1e6 - 3) * (len(TEXT) - 1), rel=1e-6)


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "nan"), (float("-inf"), "nan"), (float("inf"), "nan")]
)
def test_logits_that_are_no_numbers_are_named(value, said):
    """The first token without a probability, with its position."""
    model = fake_model(lambda ids, select, lens, kept: uniform(select, kept, value))
    with pytest.raises(EdgertError, match=rf"gives token {ids('h')[0]} at position 1 .* {said}\)"):
        perplexity(model, TEXT)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("", {}, "a text of no tokens leaves nothing to predict"),
        ("a", {}, "a text of 1 token leaves nothing to predict"),
        (TEXT, {"window": 1}, "window = 1 is not possible"),
        (TEXT, {"window": CONTEXT + 1}, f"window = {CONTEXT + 1} is not possible"),
        (TEXT, {"stride": 0}, "stride = 0 is not possible"),
        (TEXT, {"window": 8, "stride": 9}, "stride = 9 is not possible"),
        (TEXT, {"limit": 1}, "limit = 1 tokens leaves nothing to predict"),
        ([3, VOCAB], {}, f"token id {VOCAB} at position 1 is outside the vocabulary of {VOCAB}"),
        ([[3, 4]], {}, "token ids must be a flat list of integers"),
        ("a\ud800b", {}, "lone surrogate"),
    ],
)
def test_what_cannot_be_scored_is_refused(given, options, message):
    with pytest.raises(UsageError, match=message):
        perplexity(fake_model(), given, **options)


def test_text_needs_a_tokenizer():
    with pytest.raises(UsageError, match="no tokenizer, so it cannot read text"):
        perplexity(fake_model(tokenizer=None), TEXT)


def test_a_closed_model_says_so():
    model = fake_model()
    model.close()
    with pytest.raises(UsageError, match="the model is closed"):
        perplexity(model, TEXT)


def test_windows_cover_every_token_once():
    """For all small shapes: no gap, no overlap of what is new, no window beyond the text."""
    for total in range(2, 20):
        for window in range(2, 9):
            for stride in range(1, window + 1):
                new = []
                for begin, context, end in windows(total, window, stride):
                    assert 0 <= begin < end <= min(total, begin + window)
                    new += range(begin + context, end)
                assert new == list(range(total)), (total, window, stride)


# ------------------------------------------------------------- texts


def test_parts_are_cut_behind_lone_line_ends():
    """Between characters that are not white space if there is such a place, else at a line end,
    else anywhere; nothing is lost."""
    assert list(parts("ab\ncd\n\nef", 8)) == ["ab\n", "cd\n\nef"]
    assert list(parts("abc\n\ndef", 6)) == ["abc\n\n", "def"]
    assert list(parts("abcdefgh", 3)) == ["abc", "def", "gh"]
    assert list(parts("", 3)) == []
    text = "one\ntwo\n\n three\n" * 50
    for size in range(1, 60):
        found = list(parts(text, size))
        assert "".join(found) == text
        assert max(map(len, found)) <= size


def test_a_text_in_parts_has_the_same_tokens(tiny_bundle, monkeypatch):
    """With a real tokenizer, cut into many parts."""
    text = "Hello world.\nThis is a line,\n\nand another one!\nThe end\n" * 20
    with edgert.load(tiny_bundle) as model:
        whole = edgert.evaluate.encoded(model, text, None)
        monkeypatch.setattr(edgert.evaluate, "PART", 50)
        monkeypatch.setattr(parts, "__defaults__", (50,))
        cut = edgert.evaluate.encoded(model, text, None)
    assert len(whole) > 100
    assert cut.tolist() == whole.tolist()


def test_special_token_text_is_plain_text(tiny_bundle):
    """A text is data: what is written in it cannot become a control token."""
    with edgert.load(tiny_bundle) as model:
        assert model.tokenizer is not None
        special = model.tokenizer.specials[0]
        got = perplexity(model, f"a{special}b")
    assert got.bytes == len(special) + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the data file is empty"), (b"ab\xffc", "not UTF-8: invalid start byte at byte 2")],
)
def test_bad_text_files_are_refused(tmp_path, content, message):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_text(path)
    assert caught.value.where == str(path)


def test_only_regular_files_are_read(tmp_path):
    """A folder, and a pipe that nobody writes to, which would wait for ever; a link is followed."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match="not a regular file"):
            read_text(path)
    (tmp_path / "data.txt").write_text("héllo")
    (tmp_path / "link").symlink_to("data.txt")
    assert read_text(tmp_path / "link") == "héllo"


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file or directory"):
        read_text(tmp_path / "absent.txt")


def test_large_files_are_refused(tmp_path, monkeypatch):
    """With the limit, before they are decoded."""
    monkeypatch.setattr(edgert.evaluate, "MAX_DATA_BYTES", 10)
    (tmp_path / "data.txt").write_bytes(b"x" * 11)
    with pytest.raises(UsageError, match="more than 10 bytes"):
        read_text(tmp_path / "data.txt")


# ------------------------------------------------------------- the command


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("Hello world, this is a text.\nIt has two lines.\n" * 4)
    return path


def test_eval_prints_what_was_scored_and_how(run, tiny_bundle, data):
    """Both numbers, window and stride, what is not scored; progress goes to stderr."""
    got = run("eval", tiny_bundle, "--data", data, "--window", 32, "--stride", 16)
    assert got.code == 0
    with edgert.load(tiny_bundle) as model:
        want = perplexity(model, data.read_text(), window=32, stride=16)
    lines = got.out.splitlines()
    assert lines[0] == f"perplexity     {want.perplexity:.4f}"
    assert lines[1] == f"bits per byte  {want.bits_per_byte:.4f}"
    text = " ".join(got.out.split())
    assert f"{want.tokens:,} of {want.read:,} tokens" in text
    assert "window of 32 tokens, stride 16" in text
    assert "given 16 to 31 tokens before it" in text
    assert "first token of the text is not scored" in text
    assert "tok/s" in got.err
    assert "tok/s" not in got.out


def test_eval_says_which_tokens_have_no_context(run, tiny_bundle, data):
    got = run("eval", tiny_bundle, "--data", data, "--window", 16, "--stride", 16)
    assert "the first token of each window is not scored" in " ".join(got.out.split())


def test_eval_json_is_one_object(run, tiny_bundle, data):
    """The fields of Evaluation, and what was measured on what."""
    got = run("eval", tiny_bundle, "--data", data, "--window", 32, "--limit", 40, "--json", "-q")
    value = json.loads(got.out)
    assert got.err == ""
    assert set(Evaluation.__dataclass_fields__) <= set(value)
    assert value["read"] == 40
    assert value["tokens"] == 39
    assert value["data_bytes"] == len(data.read_bytes())
    assert len(value["data_sha256"]) == 64
    assert value["variant"] == "fp32-ort"
    assert value["first_token"] == "not scored"


def test_eval_json_has_no_infinity(run, tiny_bundle, data, monkeypatch):
    """JSON has no such number."""
    real = edgert.evaluate.perplexity
    from dataclasses import replace

    monkeypatch.setattr(
        edgert.evaluate,
        "perplexity",
        lambda *a, **k: replace(real(*a, **k), perplexity=math.inf),
    )
    got = run("eval", tiny_bundle, "--data", data, "--json")
    assert json.loads(got.out, parse_constant=pytest.fail)["perplexity"] is None


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", (), "the data file is empty"),
        (b"a", (), "a text of 1 token"),
        (b"\xff", (), "not UTF-8"),
        (b"abcd", ("--window", "99999"), "window = 99999 is not possible"),
    ],
)
def test_eval_refuses_with_exit_code_2(run, tiny_bundle, tmp_path, content, options, message):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    got = run("eval", tiny_bundle, "--data", path, *options)
    assert (got.code, got.out) == (2, "")
    assert message in got.err


def test_eval_without_a_tokenizer(run, model_a_bundle, data):
    got = run("eval", model_a_bundle, "--data", data)
    assert got.code == 2
    assert "no tokenizer" in got.err
