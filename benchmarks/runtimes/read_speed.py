"""How fast this machine reads memory: one process.

    python -m runtimes.read_speed ORDERS        {"threads": 2, "sizes": [90000000, ...]}

`threads` threads side by side, each the dot product with itself of its share of `size` bytes of
float32 (a BLAS kernel that reads in order and does next to nothing else), again and again. What
fits into a cache is read faster: so every side is measured against the size that it reads in a
step. One line of JSON: size -> 10^9 bytes a second, the median pass.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

PASSES = 9
WARM = 2


def read_speed(size: int, threads: int) -> float:
    """GB/s. Needs OPENBLAS_NUM_THREADS=1 to have been set before numpy was loaded."""
    import numpy as np

    parts = [np.ones(size // threads // 4, np.float32) for _ in range(threads)]
    spent = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(WARM + PASSES):
            begun = time.perf_counter()
            list(pool.map(lambda part: part @ part, parts))
            spent.append(time.perf_counter() - begun)
    return sum(part.nbytes for part in parts) / median(spent[WARM:]) / 1e9


def main() -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    orders = json.loads(sys.argv[1])
    print(json.dumps({str(n): read_speed(n, orders["threads"]) for n in orders["sizes"]}))


if __name__ == "__main__":
    main()
