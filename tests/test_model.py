"""Model: what `load` chooses and refuses, and real exported decoders through the whole runtime."""

from __future__ import annotations

import threading
from dataclasses import replace

import bundles
import numpy as np
import pytest
from cases import assert_close
from fake_model import VOCAB, Graph, fake_model, hashed, manifest

import edgert
from edgert.errors import (
    BadTokenizer,
    CapacityExceeded,
    Incompatible,
    OutOfMemory,
    UnsupportedModel,
    UsageError,
)
from edgert.model import choose_variant, variant_at_hand
from edgert.spec import VariantSpec

ATOL = 2e-4  # fp32, other chunks: sums in another order, over logits of a few tens


def variants(*names: str) -> dict[str, VariantSpec]:
    """'int8-ort' -> a variant of that precision and lowering."""
    made = {}
    for name in names:
        precision, lowering = name.split("-")
        made[name] = VariantSpec(precision, lowering, {}, {})  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize(
    ("has", "asked", "chosen"),
    [
        (("fp32-portable", "fp32-ort"), {}, "fp32-ort"),
        (("int8-ort", "fp32-portable"), {}, "fp32-portable"),
        (("int8-ort", "fp32-ort"), {"precision": "int8"}, "int8-ort"),
        (("fp32-ort", "fp32-portable"), {"lowering": "portable"}, "fp32-portable"),
        (("fp32-modern", "int4-portable"), {}, "int4-portable"),
        (("bf16-ort", "int4-ort"), {}, "int4-ort"),
        (("bf16-ort",), {}, "bf16-ort"),
    ],
)
def test_the_best_variant_that_fits_is_chosen(has, asked, chosen):
    """Accuracy first, then speed; a precision this version does not know comes last."""
    made = manifest(variants=variants(*has))
    assert choose_variant(made, "auto", asked.get("precision"), asked.get("lowering")) == chosen


@pytest.mark.parametrize(
    ("device", "asked", "message"),
    [
        ("cpu", ("int4", None), "no variant int4"),
        ("cpu", ("fp32", "modern"), "no variant fp32 modern"),
        ("npu", (None, None), "no device 'npu'"),
    ],
)
def test_a_variant_that_is_not_there_is_refused(device, asked, message):
    made = manifest(variants=variants("fp32-ort", "int8-ort"))
    with pytest.raises(Incompatible, match=message) as caught:
        choose_variant(made, device, *asked)
    assert ("auto, cpu" if device == "npu" else "fp32-ort, int8-ort") in str(caught.value)


def test_a_bundle_for_other_devices_only_is_refused():
    made = manifest(variants=variants("fp32-modern"))
    with pytest.raises(Incompatible, match="no variant for device cpu"):
        choose_variant(made, "cpu", None, None)


def test_what_the_device_has_at_hand_comes_first(monkeypatch):
    """An engine is there for one variant alone: it is measured and checked, as `load` takes it,
    and the device is let go again."""
    has = variants("fp32-portable", "fp16-portable")
    made = manifest(variants={name: replace(v, variant_id=name) for name, v in has.items()})
    closed = []

    class Device:
        def ready(self, variant_id: str) -> bool:
            return variant_id == "fp16-portable"

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr("edgert.model.open_backend", lambda device: Device())
    assert choose_variant(made, "tensorrt") == "fp32-portable"
    assert variant_at_hand(made, "tensorrt") == "fp16-portable"
    assert variant_at_hand(made, "tensorrt", "fp32") == "fp32-portable"
    assert len(closed) == 2


def test_an_unknown_device_is_refused_by_load(tiny_bundle):
    with pytest.raises(Incompatible, match="no device 'npu'"):
        edgert.load(tiny_bundle, "npu")


# Scoring


def test_scoring_gives_each_row_its_own_history():
    ids = np.random.default_rng(3).integers(0, VOCAB, (3, 70))
    got = fake_model().logits(ids)
    want = [[hashed(row[: i + 1]) for i in range(70)] for row in ids]
    assert np.array_equal(got, np.array(want))
    assert got.dtype == np.float32


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"not of shape \(2,\)"),
        ([], r"not of shape \(0,\)"),
        ([[], []], r"not of shape \(2, 0\)"),
        ([[1], [2, 3]], r"ids must be \[batch, tokens\]: "),
        ([[1.0]], "not float64"),
        ([[1, VOCAB]], "token id 258 at position 1"),
        ([[1], [-1]], "token id -1"),
    ],
)
def test_ids_to_score_are_checked(ids, message):
    graph = Graph()
    with pytest.raises(UsageError, match=message):
        fake_model(graph).logits(ids)
    assert graph.calls == []


def test_too_much_to_score_is_refused():
    """Beyond the context; and where the logits would not fit in any memory."""
    with pytest.raises(CapacityExceeded, match="9 tokens .* context of 8"):
        fake_model(context=8).logits([[1] * 9])
    results = manifest().results
    large = replace(results["logits"], shape=("batch", "select", 2**55))
    model = fake_model(vocab_size=2**55, results=results | {"logits": large})
    with pytest.raises(OutOfMemory, match="MB for the logits") as caught:
        model.logits([[1] * 4096])
    assert "fewer or shorter" in str(caught.value)


# Text


