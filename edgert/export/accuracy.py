"""What few bits cost, of weights or of keys and values: a model against itself in float32.

    kl          the mean divergence of its next-token distribution from float32's, in nats
    top1        share of positions at which both have the same best token
    perplexity  of the text in both, and their ratio, with the standard error of that

Windows are spread over the text; each starts with an empty state, and all its positions but the
first are scored. The text is the standard library's documentation topics (the model may have been
trained on them: the ratio asks for no unseen text), unless another is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from edgert.backends import open_backend
from edgert.bundle import Bundle
from edgert.evaluate import cross_entropy, divergence
from edgert.export.rewriter import Rewriter
from edgert.export.twin import twin
from edgert.models.importers import Imported
from edgert.models.program import Program
from edgert.progress import Reporter
from edgert.runner import Runner
from edgert.spec import Manifest
from edgert.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer

REPORT = "accuracy.json"
TOKENS, WINDOW = 4096, 512
CHARACTERS = 200_000
"""Of the text: what is beyond is not read."""

BUDGET = {"fp32": 1.0, "fp16": 1.001, "int8": 1.005, "int4": 1.03}
"""Largest perplexity ratio of a precision that is meant to be used."""

KV_BUDGET = {"fp32": 1.0, "int8": 1.005}
"""How many times that, for how keys and values are kept."""

Ids: TypeAlias = NDArray[np.int64]
Logits: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Accuracy:
    """One variant against float32 on `tokens` scored tokens."""

    tokens: int
    kl: float
    top1: float
    perplexity: float
    perplexity_fp32: float
    ratio: float
    ratio_error: float


class Sample:
    """Windows of token ids [T] of a text, and where they come from."""

    def __init__(self, windows: list[Ids], origin: dict[str, Any]) -> None:
        self.windows, self.origin = windows, origin


def tokenizer_of(source: Imported) -> Tokenizer | None:
    if source.tokenizer_json is not None:
        return HFTokenizer(source.tokenizer_json.encode())
    return None if source.byte_offset is None else ByteTokenizer(source.byte_offset)


def topics() -> str:
    """The standard library's documentation topics: English of about half a megabyte."""
    found: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(text for _, text in sorted(found.items()))


def sample(
    tokenizer: Tokenizer,
    context: int,
    text: str | None = None,
    tokens: int = TOKENS,
    offset: float = 0.5,
    window: int = WINDOW,
) -> Sample:
    """Windows of `window` tokens, together `tokens`, evenly over the text (default: `topics`).

    offset  where in its stretch of the text a window lies: different ones do not overlap
    """
    chosen = (topics() if text is None else text)[:CHARACTERS]
    ids = np.asarray(tokenizer.encode(chosen, special=False), np.int64)
    window = min(window, context, len(ids))
    count = max(1, min(tokens, len(ids)) // window)
    stretch = len(ids) // count
    starts = [i * stretch + int((stretch - window) * offset) for i in range(count)]
    origin = {
        "text": "pydoc topics" if text is None else "given",
        "sha256": hashlib.sha256(chosen.encode()).hexdigest(),
        "python": platform.python_version(),
        "window": window,
        "windows": count,
    }
    return Sample([ids[start : start + window] for start in starts], origin)


class Tally:
    """Collects windows of ids [T] with the logits [T, V] of float32 and of the quantized model."""

    def __init__(self) -> None:
        self.truth: list[NDArray[np.float64]] = []  # costs of the text
        self.found: list[NDArray[np.float64]] = []
        self.kl: list[NDArray[np.float64]] = []
        self.agree: list[NDArray[np.bool_]] = []

    def add(self, ids: Ids, want: Logits, got: Logits) -> None:
        want, got, following = want[:-1], got[:-1], ids[1:]
        self.truth.append(cross_entropy(want, following))
        self.found.append(cross_entropy(got, following))
        self.kl.append(divergence(want, got))
        self.agree.append(want.argmax(-1) == got.argmax(-1))

    def result(self) -> Accuracy:
        truth, found = np.concatenate(self.truth), np.concatenate(self.found)
        difference = found - truth
        ratio = math.exp(difference.mean())
        return Accuracy(
            tokens=len(truth),
            kl=float(np.concatenate(self.kl).mean()),
            top1=float(np.concatenate(self.agree).mean()),
            perplexity=math.exp(found.mean()),
            perplexity_fp32=math.exp(truth.mean()),
            ratio=ratio,
            ratio_error=float(ratio * difference.std() / math.sqrt(len(difference))),
        )


def measure(
    bundle: Bundle,
    program: Program,
    rewriters: Mapping[str, Rewriter],
    windows: Sequence[Ids],
    reporter: Reporter,
) -> dict[str, Accuracy]:
    """Every inexact variant of a bundle, run by the runtime, against eager torch in float32."""
    variants, names = bundle.manifest.variants, inexact(bundle.manifest)
    backend = open_backend("cpu")
    with contextlib.ExitStack() as stack:
        runners = {}
        for name in names:
            rewriter, run = rewriters.get(variants[name].precision), bundle
            if rewriter is not None and rewriter.emulated:
                rounding = twin(bundle, name, rewriter.emulate, rewriter.state_dtypes)
                run = stack.enter_context(rounding)
            runners[name] = Runner(run, name, backend)
        return _measure(program, runners, windows, reporter)


def _measure(
    program: Program,
    runners: Mapping[str, Runner],
    windows: Sequence[Ids],
    reporter: Reporter,
) -> dict[str, Accuracy]:
    tallies = {name: Tally() for name in runners}
    assert program.reference is not None, "a decoder"
    logits = np.empty((max(map(len, windows)), program.vocab_size), np.float32)
    with reporter.stage("accuracy", "against fp32 on a text", len(windows)) as advance:
        for ids in windows:
            want = program.reference(torch.from_numpy(ids[None])).logits[0].numpy()
            for name, runner in runners.items():
                runner.open(tokens=len(ids)).score(ids, logits[: len(ids)])
                tallies[name].add(ids, want, logits[: len(ids)])
            advance(1)
    for runner in runners.values():
        runner.close()
    return {name: tally.result() for name, tally in tallies.items()}


def inexact(manifest: Manifest) -> list[str]:
    """The variants that have something in few bits."""
    return [name for name in manifest.variants if budget(manifest, name) > 1.0]


def budget(manifest: Manifest, variant: str) -> float:
    """The largest perplexity ratio of a variant that is meant to be used; 1 of an exact one."""
    weights = BUDGET.get(manifest.variants[variant].precision, 1.0)
    return weights * KV_BUDGET.get(manifest.kv_of(variant), 1.0)


def report(
    bundle: Bundle,
    rewriters: Mapping[str, Rewriter],
    found: Mapping[str, Accuracy],
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of a bundle's accuracy.json."""
    import onnxruntime

    variants = {}
    for name, accuracy in found.items():
        variant, most = bundle.manifest.variants[name], budget(bundle.manifest, name)
        rewriter = rewriters.get(variant.precision)
        variants[name] = {
            "variant_id": variant.variant_id,
            "scheme": rewriter and asdict(rewriter.scheme),
            "mixed": rewriter and rewriter.mixed,
            "kv": bundle.manifest.kv_of(name),
            **asdict(accuracy),
            "budget": round(most, 6),
            "within_budget": accuracy.ratio <= most,
        }
    return {
        "format_version": 1,
        "model_id": bundle.manifest.model_id,
        "text": dict(origin),
        "truth": f"eager torch {torch.__version__.split('+')[0]}",
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "variants": variants,
    }
