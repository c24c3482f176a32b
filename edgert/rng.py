"""Random numbers without state: a draw is a function of (seed, position, stream).

Nothing has to be saved to resume, rewind or fork a session exactly: the draw for a position is
the same whenever and however often it is asked for.

Philox4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC11), with the seed
and the stream as its key and the position as its counter. NumPy guarantees the raw integer stream
of this bit generator across versions; the frozen values in the tests would show a change.
"""

from __future__ import annotations

import os

from edgert.errors import UsageError

LIMIT = 2**64


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A number in [0, 1), a multiple of 2**-53. All arguments are integers in [0, 2**64).

    Raises UsageError for an argument outside that range.
    """
    from numpy.random import Philox  # takes 10 ms to import, and greedy answers draw nothing

    for name, value in (("seed", seed), ("position", position), ("stream", stream)):
        if not 0 <= value < LIMIT:
            raise UsageError(
                f"{name} = {value} is out of range",
                do=f"use an integer from 0 to {LIMIT - 1}",
            )
    # int(): numpy integers would overflow in the shift
    bits = Philox(key=int(seed) | int(stream) << 64, counter=int(position))
    return float(int(bits.random_raw()) >> 11) * 2.0**-53


def fresh_seed() -> int:
    """A seed from the operating system's entropy, in [0, 2**64)."""
    return int.from_bytes(os.urandom(8), "little")
