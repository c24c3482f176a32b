"""How well a model predicts a text: perplexity, and bits per byte.

The convention is that of transformers' guide on perplexity (a sliding window):

    window  tokens the model sees at once; each window starts with an empty state
    stride  how far the next window moves; window - stride of its tokens are context that the
            window before has scored already, so that every token is scored once
    start   a token with nothing before it in its window is not predicted: the first one of the
            text and, where stride = window leaves no context, the first one of each window. No
            BOS is put before a text.

Every scored token counts alike. (The guide averages windows, of which it counts one token less
than it has scored: it differs by less than one token in a window.)
"""

from __future__ import annotations

import math
import os
import stat
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgert.errors import EdgertError, UsageError
from edgert.files import read_at_most
from edgert.generate import check_ids
from edgert.programs import solves_puzzles
from edgert.runner import SCORE_CHUNK, Execution

if TYPE_CHECKING:
    from edgert.model import Model

WINDOW = 1024
"""The default window, where the model's context is that long; half of it is the default stride."""

MAX_DATA_BYTES = 2**30
PART = 2**20
"""Characters encoded at once. A longer text is cut at line ends between two characters that are
not white space, where no common tokenizer joins what stands on both sides."""


@dataclass(frozen=True)
class Evaluation:
    """What a text cost the model.

    nll     nats, the sum over the scored tokens; perplexity = exp(nll / tokens)
    tokens  that were scored, of `read` tokens in the text
    bytes   of text in the scored tokens, in UTF-8; bits_per_byte = nll / ln 2 / bytes. Both are
            None without a tokenizer, or where the tokens have no text.
    seconds of wall time in the scoring, without encoding
    """

    perplexity: float
    bits_per_byte: float | None
    nll: float
    tokens: int
    read: int
    bytes: int | None
    window: int
    stride: int
    seconds: float


def perplexity(
    model: Model,
    text_or_ids: str | Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a text, or token ids, of any length.

    window    tokens, 2 to the model's context (default: 1024, or the context if it is shorter)
    stride    tokens, 1 to window (default: half a window)
    limit     read this many tokens at most
    progress  called behind every window with the tokens read so far, and all there are to read

    Special-token text within a text is plain text. Logits are float32 [64, V] at a time, their
    log-softmax is taken in float64. Raises UsageError (window, stride, limit, ids, fewer than two
    tokens, no tokenizer), EdgertError if the model gives a token no probability, OutOfMemory.
    """
    window, stride = _shape(model, window, stride)
    if limit is not None and limit < 2:
        raise UsageError(f"limit = {limit} tokens leaves nothing to predict", do="use 2 or more")
    ids = encoded(model, text_or_ids, limit)
    if len(ids) < 2:
        have = "1 token" if len(ids) == 1 else "no tokens"
        raise UsageError(f"a text of {have} leaves nothing to predict", do="give a longer text")
    start = time.perf_counter()
    nll, scored = 0.0, np.zeros(len(ids), np.bool_)
    execution = model.runner.open(tokens=min(window, len(ids)))
    try:
        for begin, context, end in windows(len(ids), window, stride):
            costs = _costs(execution, ids[begin:end], context)
            if not np.isfinite(costs).all():
                bad = int(np.argmin(np.isfinite(costs)))
                place = end - len(costs) + bad
                raise EdgertError(
                    f"the model gives token {ids[place]} at position {place} no probability "
                    f"(its cost is {costs[bad]})",
                    do="check the bundle with `edgert verify`; perplexity has no value here",
                )
            nll += float(costs.sum())
            scored[end - len(costs) : end] = True
            if progress is not None:
                progress(end, len(ids))
    finally:
        execution.close()
    seconds = time.perf_counter() - start
    tokens = int(scored.sum())
    nbytes = _text_bytes(model, ids[scored])
    mean = nll / tokens
    return Evaluation(
        perplexity=math.exp(mean) if mean < 709 else math.inf,  # beyond: more than a float holds
        bits_per_byte=nll / math.log(2) / nbytes if nbytes else None,
        nll=nll,
        tokens=tokens,
        read=len(ids),
        bytes=nbytes,
        window=window,
        stride=stride,
        seconds=seconds,
    )


def windows(total: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, context, end) of each window over `total` tokens: the first `context` of its tokens
    have been scored before, the rest of them are new."""
    known = 0
    for begin in range(0, total, stride):
        end = min(begin + window, total)
        yield begin, known - begin, end
        if end == total:
            return
        known = end


def _shape(model: Model, window: int | None, stride: int | None) -> tuple[int, int]:
    context = model.manifest.context
    window = min(WINDOW, context) if window is None else window
    if not 2 <= window <= context:
        raise UsageError(f"window = {window} is not possible", do=f"use 2 to {context} tokens")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UsageError(
            f"stride = {stride} is not possible",
            do=f"use 1 to {window}, the window: a longer one would pass tokens over",
        )
    return window, stride


def _costs(execution: Execution, ids: NDArray[np.int64], context: int) -> NDArray[np.float64]:
    """-ln p of the tokens of one window [T] behind its context, each given all before it.

    Without context the first token has nothing before it, so there is one cost less.
    """
    execution.reset()
    first = max(1, context)
    for _ in execution.feed(ids[: first - 1]):
        pass
    costs = np.empty(len(ids) - first, np.float64)
    logits = np.empty((SCORE_CHUNK, execution.runner.manifest.vocab_size), np.float32)
    for start in range(first, len(ids), SCORE_CHUNK):
        wanted = ids[start : start + SCORE_CHUNK]
        out = logits[: len(wanted)]
        execution.score(ids[start - 1 : start - 1 + len(wanted)], out)
        costs[start - first : start - first + len(wanted)] = cross_entropy(out, wanted)
    return costs


def cross_entropy(logits: NDArray[np.float32], wanted: NDArray[np.int64]) -> NDArray[np.float64]:
    """-ln softmax(logits)[wanted] per row: float32 [T, V], int [T] -> float64 [T]."""
    chosen = logits[np.arange(len(wanted)), wanted].astype(np.float64)
    best = logits.max(axis=-1).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):  # infinite logits: the caller looks
        powers = logits.astype(np.float64)
        powers -= best[:, None]
        np.exp(powers, out=powers)
        costs: NDArray[np.float64] = np.log(powers.sum(axis=-1)) + best - chosen
    return costs


