"""A call beside another: begun at once, its result or its error handed over once it is asked for."""

from __future__ import annotations

import threading

import pytest

import edgert
from edgert.beside import Beside
from edgert.errors import BadBundle, BadTokenizer


def test_it_runs_beside_and_hands_over_what_it_made() -> None:
    asked = threading.Event()
    beside = Beside(lambda: (asked.wait(10), threading.current_thread()))
    asked.set()  # reached only if the call runs elsewhere
    was_set, thread = beside.result()
    assert was_set and thread is not threading.current_thread()
    assert beside.result() == (was_set, thread)


def test_its_error_is_raised_where_the_result_is_asked_for() -> None:
    def fail() -> None:
        raise BadTokenizer("broken")

    beside = Beside(fail)
    for _ in range(2):
        with pytest.raises(BadTokenizer, match="broken"):
            beside.result()


def test_a_load_says_which_file_is_broken(copied, tiny_bundle) -> None:
    """Whether it is read in the other thread or in this one."""
    bundle = copied(tiny_bundle)
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(BadBundle, match=r"tokenizer\.json|hash|size"):
        edgert.load(bundle)
