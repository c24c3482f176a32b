"""Options that verbs share. Each one has an environment variable: EDGERT_ and its long name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def option(*names: str, **settings: Any) -> Callable[[F], F]:
    """`click.option` whose variable is EDGERT_<LONG_NAME>."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "EDGERT_" + long.removeprefix("--").upper().replace("-", "_")
    return click.option(*names, envvar=variable, **settings)


def stacked(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several decorators as one, in the order of the help text."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
FILE = click.Path(path_type=Path)

as_json = option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")

common = stacked(
    option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
    option("--debug", is_flag=True, help="Show tracebacks."),
)

placement = stacked(
    option(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto (cpu), cpu, cuda (ONNX Runtime) or tensorrt.",
        show_default=True,
    ),
    option("--precision", metavar="NAME", help="A precision of the bundle (default: its best)."),
    option(
        "--kv", metavar="NAME", help="Keys and values in fp32 or int8 (default: the bundle's best)."
    ),
    option(
        "--lowering",
        metavar="NAME",
        help="ort, portable or modern (default: the device's fastest).",
    ),
    option("--variant", metavar="NAME", help="One of the variants that `edgert inspect` lists."),
    option(
        "--threads",
        type=click.IntRange(0, 1024),
        default=0,
        metavar="N",
        help="0 (the default): one per physical core, a single one for a model of a few MB.",
    ),
    option(
        "--low-memory",
        is_flag=True,
        help="Map the weights instead of copying them into a faster layout.",
    ),
)


def load_options(given: dict[str, Any]) -> dict[str, Any]:
    """What the user gave of `placement`, as arguments of `edgert.load`."""
    chosen = {name: given[name] for name in ("device", "precision", "kv", "lowering", "variant")}
    return chosen | {"threads": given["threads"], "prepack": not given["low_memory"]}


key = stacked(
    option(
        "--key-file",
        type=FILE,
        metavar="FILE",
        help="Encrypt and decrypt sessions with the random bytes in this file.",
    ),
    option(
        "--ask-passphrase",
        is_flag=True,
        help="The same with a passphrase, asked for on the terminal; EDGERT_PASSPHRASE has it "
        "without being asked.",
    ),
)


def key_options(given: dict[str, Any]) -> dict[str, Any]:
    """What the user gave of `key`, as arguments of `Session.save` and `edgert.resume`."""
    passphrase = os.environ.get("EDGERT_PASSPHRASE") or None
    if given["ask_passphrase"]:
        passphrase = click.prompt("passphrase", hide_input=True, err=True)
    if given["key_file"] is None and passphrase is None:
        return {}
    return {"key_file": given["key_file"], "passphrase": passphrase}


halt = option(
    "--halt",
    metavar="POLICY",
    help="When a loop ends for a token: full, fixed:N, settle:T[:MIN[:MAX]], or auto, which "
    "`edgert halt` recommends (default: full).",
)


def speculate(default: str) -> Callable[[F], F]:
    return option(
        "--speculate",
        metavar="auto|off|N",
        default=None,
        help="Tokens guessed from what was said before and checked in one step: as many as pay, "
        f"none, or N (default: {default}).",
    )


sampling = stacked(
    option("-n", "--max-tokens", type=int, metavar="N", help="Longest answer (default: 128)."),
    option(
        *("-t", "--temperature", "--temp", "temperature"),
        type=float,
        metavar="T",
        help="0 is greedy (default: the bundle's, else 0).",
    ),
    option("--top-k", type=int, metavar="K", help="Keep the K best tokens; 0 for all."),
    option("--top-p", type=float, metavar="P", help="Keep the best tokens up to probability P."),
    option("--min-p", type=float, metavar="P", help="Drop tokens below P times the best one."),
    option("--repetition-penalty", type=float, metavar="X", help="1 is off."),
    option("--logit-bias", multiple=True, metavar="ID=X", help="Add X to a token's logit."),
    option("--logprobs", type=int, metavar="K", help="Log-probabilities, and the K best tokens'."),
    option("--seed", type=int, metavar="N", help="Same seed, same answer (default: a fresh one)."),
    option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text."),
    option(
        "--stop-token",
        "stop_tokens",
        type=int,
        multiple=True,
        metavar="ID",
        help="End the answer before this token.",
    ),
    option("--ignore-eos", is_flag=True, default=None, help="Go on behind the end token."),
    option("--deadline-ms", type=float, metavar="MS", help="Stop after so much time."),
    halt,
    speculate("auto"),
)
SAMPLING = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("logprobs", "seed", "ignore_eos", "deadline_ms", "halt", "speculate"),
)


def sampling_options(given: dict[str, Any]) -> dict[str, Any]:
    """What the user gave of the sampling options, as fields of SamplingParams."""
    chosen = {name: given[name] for name in SAMPLING if given[name] is not None}
    if given["stop"]:
        chosen["stop"] = tuple(given["stop"])
    if given["stop_tokens"]:
        chosen["stop_tokens"] = tuple(given["stop_tokens"])
    if given["logit_bias"]:
        chosen["logit_bias"] = dict(_bias(text) for text in given["logit_bias"])
    return chosen


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise click.UsageError(
            f"--logit-bias wants ID=NUMBER, such as 42=-5, not {text!r}"
        ) from None


def parse_ids(text: str) -> list[int]:
    """'1, 2 3' -> [1, 2, 3]."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise click.UsageError(f"--ids wants integers such as 1,2,3, not {text!r}") from None