def test_text_needs_a_tokenizer():
    model = fake_model(tokenizer=None)
    with pytest.raises(UsageError, match="no tokenizer, so it cannot read text") as caught:
        model.generate("hello")
    assert "--tokenizer" in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"tokenizer": None, "chat_template": "t.jinja"}])
def test_a_chat_needs_a_template(changes):
    with pytest.raises(UsageError, match="no chat template"):
        fake_model(**changes).chat_ids([{"role": "user", "content": "hi"}])


def test_a_chat_template_is_rendered_and_encoded(tmp_path):
    root = bundles.tiny_bundle(tmp_path)
    with edgert.load(root) as model:
        assert model.chat_ids([{"role": "user", "content": "hi"}]) == [ord("h"), ord("i")]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"\xff{{ messages }}", BadTokenizer, "chat template is not UTF-8"),
        (b"x" * (4 * 2**20 + 1), edgert.BadBundle, "4,194,305 bytes"),
    ],
)
def test_a_broken_chat_template_is_refused(tmp_path, content, error, message):
    """Read only when it is needed, so it is this call that must bound it."""
    root = bundles.tiny_bundle(tmp_path)
    with edgert.load(root) as model:
        (root / "chat_template.jinja").write_bytes(content)
        with pytest.raises(error, match=message) as caught:
            model.chat_ids([{"role": "user", "content": "hi"}])
    assert "chat_template.jinja" in str(caught.value)


# Hand-made and exported bundles, through ONNX Runtime


def test_the_placement_names_variant_and_backend(tiny_bundle):
    with edgert.load(tiny_bundle, lowering="portable") as model:
        assert model.placement.startswith("fp32-portable · onnxruntime ")


def test_a_bundle_that_is_no_decoder_is_refused_on_load(tmp_path):
    def rename(made):
        state = replace(made.states["k.0"], shape=("batch", 1, "capacity", "width"))
        return replace(made, states=made.states | {"k.0": state})

    root = bundles.tiny_bundle(tmp_path, edit=rename)
    with pytest.raises(UnsupportedModel, match=r"states.k.0: the axes \['capacity', 'width'\]"):
        edgert.load(root)


def test_a_hand_made_graph_gives_what_can_be_computed_by_hand(tmp_path):
    """Its logits are a table's row plus the sum of all ids so far."""
    ids = np.random.default_rng(2).integers(0, bundles.VOCAB, (2, 64))
    with edgert.load(bundles.tiny_bundle(tmp_path)) as model:
        got = model.logits(ids)
    want = bundles.TABLE[ids] + ids.cumsum(1)[..., None]
    assert_close(got, want, rtol=1e-6, where="logits")


@pytest.fixture(scope="module", params=["ort", "portable"])
def model(request, tiny_bundle):
    with edgert.load(tiny_bundle, lowering=request.param) as loaded:
        yield loaded


def some_ids(model, *shape: int) -> np.ndarray:
    return np.random.default_rng(9).integers(0, model.manifest.vocab_size, shape)


def test_scoring_equals_single_steps(model):
    """Rows in one go, and token by token through a session's own steps."""
    ids = some_ids(model, 2, 20)
    scored = model.logits(ids)
    for row, want in zip(ids, scored, strict=True):
        execution = model.runner.open()
        for place, token in enumerate(row):
            got = execution.step(int(token)).logits[0, 0]
            assert_close(got, want[place], atol=ATOL, where=f"position {place}")


def test_a_continued_session_equals_one_long_prompt(model):
    """What is said in parts has the logits of the whole, teacher-forced."""
    first, second = some_ids(model, 2, 9)
    with model.session() as session:
        session.generate(first, max_tokens=5, ignore_eos=True)
        session.append(second)
        last = session.execution.last
        want = model.logits([session.tokens])[0, -1]
        assert_close(last.logits[0, 0], want, atol=ATOL, where="last logits")


def test_a_pause_between_pieces_is_bitwise_nothing(model):
    """Left early or cut off behind the prefill, the same calls follow, so the same numbers."""
    prompt = some_ids(model, 7)
    options = {"temperature": 1.0, "seed": 5, "logprobs": 0, "ignore_eos": True}
    want = model.generate(prompt, max_tokens=16, **options)
    with model.session() as session:
        session.append(prompt)
        tokens, logprobs = [], []
        while len(tokens) < 16:
            for piece in session.stream((), max_tokens=16, **options):
                tokens.append(piece.token)
                logprobs.append(piece.logprob)
                if len(tokens) % 5 == 0 or len(tokens) == 16:
                    break
    assert tokens == list(want.tokens)
    assert logprobs == list(want.logprobs)


def test_sessions_in_threads_answer_as_alone(model):
    prompts = some_ids(model, 4, 6)
    options = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    results = {}

    def work(i: int) -> None:
        results[i] = model.generate(prompts[i], seed=i, **options).tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert results[i] == model.generate(prompts[i], seed=i, **options).tokens


def test_the_text_is_that_of_the_tokens(model):
    made = model.generate("the star", max_tokens=20)
    assert made.text == model.tokenizer.decode(made.tokens)
    assert len(made.tokens) == 20


def test_closing_under_a_session_is_a_typed_error(tiny_bundle):
    """The library's session is gone, and what was bound to it is freed later without harm."""
    model = edgert.load(tiny_bundle)
    session = model.session()
    stream = session.stream("the")
    next(stream)
    model.close()
    with pytest.raises(UsageError, match="the model is closed"):
        next(stream)
    session.close()