def divergence(want: NDArray[np.float32], got: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(softmax(want) || softmax(got)) per row, in nats: float32 [T, V] -> float64 [T]."""
    p, q = _log_softmax(want), _log_softmax(got)
    found: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return found


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def encoded(model: Model, given: str | Sequence[int], limit: int | None) -> NDArray[np.int64]:
    """Checked token ids [T], `limit` of them at most."""
    vocab = model.manifest.vocab_size
    if not isinstance(given, str):
        known = check_ids(given, vocab, len(given) if hasattr(given, "__len__") else 0)
        return np.asarray(known, np.int64)[:limit]
    if model.manifest.solves:
        raise solves_puzzles(str(model.bundle.root))
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UsageError(
            "this bundle has no tokenizer, so it cannot read text",
            where=str(model.bundle.root),
            do="export it again with --tokenizer FILE",
        )
    ids = array("q")
    for part in parts(given):
        encoded = tokenizer.encode(part, special=False)
        ids.extend(check_ids(encoded, vocab, len(encoded)))
        if limit is not None and len(ids) >= limit:
            break
    return np.frombuffer(ids, np.int64)[:limit] if ids else np.empty(0, np.int64)


def parts(text: str, size: int = PART) -> Iterator[str]:
    """A text in parts of at most `size` characters, cut where it does not matter if possible."""
    start = 0
    while len(text) - start > size:
        end = _cut(text, start, start + size)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _cut(text: str, start: int, end: int) -> int:
    place = text.rfind("\n", start + 1, end)
    fallback = place + 1 if place >= 0 else end
    while place >= 0:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place + 1
        place = text.rfind("\n", start + 1, place)
    return fallback


def _text_bytes(model: Model, ids: NDArray[np.int64]) -> int | None:
    """Bytes of text in these tokens. Exact for tokenizers that work on bytes; one that puts a
    space before a text counts it."""
    if model.tokenizer is None:
        return None
    found, counts = np.unique(ids, return_counts=True)
    lengths = [len(model.tokenizer.token_bytes(int(token))) for token in found]
    return int(np.dot(lengths, counts)) or None


def read_text(path: Path) -> str:
    """A user's text file: regular, UTF-8, not empty, at most 1 GiB. Raises UsageError otherwise."""
    try:
        data = _read(path)
    except OSError as error:
        raise UsageError(
            f"the data file cannot be read: {error.strerror}", where=str(path)
        ) from error
    if not data:
        raise UsageError("the data file is empty", where=str(path), do="give a text to predict")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the data file is not UTF-8: {error.reason} at byte {error.start}",
            where=str(path),
            do="convert it, for example with iconv",
        ) from None


def _read(path: Path) -> bytes:
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UsageError("the data is not a regular file", where=str(path))
        with open(descriptor, "rb", closefd=False) as file:
            data = read_at_most(file, MAX_DATA_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_DATA_BYTES:
        raise UsageError(
            f"the data file has more than {MAX_DATA_BYTES:,} bytes",
            where=str(path),
            do="give a part of it",
        )
    return data
