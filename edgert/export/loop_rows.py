"""Where the rows of new tokens are, in a tensor that stacks the states of a loop's iterations."""

from __future__ import annotations

from edgert.export.graft import Graft
from edgert.spec import StateSpec


def places(g: Graft, state: StateSpec, trips: int, ids: str, batch: str, taken: str) -> list[str]:
    """Two tensors int64 [iterations, batch, heads, tokens, 4], of indices into a stack
    [iterations, batch, heads, capacity, size]: where the rows of each iteration are, and where
    those are that belong there: of the same iteration, or the last one that the row took.

    ids    input [batch, tokens]; batch: its first size, int64 [1]
    taken  iterations of each row, int64 [batch]
    """
    heads = state.shape[1]
    assert isinstance(heads, int)
    assert state.counter is not None
    zero, one = g.number("loop/0", 0), g.number("loop/1", 1)
    tokens = g.node("Shape", ids, start=1, end=2)
    sizes = [g.numbers("loop/of_trips", [trips]), batch, g.numbers("loop/of_heads", [heads])]
    shape = g.node("Concat", *sizes, tokens, axis=0)

    def along(axis: int, values: str) -> str:
        """[n] -> n along one of the four axes."""
        alone = [-1 if at == axis else 1 for at in range(4)]
        return g.node("Reshape", values, g.numbers(f"loop/axis_{axis}", alone))

    def counted(size: str) -> str:
        scalar = g.node("Squeeze", size, g.numbers("loop/first", [0]))
        return g.node("Range", zero, scalar, one)

    own = along(0, g.numbers("loop/each_trip", list(range(trips))))
    last = g.node("Min", own, along(1, g.node("Sub", taken, one)))
    row, head = along(1, counted(batch)), along(2, g.numbers("loop/each", list(range(heads))))
    position = g.node("Add", along(1, state.counter), along(3, counted(tokens)))
    found = []
    for iteration in (own, last):
        behind = g.numbers("loop/fourth", [4])
        columns = [
            g.node("Unsqueeze", g.node("Expand", each, shape), behind)
            for each in (iteration, row, head, position)
        ]
        found.append(g.node("Concat", *columns, axis=4))
    return found
