"""Percentiles and means, in the unit of the values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERCENTILES = (50, 90, 95, 99)

Summary = dict[str, float]


def summary(values: Sequence[float]) -> Summary | None:
    """avg, min, max, p50, p90, p95, p99, std and count; None without values.

    Percentiles are interpolated linearly between the two nearest values, so those of a handful
    lie close to the largest one. `std` is that of the values themselves (divided by count).
    """
    if not values:
        return None
    array = np.asarray(values, np.float64)
    found = {"avg": array.mean(), "min": array.min(), "max": array.max(), "std": array.std()}
    found |= {f"p{p}": np.percentile(array, p) for p in PERCENTILES}
    return {name: float(value) for name, value in found.items()} | {"count": len(values)}


def rates(tokens: int, nanoseconds: Sequence[int]) -> dict[str, object]:
    """The fields of llama-bench for `tokens` tokens in each of the times given.

    samples_ns and their avg_ns and stddev_ns; samples_ts in tokens a second, avg_ts, stddev_ts.
    All None if there is nothing to divide: no tokens.
    """
    names = ("samples_ns", "avg_ns", "stddev_ns", "samples_ts", "avg_ts", "stddev_ts")
    if not tokens or not nanoseconds:
        return dict.fromkeys(names)
    speeds = [tokens * 1e9 / max(1, value) for value in nanoseconds]
    times = np.asarray(nanoseconds, np.float64)
    values = (
        *(list(nanoseconds), float(times.mean()), float(times.std())),
        *(speeds, float(np.mean(speeds)), float(np.std(speeds))),
    )
    return dict(zip(names, values, strict=True))
