"""A whole bench, in the order that keeps one part from disturbing another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.backends import check_device, lowerings
from edgert.bench import facts, power
from edgert.bench.cold import STARTS, cold_start
from edgert.bench.measure import Request, requests
from edgert.bench.plan import Plan, Work, make_work
from edgert.bench.result import Result, declared, measured, power_fields
from edgert.bench.verify import (
    Verified,
    check_expected,
    check_reference,
    check_repeats,
    margin_of,
)
from edgert.bundle import Bundle
from edgert.errors import GateFailed
from edgert.model import Model, load, variant_at_hand
from edgert.progress import Reporter
from edgert.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Placement:
    """Arguments of `edgert.load`."""

    device: str = "auto"
    precision: str | None = None
    lowering: str | None = None
    variant: str | None = None
    threads: int = 0
    prepack: bool = True
    kv: str | None = None


@dataclass(frozen=True)
class Expected:
    """The SHA-256 that the answer must have; `where` names who said so."""

    sha256: str
    where: str


@dataclass(frozen=True)
class Timed:
    """What the timed part of a bench leaves. `sha256` is that of the answer, equal in all."""

    requests: Sequence[Request]
    sha256: str
    declared: Result
    memory: dict[str, int] | None
    power: dict[str, Any]

    @property
    def answer(self) -> tuple[int, ...]:
        return self.requests[0].tokens


def bench(
    path: Path,
    plan: Plan,
    placement: Placement,
    *,
    cold: bool = True,
    expected: Expected | None = None,
    reporter: Reporter | None = None,
    hashed: Callable[[int], None] | None = None,
) -> Result:
    """Measure a bundle. `hashed` is called with the bytes of each chunk that is verified first.

    Cold starts come first, while this process holds no model; then the timed requests; then memory
    is read; then the answer is verified, with the timed model closed: two of them may be more than
    a board holds. Raises GateFailed if the answer is not the model's or not the expected one, and
    as `edgert.load` does.
    """
    reporter, p = reporter or Reporter(), placement
    bundle = Bundle.open(path, "stamp", hashed)
    manifest = bundle.manifest
    check_device(p.device)
    asked = p.precision, p.lowering, p.variant, p.kv
    variant = variant_at_hand(manifest, p.device, *asked)
    spec = manifest.tokenizer
    file = bundle.path(spec.file) if spec and spec.file else None
    work = make_work(plan, manifest, load_tokenizer(spec, file) if spec else None)
    started = _cold(path, variant, work, p, reporter) if cold else None
    with _load(path, variant, p) as model:
        timed = time_requests(model, work, device=p.device, prepack=p.prepack, reporter=reporter)
    reference = reference_variant(bundle, variant, p.device)
    with reporter.stage("verifying", f"by {reference}, whole sequence at once"):
        on_cpu = p.device != "tensorrt"  # only there weights have another layout to be without
        mapped = Placement(p.device, threads=p.threads, prepack=p.prepack and not on_cpu)
        with _load(path, reference, mapped) as model:
            verified = verify(model, work, timed, started, expected)
    return put_together(timed, work, started, verified)


def _cold(path: Path, variant: str, work: Work, p: Placement, reporter: Reporter) -> dict[str, Any]:
    with reporter.stage("starting", f"{STARTS} fresh processes", STARTS) as advance:
        return cold_start(
            path,
            work.prompt,
            device=p.device,
            variant=variant,
            threads=p.threads,
            prepack=p.prepack,
            done=lambda: advance(1),
        )


def _load(path: Path, variant: str, p: Placement) -> Model:
    return load(path, p.device, variant=variant, threads=p.threads, prepack=p.prepack)


def reference_variant(bundle: Bundle, variant: str, device: str) -> str:
    """The variant that verifies another: with the same numbers, in another lowering where the
    device runs one; else the variant itself, which then only reads in another way."""
    manifest = bundle.manifest
    timed = manifest.variants[variant]
    return next(
        (
            name
            for name in manifest.like(variant)
            if manifest.variants[name].lowering != timed.lowering
            and manifest.variants[name].lowering in lowerings(device)
        ),
        variant,
    )


def time_requests(
    model: Model,
    work: Work,
    *,
    device: str = "auto",
    prepack: bool = True,
    reporter: Reporter | None = None,
    hwmon: Path = power.HWMON,
) -> Timed:
    """Warm up and time the requests, with power and memory beside them.

    Raises GateFailed if they do not all give the same tokens.
    """
    plan, reporter = work.plan, reporter or Reporter()
    conditions = declared(model, work, device=device, prepack=prepack)
    meter, events = power.find_meter(hwmon), power.throttle_events(hwmon)
    count = plan.warmup + plan.repeats
    text = f"{plan.repeats} requests of {plan.n_prompt} + {plan.n_gen} tokens"
    with reporter.stage("timing", text, count) as advance:
        if meter:
            meter.start()
        before = facts.Load.now()
        try:
            timed = requests(model, work, lambda: advance(1))
        finally:
            if meter:
                meter.stop()
    after = facts.Load.now()
    others = before.others(after) if before and after else None
    memory = facts.memory()  # before anything else makes it larger
    events_after = power.throttle_events(hwmon)
    new_events = None if events is None or events_after is None else events_after - events
    sha256 = check_repeats([one.tokens for one in timed])
    conditions["others_cpus"] = others
    return Timed(timed, sha256, conditions, memory, power_fields(meter, timed, new_events))


def verify(
    reference: Model,
    work: Work,
    timed: Timed,
    started: dict[str, Any] | None = None,
    expected: Expected | None = None,
) -> Verified:
    """Every check of the answer. Raises GateFailed with the first one that fails."""
    one = timed.requests[0]
    verified = check_reference(
        reference, work, one.tokens, one.iterations, margin=margin_of(reference)
    )
    if started and not work.depth and started["token"] != timed.answer[0]:
        raise GateFailed(
            f"a fresh process answered with token {started['token']}, the timed requests with "
            f"{timed.answer[0]}",
            where="the first token of the cold start",
            do="check the machine and the bundle (edgert verify), then measure again",
        )
    if expected is not None:
        check_expected(timed.sha256, expected.sha256, expected.where)
    return verified


def put_together(
    timed: Timed, work: Work, started: dict[str, Any] | None, verified: Verified
) -> Result:
    """The JSON object. It takes a `Verified`: there are no figures without one."""
    size, iterations = timed.declared["model_size"], timed.declared["iterations"]
    figures = measured(timed.requests, work, timed.memory, started, verified, size, iterations)
    return timed.declared | figures | timed.power
