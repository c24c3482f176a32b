"""stops: streamed search equals the search over the whole text, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import UsageError
from edgert.stops import StopStrings


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grow the text by one character until it ends in a stop string; the longest wins."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            hit = max(hits, key=len)
            return text[: end - len(hit)], hit
    return text, None


def streamed(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    watcher, shown = StopStrings(tuple(stops)), ""
    for piece in pieces:
        text, hit = watcher.push(piece)
        shown += text
        if hit is not None:
            return shown, hit
    return shown + watcher.flush(), None


SMALL = st.text("ab", max_size=6)


@given(st.lists(SMALL, max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_stream_equals_search_over_the_whole(pieces, stops):
    """Same text shown, same stop string hit, for every way to cut the text."""
    assert streamed(pieces, stops) == naive("".join(pieces), stops)


@given(st.lists(SMALL, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1))
def test_held_text_is_as_short_as_possible(pieces, stops):
    """What is held back could still become a stop string; nothing else is held."""
    watcher, shown, seen = StopStrings(tuple(stops)), "", ""
    for piece in pieces:
        text, hit = watcher.push(piece)
        if hit is not None:
            return
        shown, seen = shown + text, seen + piece
        held = seen[len(shown) :]
        assert seen == shown + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
        longer = [seen[-n:] for n in range(len(held) + 1, len(seen) + 1)]
        assert not any(stop.startswith(tail) for stop in stops for tail in longer)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        pytest.param(["abcd"], ["bcd", "c"], ("ab", "c"), id="first to be complete"),
        pytest.param(["xabc"], ["c", "bc", "abc"], ("x", "abc"), id="longest of the same end"),
        pytest.param(["ab", "abc"], ["abc"], ("ab", "abc"), id="false start"),
        pytest.param(["x\n", "\nHu", "man:"], ["\n\nHuman:"], ("x", "\n\nHuman:"), id="in pieces"),
        pytest.param(["€", "😀!"], ["😀"], ("€", "😀"), id="beyond ASCII"),
        pytest.param(["", ""], ["a"], ("", None), id="no text"),
        pytest.param(["abc"], [], ("abc", None), id="no stops"),
    ],
)
def test_rule_of_the_match(pieces, stops, expected):
    """The match that ends first wins, and of those the longest; it is not shown."""
    assert streamed(pieces, stops) == expected


def test_nothing_follows_a_hit():
    """After a hit, text is dropped, the hit is repeated, and nothing is left to flush."""
    watcher = StopStrings(("END",))
    assert watcher.push("a END b") == ("a ", "END")
    assert watcher.push("more") == ("", "END")
    assert watcher.flush() == ""


def test_flush_empties():
    """Held text is given once."""
    watcher = StopStrings(("END",))
    assert watcher.push("EN") == ("", None)
    assert watcher.flush() == "EN"
    assert watcher.flush() == ""


def test_empty_stop_string_is_refused():
    """An empty text would match everywhere."""
    with pytest.raises(UsageError, match="a stop string is empty"):
        StopStrings(("a", ""))
