"""The helper that judges everything else can itself fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cases import HERE, assert_close, cases


def test_assert_close_names_the_worst_element() -> None:
    """A failure tells which array, where, both values and how far off."""
    want = np.zeros((2, 3))
    got = want.copy()
    got[1, 2], got[0, 0] = 0.5, 0.25
    with pytest.raises(AssertionError) as failure:
        assert_close(got, want, atol=1e-3, where="logits")
    message = str(failure.value)
    for part in ("logits (2, 3)", "0.5", "[1, 2]", "2 of 6", "max abs difference 0.5"):
        assert part in message


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (np.nan, 0.0),
        (np.nan, np.nan),
        (np.inf, 1.0),
        (np.zeros(3), np.zeros((3, 1))),
        (np.uint8(255), np.uint8(0)),
        (2**53 + 2, 2**53),
    ],
)
def test_assert_close_refuses(got: object, want: object) -> None:
    """NaN, infinities, shapes that would broadcast, and unsigned wrap-around are differences."""
    with pytest.raises(AssertionError):
        assert_close(got, want, atol=1.0)


@pytest.mark.parametrize(
    ("got", "want"), [(np.inf, np.inf), (np.zeros((0, 2)), np.ones((0, 2))), (1.1, 1.0)]
)
def test_assert_close_accepts(got: object, want: object) -> None:
    """Equal infinities, empty arrays, and a difference within atol + rtol."""
    assert_close(got, want, atol=0.06, rtol=0.05)


def test_extra_cases_add_to_those_of_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder outside brings more cases and cannot replace one that is here."""
    for name in ("model_a", "another"):
        folder = tmp_path / "hagi" / name
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps({"tolerance": "exact"}))
    monkeypatch.setenv("EDGERT_EXTRA_CASES", str(tmp_path))
    found = {case.name: case for case in cases("hagi")}
    assert found["another"].folder == tmp_path / "hagi" / "another"
    assert found["another"].tolerance == {"atol": 0.0, "rtol": 0.0}
    assert found["model_a"].folder == HERE / "hagi" / "model_a"


def test_a_family_without_cases_is_an_error() -> None:
    """A misspelt family must not turn a parametrised test into nothing."""
    with pytest.raises(LookupError, match="no case of the family 'nosuch'"):
        cases("nosuch")
