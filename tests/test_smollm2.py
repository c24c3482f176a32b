"""The demo's real pretrained model, from its GGUF file to the same answers as `transformers`.

Where bundle and truth come from: tests/smollm2.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import HERE, Case, assert_close
from smollm2 import BOTH, NEEDS_MODEL, exported, published
from wheels import ROOT

import edgert
from edgert.cli import main

pytestmark = NEEDS_MODEL

PROMPTS = (
    "The sun is a star that",
    "Water boils at",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "The three most important rules of writing are",
)
TOKENS = 40
MARGIN = 1e-3
"""Where the two best logits are nearer than this, either may win: summation order decides."""

lowerings = pytest.mark.parametrize("lowering", BOTH)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return exported(tmp_path_factory)


@pytest.fixture(scope="module")
def llama() -> Any:
    return published()


@pytest.fixture(scope="module")
def continuations(bundle, llama) -> list[tuple[list[int], np.ndarray]]:
    """Per prompt: `transformers`' own greedy ids, prompt first, and its logits [tokens, V]."""
    out = []
    with edgert.load(bundle) as model:
        prompts = [model.encode(prompt) for prompt in PROMPTS]
    for prompt in prompts:
        ids = torch.tensor([prompt])
        ids = llama.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS
        )
        assert ids.shape[1] == len(prompt) + TOKENS
        logits = llama(ids).logits[0].numpy()
        out.append((ids[0].tolist(), logits))
    return out


def margins(logits: np.ndarray) -> np.ndarray:
    best = np.partition(logits, -2, axis=-1)[:, -2:]
    return np.abs(best[:, 1] - best[:, 0])


@lowerings
def test_logits_equal_transformers_along_its_own_continuation(
    tmp_path_factory, continuations, lowering
) -> None:
    """Teacher-forced: every position's logits, and the best token wherever there is a clear one."""
    unclear = positions = 0
    with edgert.load(exported(tmp_path_factory, lowering), lowering=lowering) as model:
        for prompt, (ids, want) in zip(PROMPTS, continuations, strict=True):
            got = model.logits([ids])[0]
            assert_close(got, want, atol=2e-3, rtol=1e-4, where=prompt)
            clear = margins(want) > MARGIN
            assert (got.argmax(-1) == want.argmax(-1))[clear].all()
            unclear += int((~clear).sum())
            positions += len(clear)
    assert unclear <= positions // 50


@lowerings
def test_free_running_tokens_equal_transformers(tmp_path_factory, continuations, lowering) -> None:
    """40 greedy tokens for each prompt, up to the first step that has no clear winner."""
    compared = 0
    with edgert.load(exported(tmp_path_factory, lowering), lowering=lowering) as model:
        for prompt, (ids, logits) in zip(PROMPTS, continuations, strict=True):
            start = len(ids) - TOKENS
            clear = margins(logits[start - 1 : -1]) > MARGIN
            until = TOKENS if clear.all() else int(clear.argmin())
            got = model.generate(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
            assert list(got.tokens)[:until] == ids[start : start + until], prompt
            compared += until
    assert compared >= 0.9 * TOKENS * len(PROMPTS)


def test_the_sun_is_the_brightest_star(bundle, capsys) -> None:
    """What the README shows, through the command."""
    assert main(["run", str(bundle), "-p", "The sun is a star that", "-n", "12"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The sun is a star that is the brightest star in the night sky.")


def test_the_bundles_tokenizer_gives_the_published_ids(bundle) -> None:
    """The golden ids of public reference lists, and text back from them."""
    golden = json.loads(
        (Case("hagi", HERE / "hagi" / "tokenizer").folder / "golden.json").read_text()
    )
    assert golden
    with edgert.load(bundle) as model:
        assert model.tokenizer
        for entry in golden:
            assert model.encode(entry["text"]) == entry["ids"]
            assert model.tokenizer.decode(entry["ids"], skip_special=False) == entry["text"]


def test_chat_answers_in_turn(bundle, capsys) -> None:
    """`--chat`: the prompt is that of the published template, and the answer ends by itself."""
    question = "What is the capital of France? Answer with one word."
    arguments = ["run", str(bundle), "--chat", "-p", question, "-n", "60", "--json"]
    assert main(arguments) == 0
    value = json.loads(capsys.readouterr().out)
    with edgert.load(bundle) as model:
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        want = model.encode(
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert model.chat_ids([{"role": "user", "content": question}]) == want
    assert value["n_prompt"] == len(want)
    assert "Paris" in value["text"]
    assert value["finish_reason"] == "stop"
    assert "<|im_end|>" not in value["text"]


def test_nothing_is_silently_cut(bundle, capsys) -> None:
    """A prompt beyond the context is refused with both numbers, not shortened."""
    with edgert.load(bundle) as model:
        context = model.manifest.context
    ids = ",".join(["1"] * (context + 1))
    assert main(["run", str(bundle), "--ids", ids]) == 5
    assert f"{context + 1} tokens are more than this model's context of {context}" in (
        capsys.readouterr().err
    )


def test_the_readmes_python_runs(bundle, capsys, tmp_path, monkeypatch) -> None:
    """The README's Python block, with this bundle in place of the demo's."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert "bundles/smollm2-135m-instruct" in block
    names: dict[str, Any] = {}
    block = block.replace("bundles/smollm2-135m-instruct", str(bundle))
    exec(block.replace("examples/", f"{ROOT}/examples/"), names)
    assert capsys.readouterr().out.strip()
    assert names["logits"].shape == (1, 5, 49152)
