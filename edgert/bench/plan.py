"""What is asked of the model: the same tokens on every machine and in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgert import rng
from edgert.errors import CapacityExceeded, UsageError
from edgert.sampler import OFF, SamplingParams
from edgert.spec import Manifest
from edgert.tokenizer import Tokenizer

SEED = 0
TEXT = (
    "The robot wakes before the harbour does. It checks its battery, its wheels and its map, and "
    "then it rolls along the quay, past crates that still smell of salt. At the third crane it "
    "stops: a rope has fallen across the path, and yesterday there was none. How wide is it? Can "
    "it be crossed, or is there a way around? The camera says one thing, the laser another, and "
    "the old map says nothing at all. So it waits, looks again from a little further left, and "
    "decides. Two minutes later it is on its way, with a note for the people who come at eight: "
    "rope at crane 3, 14 cm, please remove. Nobody had told it to write notes; it had simply "
    "learned that a problem found early is a problem half solved.\n\n"
)
"""The built-in text, repeated as often as needed and cut."""

MAX_TEXT_TOKENS = 1 << 16
"""Longest prompt that is made from text: finding the cut reads it several times."""


@dataclass(frozen=True)
class Plan:
    """How much is asked: prompt, answer and depth in tokens; how often."""

    n_prompt: int = 128
    n_gen: int = 64
    n_depth: int = 0  # tokens in the state before the prompt
    repeats: int = 5
    warmup: int = 1
    halt: str | None = None  # when a loop ends for a token of the answer
    speculate: str | int = OFF  # so that runs compare, and a step is a step

    def __post_init__(self) -> None:
        for name, low in (("n_prompt", 1), ("n_gen", 1), ("repeats", 1), ("n_depth", 0)):
            value = getattr(self, name)
            if value < low:
                raise UsageError(f"{name} = {value} is not possible", do=f"use {low} or more")
        if self.warmup < 0:
            raise UsageError(f"warmup = {self.warmup} is not possible", do="use 0 or more")
        SamplingParams(speculate=self.speculate)  # refuses what it cannot be


@dataclass(frozen=True)
class Work:
    """A plan made concrete for one model. `prompt` is text where tokenizing is part of the work.

    `ids` are its tokens, `source` says where they come from. Sampling is greedy and does not end
    at the model's end tokens, so that every request has exactly the planned length.
    """

    plan: Plan
    prompt: str | tuple[int, ...]
    ids: tuple[int, ...]
    depth: tuple[int, ...]
    source: str

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.plan.n_gen,
            temperature=0.0,
            ignore_eos=True,
            halt=self.plan.halt,
            speculate=self.plan.speculate,
        )

    @property
    def sha256(self) -> str:
        """Of depth and prompt."""
        return digest((*self.depth, *self.ids))


def digest(tokens: Sequence[int]) -> str:
    """SHA-256 over the ids as little-endian int64, as 64 hex digits."""
    return hashlib.sha256(np.asarray(tokens, "<i8").tobytes()).hexdigest()


def make_work(plan: Plan, manifest: Manifest, tokenizer: Tokenizer | None) -> Work:
    """The prompt of a plan: the built-in text cut to exactly `n_prompt` tokens, or ids drawn with a
    fixed seed where there is no tokenizer, or no cut of the text has that many tokens.

    Raises CapacityExceeded if all of it is more than the model's context.
    """
    total = plan.n_depth + plan.n_prompt + plan.n_gen
    if total > manifest.context:
        raise CapacityExceeded(
            f"depth {plan.n_depth} + prompt {plan.n_prompt} + answer {plan.n_gen} = {total} tokens "
            f"are more than this model's context of {manifest.context}",
            do="ask for less with -d, -p or -n",
        )
    drawn = _drawn(plan.n_depth + plan.n_prompt, manifest)
    depth, ids = drawn[: plan.n_depth], drawn[plan.n_depth :]
    text = _cut(tokenizer, plan.n_prompt) if tokenizer else None
    if tokenizer is None or text is None:
        return Work(plan, ids, ids, depth, f"ids drawn with seed {SEED}")
    ids = tuple(tokenizer.encode(text))
    source = f"built-in text cut to {plan.n_prompt} tokens"
    if plan.n_depth:
        source += f", behind ids drawn with seed {SEED}"
    return Work(plan, text, ids, depth, source)


def _drawn(count: int, manifest: Manifest) -> tuple[int, ...]:
    """Ids of the vocabulary without its end tokens."""
    vocab, ends = manifest.vocab_size, frozenset(manifest.eos)
    ids = (min(int(rng.uniform(SEED, i) * vocab), vocab - 1) for i in range(count))
    return tuple((i + 1) % vocab if i in ends else i for i in ids)


def _cut(tokenizer: Tokenizer, tokens: int) -> str | None:
    """A beginning of the built-in text that encodes to exactly `tokens` tokens.

    More characters are more tokens, but for a few where a word is cut: so a bisection comes near,
    and a look at the neighbours finds the cut.
    """
    if tokens > MAX_TEXT_TOKENS:
        return None
    text = TEXT
    while len(tokenizer.encode(text)) < tokens:
        text += text

    def count(end: int) -> int:
        return len(tokenizer.encode(text[:end]))

    low, high = 1, len(text)
    while low < high:
        middle = (low + high) // 2
        if count(middle) < tokens:
            low = middle + 1
        else:
            high = middle
    near = sorted(range(max(1, low - 24), min(len(text), low + 24) + 1), key=lambda e: abs(e - low))
    return next((text[:end] for end in near if count(end) == tokens), None)
