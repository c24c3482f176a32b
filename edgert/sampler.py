"""From logits to the next token: pure functions of logits, settings, history and position.

The order is that of Hugging Face's logits processors and warpers (huggingface/transformers,
src/transformers/generation), so that settings published with a model mean the same here:

    logit bias, repetition penalty      what the model is taken to have said
    temperature 0: argmax               the lowest id among equals
    else temperature, top-k, top-p, min-p, and a draw by inverse CDF in the order of ids

Log-probabilities are those after bias and penalty, before temperature and filters: they say what
the model believes, and compare across sampling settings.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert import rng
from edgert.errors import BadBundle, Poisoned, UsageError
from edgert.halting import AUTO, parse_halt

FloatArray = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.int64]

OFF = "off"
MOST_GUESSES = 16
"""What `speculate` may be besides AUTO: none at all, or up to so many in one step."""

NUCLEUS_GUESS = 1024
"""Tokens that top-p looks at before it sorts all: confident models need a few dozen."""

_INTEGERS = {
    "max_tokens": (1, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "repetition_window": (0, 2**31 - 1),
    "logprobs": (0, 1000),
    "seed": (0, rng.LIMIT - 1),
    "stream": (0, rng.LIMIT - 1),
}
_REALS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "deadline_ms": (0.0, 1e12),
}
_OPTIONAL = ("logprobs", "seed", "deadline_ms", "logit_bias", "halt")
_COLDEST = 1e-4  # below it, differences of logits overflow float32
_MAX_BIAS = 1e9
_MAX_STOPS = 64
_MAX_STOP_CHARS = 1024
_MAX_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises UsageError for a value out of its range.

    max_tokens          1 or more
    temperature         0 for greedy, else 0.0001 to 100
    top_k               keep the k best, and all that equal the k-th; 0 for all
    top_p               keep the smallest set of best tokens that reaches this probability
    min_p               drop tokens less probable than min_p times the best
    repetition_penalty  scores of tokens in the history are divided by it if positive, else
                        multiplied (CTRL, arXiv 1909.05858); prompt and answer are history
    repetition_window   only the last so many tokens of the history; 0 for all
    logit_bias          token id -> number added to its logit, from -1e9 (never) to 1e9
    logprobs            None for none, 0 for the chosen token's, k for the k best as well
    seed, stream        with the position, they determine every draw; seed None for a fresh one
    stop, stop_tokens   texts and ids that end the answer; ignore_eos does not end it at EOS
    deadline_ms         stop when so much time has passed
    halt                when the loop of a looped model ends for each token of the answer: `full`,
                        `fixed:N`, `settle:THRESHOLD[:MIN[:MAX]]`, or `auto`, what the bundle's
                        halting report recommends; None is full
    speculate           how many tokens to guess from what was said before, and check in one step:
                        `auto`, as many as have paid; `off`; or a number, wherever there is a guess.
                        No setting changes what is said, but for rounding
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    seed: int | None = None
    stream: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    deadline_ms: float | None = None
    halt: str | None = None
    speculate: str | int = AUTO

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in _OPTIONAL:
                continue
            object.__setattr__(self, field.name, _checked(field.name, value))

    def replace(self, /, **changes: Any) -> SamplingParams:
        """A copy with some fields changed. Raises UsageError for an unknown field."""
        for name in changes:
            if name not in _FIELDS:
                raise UsageError(f"there is no sampling setting '{name}'", do=_suggestion(name))
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_mapping(
        cls, defaults: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """Settings from a bundle's defaults, changed by what the user gave (None: not given).

        Keys of `logit_bias` may be decimal strings, as JSON has them. Raises BadBundle for a
        fault in the defaults, UsageError for one in the overrides.
        """
        try:
            params = cls().replace(**_from_json(defaults))
        except UsageError as error:
            raise BadBundle(
                error.what, where="the sampling defaults of the bundle", do=error.do
            ) from error
        given = {k: v for k, v in (overrides or {}).items() if v is not None}
        return params.replace(**_from_json(given))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_logits(self) -> bool:
        """False if the argmax that a graph computes by itself is all that is needed."""
        return not (
            self.greedy
            and not self.logit_bias
            and self.repetition_penalty == 1.0
            and self.logprobs is None
        )


_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))


@dataclass(frozen=True)
class Choice:
    """The token; its log-probability and the best (id, log-probability) pairs, if asked for."""

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def pick(
    logits: FloatArray,
    params: SamplingParams,
    history: Sequence[int] | npt.NDArray[np.integer[Any]],
    position: int,
    seed: int,
) -> Choice:
    """Choose the token at `position`.

    logits [V], not changed; history: ids so far, prompt included; seed: params.seed, or the
    fresh one of this session. Alternatives with probability 0 are left out.
    Raises Poisoned if the logits have no finite maximum (NaN, +inf, or all -inf), UsageError if
    the bias or the history names a token beyond V.
    """
    scores = adjusted(logits, params, history)
    best = int(scores.argmax())  # NumPy's argmax stops at the first NaN: one check covers all
    if not math.isfinite(scores[best]):
        raise Poisoned(
            f"the logits at position {position} have no finite maximum: {scores[best]} at"
            f" token {best}",
            do="rewind or restart the session; if it comes again, check the model with its"
            " parity report",
        )
    if params.greedy:
        token = best
    else:
        ids, weights = survivors(scores, params)
        mass = weights.cumsum()
        draw = rng.uniform(seed, position, params.stream) * mass[-1]
        token = int(ids[mass.searchsorted(draw, side="right")])
    if params.logprobs is None:
        return Choice(token)
    top = np.float32(scores[best])
    with np.errstate(over="ignore"):  # a difference beyond float32 is -inf: probability 0
        relative = scores - top
    norm = math.log(np.exp(relative).sum(dtype=np.float64))
    return Choice(
        token,
        float(relative[token]) - norm,
        tuple(
            (int(i), float(relative[i]) - norm)
            for i in best_ids(scores, params.logprobs)
            if relative[i] > -np.inf
        ),
    )


def adjusted(
    logits: FloatArray,
    params: SamplingParams,
    history: Sequence[int] | npt.NDArray[np.integer[Any]],
) -> npt.NDArray[np.float32]:
    """Logits after bias and repetition penalty, [V] float32; the given array is not changed."""
    if logits.ndim != 1 or not logits.size:
        raise UsageError(f"logits have shape {logits.shape}, one row [V] is wanted")
    scores = logits.astype(np.float32, copy=False)
    if params.logit_bias:
        ids = np.fromiter(params.logit_bias, np.int64)
        _check_ids("logit_bias", ids, scores.size)
        scores = scores.copy()
        scores[ids] += np.fromiter(params.logit_bias.values(), np.float32)
    if params.repetition_penalty != 1.0 and len(history):
        ids = np.asarray(history[-params.repetition_window :], np.int64)
        _check_ids("the history", ids, scores.size)
        # computed from the unpenalised scores, so a repeated id is penalised once
        old, penalty = scores[ids], np.float32(params.repetition_penalty)
        new = np.where(old > 0, old / penalty, old * penalty)
        scores = scores.copy()
        scores[ids] = new
    return scores


def survivors(
    scores: npt.NDArray[np.float32], params: SamplingParams
) -> tuple[Ids, npt.NDArray[np.float64]]:
    """The tokens that temperature > 0 and the filters leave: ids ascending, weights (their sum
    is not 1). scores [V] must have a finite maximum.

    Weights are exponentials in float32, as the logits are; all sums are float64.
    """
    top = scores.max()
    ids: Ids | None = None
    if 0 < params.top_k < scores.size:
        kth = np.partition(scores, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(scores >= kth)
        scores = scores[ids]
    with np.errstate(over="ignore"):
        powers = scores - top
        powers /= np.float32(params.temperature)  # in place: fresh pages cost more than the sums
        weights = np.exp(powers, out=powers).astype(np.float64)
    for keep in (_nucleus, _relative):
        kept = keep(weights, params)
        if kept is not None:
            weights = weights[kept]
            ids = kept if ids is None else ids[kept]
    return np.arange(weights.size) if ids is None else ids, weights


def best_ids(scores: npt.NDArray[np.float32], count: int) -> Ids:
    """The `count` highest scores' ids, best first, lower id first among equals."""
    if count == 0:
        return np.empty(0, np.int64)
    count = min(count, scores.size)
    kth = np.partition(scores, -count)[-count]
    ids = np.flatnonzero(scores >= kth)
    return ids[np.argsort(-scores[ids], kind="stable")][:count]


