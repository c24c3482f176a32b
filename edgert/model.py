"""A loaded bundle: what applications hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgert.backends import LOWERINGS, open_backend
from edgert.bundle import Bundle
from edgert.chat import encode_chat
from edgert.errors import Incompatible, UsageError
from edgert.generate import Generation, Stream, check_ids
from edgert.runner import Runner
from edgert.sampler import SamplingParams
from edgert.session import Prompt, Session
from edgert.spec import Manifest
from edgert.tokenizer import Tokenizer, load_tokenizer

PRECISIONS = ("fp32", "fp16", "int8", "int4")
"""Best accuracy first: what `precision=None` prefers on a CPU."""


class Model:
    """Graphs loaded on a device, a tokenizer, and the defaults of a bundle.

    Make it with `edgert.load`; close it, or use it as a context manager.
    """

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        self.bundle = bundle
        self.runner = runner
        self.manifest: Manifest = bundle.manifest
        spec = self.manifest.tokenizer
        self.tokenizer: Tokenizer | None = None
        if spec is not None:
            self.tokenizer = load_tokenizer(spec, bundle.path(spec.file) if spec.file else None)

    @property
    def placement(self) -> str:
        """What runs where: variant, backend and version, device, threads."""
        return f"{self.runner.variant_name} · {self.runner.backend.placement}"

    def encode(self, prompt: Prompt) -> list[int]:
        """Text or token ids -> checked token ids."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError(
                    "this bundle has no tokenizer, so it cannot read text",
                    where=str(self.bundle.root),
                    do="give token ids (--ids), or export again with --tokenizer FILE",
                )
            prompt = self.tokenizer.encode(prompt)
        return check_ids(prompt, self.manifest.vocab_size)

    def sampling(
        self, params: SamplingParams | None = None, options: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """The parameters of a request: the bundle's defaults, or `params`, changed by `options`."""
        options = options or {}
        if params is None:
            return SamplingParams.from_mapping(self.manifest.sampling, options)
        return params.replace(**options) if options else params

    def session(self) -> Session:
        return Session(self)

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Generation:
        """Continue a prompt in a session of its own. Arguments as `Session.stream`."""
        with self.session() as session:
            return session.generate(prompt, params, **options)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Stream:
        """`generate`, piece by piece."""
        return self.session().stream(prompt, params, **options)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages ({'role', 'content'}) -> the ids of the prompt that the chat template makes.

        Special-token text inside a message stays text: a message cannot end its own turn.
        """
        file = self.manifest.chat_template
        if file is None or self.tokenizer is None:
            raise UsageError(
                "this bundle has no chat template",
                where=str(self.bundle.root),
                do="give the whole prompt as text instead",
            )
        bos, eos = self.manifest.bos, self.manifest.eos
        return encode_chat(
            self.tokenizer,
            self.bundle.path(file).read_text(encoding="utf-8"),
            messages,
            bos_token="" if bos is None else self.tokenizer.decode([bos], skip_special=False),
            eos_token="" if not eos else self.tokenizer.decode(eos[:1], skip_special=False),
        )

    def logits(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Score whole sequences: ids int [B, T] -> logits float32 [B, T, V], every position."""
        array = np.asarray(ids)
        if array.ndim != 2 or not array.size:
            raise UsageError(f"ids must be [batch, tokens] and not empty, not of shape {array.shape}")
        execution = self.runner.open(tokens=array.shape[1])
        rows = []
        for row in array:
            execution.reset()
            checked = np.asarray(check_ids(row, self.manifest.vocab_size), np.int64)
            rows.append(execution.score(checked))
        return np.stack(rows)

    def close(self) -> None:
        self.runner.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    path: str | os.PathLike[str],
    device: str = "auto",
    *,
    precision: str | None = None,
    lowering: str | None = None,
    threads: int = 0,
    prepack: bool = True,
    verify: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Model:
    """Open a bundle and load its graphs.

    device     'auto' or 'cpu'
    precision  one that the bundle holds ('fp32'); None takes the best one
    lowering   'ort' or 'portable'; None takes the fastest the device runs
    threads    0: one per physical core
    prepack    False maps the weights instead of copying them into ONNX Runtime's own layout:
               less memory and a load in no time, for slower steps
    verify     hash every file again, even if this bundle was verified before
    progress   called with the size of each chunk hashed, in bytes

    Raises BadBundle (broken or tampered), Incompatible (no such device or variant),
    MissingDependency.
    """
    bundle = Bundle.open(Path(path), True if verify else "stamp", progress)
    variant = choose_variant(bundle.manifest, device, precision, lowering)
    backend = open_backend(device, threads=threads, prepack=prepack)
    try:
        return Model(bundle, Runner(bundle, variant, backend))
    except BaseException:
        backend.close()
        raise


def choose_variant(
    manifest: Manifest, device: str, precision: str | None, lowering: str | None
) -> str:
    """The best variant for a device that fits what was asked for, or Incompatible saying why."""
    lowerings = LOWERINGS["cpu" if device == "auto" else device]
    fitting = {
        (PRECISIONS.index(v.precision), lowerings.index(v.lowering)): name
        for name, v in manifest.variants.items()
        if v.lowering in lowerings
        and precision in (None, v.precision)
        and lowering in (None, v.lowering)
    }
    if not fitting:
        wanted = " ".join(filter(None, (precision, lowering))) or f"for device {device}"
        raise Incompatible(
            f"this bundle has no variant {wanted}",
            do=f"choose from what it has: {', '.join(manifest.variants)}",
        )
    return fitting[min(fitting)]