def _nucleus(weights: npt.NDArray[np.float64], params: SamplingParams) -> Ids | None:
    """Indices of the smallest set of greatest weights that reaches top_p; None for all.

    A token stays while those before it fall short of top_p. Among equals at the edge the lower
    ids stay. Only weights are sorted, never ids, and all of them only if the greatest
    NUCLEUS_GUESS do not reach top_p.
    """
    if params.top_p == 1.0:
        return None
    target = params.top_p * weights.sum()
    head = weights
    if weights.size > 2 * NUCLEUS_GUESS:
        head = np.partition(weights, -NUCLEUS_GUESS)[-NUCLEUS_GUESS:]
        if head.sum() < target:
            head = weights
    descending = np.sort(head)[::-1]
    last = min(int(descending.cumsum().searchsorted(target)), descending.size - 1)
    edge = descending[last]
    above = int(np.count_nonzero(descending[: last + 1] > edge))
    keep = weights > edge
    keep[np.flatnonzero(weights == edge)[: last + 1 - above]] = True
    return np.flatnonzero(keep)


def _relative(weights: npt.NDArray[np.float64], params: SamplingParams) -> Ids | None:
    """Indices of the weights of at least min_p times the greatest, which is 1; None for all."""
    if params.min_p == 0.0:
        return None
    return np.flatnonzero(weights >= params.min_p)


def _check_ids(what: str, ids: Ids, size: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise UsageError(f"{what} names token {bad}, the model has tokens 0 to {size - 1}")


def _checked(name: str, value: Any) -> Any:
    """The value in its canonical type, or UsageError."""
    if name in _INTEGERS:
        return _integer(name, value, *_INTEGERS[name])
    if name in _REALS:
        number = _real(name, value, *_REALS[name])
        if name == "temperature" and 0 < number < _COLDEST:
            raise _refused(name, value, f"0 (greedy), or a number from {_COLDEST} to 100")
        if name in ("top_p", "deadline_ms") and number == 0:
            raise _refused(name, value, f"a number above 0, up to {_REALS[name][1]:g}")
        return number
    if name == "halt":
        if not isinstance(value, str):
            raise _refused(name, value, "a policy such as 'fixed:2'")
        return value if value == AUTO else str(parse_halt(value))
    if name == "speculate":
        return _guesses(value)
    if name == "ignore_eos":
        if not isinstance(value, bool):
            raise _refused(name, value, "true or false")
        return value
    if name == "logit_bias":
        if not isinstance(value, Mapping):
            raise _refused(name, value, "a mapping of token ids to numbers")
        return {
            _integer("logit_bias, token", token, 0, _MAX_TOKEN): _real(
                f"logit_bias[{token}]", bias, -_MAX_BIAS, _MAX_BIAS
            )
            for token, bias in value.items()
        }
    if name == "stop" and isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)) or len(value) > _MAX_STOPS:
        raise _refused(name, value, f"a list of at most {_MAX_STOPS} entries")
    if name == "stop_tokens":
        return tuple(_integer("stop_tokens", token, 0, _MAX_TOKEN) for token in value)
    for text in value:
        if not isinstance(text, str) or not 0 < len(text) <= _MAX_STOP_CHARS:
            raise _refused(name, text, f"texts of 1 to {_MAX_STOP_CHARS} characters")
    return tuple(value)


def _guesses(value: Any) -> str | int:
    """`speculate`: AUTO, OFF, or a number, which may be written in digits."""
    if isinstance(value, str) and value in (AUTO, OFF):
        return value
    number = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,3}", value) else value
    try:
        return _integer("speculate", number, 1, MOST_GUESSES)
    except UsageError:
        permitted = f"'{AUTO}', '{OFF}', or an integer from 1 to {MOST_GUESSES}"
        raise _refused("speculate", value, permitted) from None


def _integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise _refused(name, value, f"an integer from {low} to {high}")
    return number


def _real(name: str, value: Any, low: float, high: float) -> float:
    valid = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not valid or not low <= value <= high:  # NaN fails every comparison
        raise _refused(name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def _refused(name: str, value: object, permitted: str) -> UsageError:
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        shown = f"an integer of {int(value).bit_length()} bits"  # type: ignore[call-overload]
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return UsageError(f"{name} = {shown} is not possible", do=f"use {permitted}")


def _suggestion(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, _FIELDS, n=1)
    return f"did you mean '{near[0]}'?" if near else f"the settings are: {', '.join(_FIELDS)}"


def _from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with decimal keys of `logit_bias` as integers."""
    values = dict(values)
    bias = values.get("logit_bias")
    if isinstance(bias, Mapping):
        values["logit_bias"] = {
            int(k) if isinstance(k, str) and k.isdecimal() and len(k) <= 10 else k: v
            for k, v in bias.items()
        }
    return values
