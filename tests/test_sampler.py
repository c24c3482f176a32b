"""sampler: every rule against a plain reference and transformers, and the draws themselves."""

from __future__ import annotations

import math
from itertools import accumulate
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert import rng, sampler
from edgert.errors import BadBundle, Poisoned, UsageError
from edgert.rng import uniform
from edgert.sampler import Choice, SamplingParams, adjusted, best_ids, pick, survivors


def random_logits(seed: int, size: int, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def reference(logits, params: SamplingParams, history) -> dict[int, float]:
    """Surviving tokens and their probabilities: lists, loops, sorting everything."""
    scores = [float(x) for x in logits]
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += bias
    for token in set(history[-params.repetition_window :]):
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scores = [score / params.temperature for score in scores]
    alive = list(range(len(scores)))
    if 0 < params.top_k < len(scores):
        kth = sorted(scores, reverse=True)[params.top_k - 1]
        alive = [i for i in alive if scores[i] >= kth]
    weight = {i: math.exp(scores[i] - max(scores)) for i in alive}
    if params.top_p < 1:
        total, before, nucleus = sum(weight.values()), 0.0, []
        for i in sorted(alive, key=lambda i: (-weight[i], i)):
            if before < params.top_p * total:
                nucleus.append(i)
            before += weight[i]
        alive = sorted(nucleus)
    alive = [i for i in alive if weight[i] >= params.min_p]
    total = sum(weight[i] for i in alive)
    return {i: weight[i] / total for i in alive}


def distribution(logits, params: SamplingParams, history=()) -> dict[int, float]:
    ids, weights = survivors(adjusted(logits, params, history), params)
    return dict(zip(ids.tolist(), (weights / weights.sum()).tolist(), strict=True))


def same(got: dict[int, float], wanted: dict[int, float]) -> None:
    assert list(got) == list(wanted)
    np.testing.assert_allclose(list(got.values()), list(wanted.values()), rtol=3e-5, atol=1e-9)


# Quarters are exact in float32 and give ties; the other numbers keep sums away from the edges.
quarters = st.integers(-40, 40).map(lambda n: n / 4)
filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from((0.5, 1.0, 2.0)),
        "top_k": st.integers(0, 40),
        "top_p": st.sampled_from((0.0137, 0.3171, 0.7013, 0.9071, 1.0)),
        "min_p": st.sampled_from((0.0, 0.0103, 0.1019, 0.7001, 1.0)),
        "repetition_penalty": st.sampled_from((0.5, 1.0, 2.0)),
        "repetition_window": st.integers(0, 4),
    }
)


@settings(max_examples=200)
@given(st.lists(quarters, min_size=1, max_size=32), filters, st.data())
def test_survivors_and_probabilities_equal_the_reference(logits, settings_, data):
    """Every combination of rules leaves the tokens and probabilities of the reference."""
    tokens = st.integers(0, len(logits) - 1)
    history = data.draw(st.lists(tokens, max_size=8))
    bias = data.draw(st.dictionaries(tokens, quarters, max_size=3))
    params = SamplingParams(**settings_, logit_bias=bias)
    got = distribution(np.array(logits, np.float32), params, history)
    same(got, reference(logits, params, history))


@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0], ids=["flat", "middling", "peaked"])
@pytest.mark.parametrize("top_p", [0.2, 0.95, 0.9999])
def test_large_vocabulary_equals_the_reference(spread, top_p):
    """The shortcut of top-p, taken or not, leaves what sorting everything leaves."""
    logits = random_logits(5, 6000, spread)
    params = SamplingParams(temperature=1.0, top_p=top_p)
    got, wanted = distribution(logits, params), reference(logits, params, ())
    # float32 against float64 may disagree about one token at the edge of so many
    assert len(set(got) ^ set(wanted)) <= 1
    common = sorted(set(got) & set(wanted))
    np.testing.assert_allclose([got[i] for i in common], [wanted[i] for i in common], rtol=1e-3)


def test_top_p_shortcut_changes_nothing(monkeypatch):
    """With and without looking at the head first, exactly the same tokens survive."""
    logits = random_logits(6, 6000, 2.0)
    every = [SamplingParams(temperature=1.0, top_p=p) for p in np.linspace(0.01, 0.99, 25)]
    short = [distribution(logits, params) for params in every]
    monkeypatch.setattr(sampler, "NUCLEUS_GUESS", 6000)
    assert short == [distribution(logits, params) for params in every]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7},
        {"top_k": 13},
        {"top_p": 0.8137},
        {"min_p": 0.0713},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_transformers_agrees(changes, seed):
    """The published processors and warpers, in their order, leave the same distribution."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    params = SamplingParams(**{"temperature": 1.0, **changes})
    logits, history = random_logits(seed, 200), [3, 5, 3, 199, 17]
    scores, ids = torch.from_numpy(logits.copy())[None], torch.tensor([history])
    steps = [
        process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        process.TemperatureLogitsWarper(params.temperature),
        *([process.TopKLogitsWarper(params.top_k)] if params.top_k else []),
        *([process.TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []),
        *([process.MinPLogitsWarper(params.min_p)] if params.min_p else []),
    ]
    for step in steps:
        scores = step(ids, scores)
    wanted = scores.softmax(-1)[0]
    kept = torch.isfinite(scores[0]).nonzero().flatten().tolist()
    same(distribution(logits, params, history), {i: float(wanted[i]) for i in kept})


@pytest.mark.parametrize(
    "changes",
    [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 3.0, "stream": 9}],
    ids=str,
)
def test_draws_follow_the_distribution(changes):
    """3,000 draws fit the probabilities (chi-square at p = 0.001), and nothing else is drawn."""
    params = SamplingParams(**{"temperature": 1.0, **changes})
    logits = random_logits(8, 12, 1.0)
    wanted = distribution(logits, params)
    drawn = [pick(logits, params, (), position, 77).token for position in range(3000)]
    assert set(drawn) <= set(wanted)
    counts = np.array([drawn.count(token) for token in wanted])
    expected = 3000 * np.array(list(wanted.values()))
    critical = [0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26]
    assert ((counts - expected) ** 2 / expected).sum() < critical[len(wanted) - 1]


@pytest.mark.parametrize("position", range(12))
def test_draw_is_inverse_cdf_in_order_of_ids(position):
    """The token is the first whose cumulated probability exceeds the uniform number."""
    params = SamplingParams(temperature=0.9, top_k=20, stream=4)
    logits = random_logits(9, 50)
    wanted = reference(logits, params, ())
    target = uniform(21, position, 4)
    below = [total <= target for total in accumulate(wanted.values())]
    assert pick(logits, params, (), position, 21).token == list(wanted)[sum(below)]


def test_ties_of_the_argmax_go_to_the_lowest_id():
    """Greedy takes the first of equals, as the argmax inside a graph does."""
    logits = np.array([1, 7, 7, 2], np.float32)
    assert pick(logits, SamplingParams(), (), 0, 0) == Choice(1)


def test_ties_at_the_kth_are_kept():
    """top_k=2 keeps three tokens when the second and third are equal."""
    logits = np.array([3, 2, 2, 1], np.float32)
    assert list(distribution(logits, SamplingParams(temperature=1, top_k=2))) == [0, 1, 2]


def test_ties_at_the_edge_of_the_nucleus_keep_the_lowest_ids():
    """Of four equals, half of the probability is the first two."""
    logits = np.zeros(4, np.float32)
    assert list(distribution(logits, SamplingParams(temperature=1, top_p=0.5))) == [0, 1]


def test_smallest_top_p_keeps_the_best_token():
    """At least one token survives every filter."""
    params = SamplingParams(temperature=1, top_p=1e-12, min_p=1.0, top_k=1)
    assert distribution(random_logits(2, 64), params) == {int(random_logits(2, 64).argmax()): 1.0}


def test_coldest_temperature_is_greedy():
    """Differences that overflow float32 become probability 0, without a warning."""
    logits = np.array([-3e38, 1.0, 3e38], np.float32)
    params = SamplingParams(temperature=1e-4)
    assert [pick(logits, params, (), p, 1).token for p in range(8)] == [2] * 8


def test_banned_tokens_are_never_drawn():
    """-inf in the logits is probability 0."""
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)
    drawn = {pick(logits, SamplingParams(temperature=5), (), p, 1).token for p in range(64)}
    assert drawn == {1, 3}


def test_smallest_draw_is_not_a_banned_token(monkeypatch):
    """A uniform number of exactly 0 falls to the first token that has a probability."""
    monkeypatch.setattr(rng, "uniform", lambda *_: 0.0)
    logits = np.array([-np.inf, 0, 0], np.float32)
    assert pick(logits, SamplingParams(temperature=1), (), 0, 0).token == 1


def test_bias_comes_before_penalty():
    """A bias that makes a logit positive makes the penalty divide it."""
    params = SamplingParams(logit_bias={1: 4.0}, repetition_penalty=2.0)
    got = adjusted(np.array([-2, -2, 6], np.float32), params, [0, 1, 1, 0])
    assert got.tolist() == [-4.0, 1.0, 6.0]


@pytest.mark.parametrize(
    ("window", "expected"), [(0, [1.0, 1.0, 2.0]), (1, [2.0, 1.0, 2.0]), (9, [1.0, 1.0, 2.0])]
)
@pytest.mark.parametrize("kind", [list, np.array])
def test_repetition_window(window, expected, kind):
    """Only the last tokens count; 0 is the whole history; lists and arrays are alike."""
    params = SamplingParams(repetition_penalty=2.0, repetition_window=window)
    assert adjusted(np.full(3, 2, np.float32), params, kind([0, 1])).tolist() == expected


def test_logits_are_not_changed():
    """Bias, penalty and every filter work on copies."""
    logits = random_logits(3, 64)
    logits.flags.writeable = False
    params = SamplingParams(
        temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
        logit_bias={3: 1.0}, logprobs=4,
    )  # fmt: skip
    before = logits.copy()
    pick(logits, params, [1, 2, 3], 0, 0)
    assert (logits == before).all()


@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_logprobs_are_of_the_model_before_temperature(temperature):
    """They equal the log-softmax after bias and penalty, whatever the temperature."""
    logits = random_logits(4, 40)
    params = SamplingParams(
        temperature=temperature, logprobs=5, logit_bias={7: 3.0}, repetition_penalty=1.5
    )
    scores = adjusted(logits, params, [2]).astype(np.float64)
    wanted = scores - np.log(np.exp(scores).sum())
    got = pick(logits, params, [2], 0, 0)
    best = sorted(range(40), key=lambda i: -scores[i])[:5]
    assert got.logprob == pytest.approx(wanted[got.token], abs=2e-6)
    assert [token for token, _ in got.alternatives] == best
    assert [value for _, value in got.alternatives] == pytest.approx(wanted[best], abs=2e-6)


def test_logprobs_zero_gives_the_chosen_one_alone():
    """0 alternatives is not the same as no log-probability."""
    got = pick(np.zeros(4, np.float32), SamplingParams(logprobs=0), (), 0, 0)
    assert got == Choice(0, pytest.approx(-math.log(4)), ())


def test_alternatives_of_probability_zero_are_left_out():
    """No -inf is reported, and asking for more than V gives V."""
    logits = np.array([-np.inf, 1, 1], np.float32)
    got = pick(logits, SamplingParams(logprobs=50), (), 0, 0)
    assert [token for token, _ in got.alternatives] == [1, 2]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 25))
def test_best_ids_breaks_ties_by_id(values, count):
    """The order is that of a stable descending sort."""
    wanted = sorted(range(len(values)), key=lambda i: -values[i])[:count]
    assert best_ids(np.array(values, np.float32), count).tolist() == wanted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "row", [[1, np.nan, 2], [-np.inf] * 3, [1, np.inf, 2]], ids=["nan", "all -inf", "+inf"]
)
def test_poisoned_logits_are_refused(row, temperature):
    """A step without a finite maximum raises, naming the position."""
    with pytest.raises(Poisoned, match="logits at position 41 have no finite maximum") as caught:
        pick(np.array(row, np.float32), SamplingParams(temperature=temperature), (), 41, 0)
    assert "parity report" in str(caught.value)


@pytest.mark.parametrize("shape", [(0,), (1, 4)])
def test_wrong_shape_is_refused(shape):
    """One row, not a batch."""
    with pytest.raises(UsageError, match="one row"):
        pick(np.zeros(shape, np.float32), SamplingParams(), (), 0, 0)


@pytest.mark.parametrize(
    ("changes", "history", "message"),
    [
        ({"logit_bias": {4: 1.0}}, [], "logit_bias names token 4, the model has tokens 0 to 3"),
        ({"repetition_penalty": 2.0}, [1, 9], "the history names token 9"),
        ({"repetition_penalty": 2.0}, [-1], "the history names token -1"),
    ],
)
def test_unknown_tokens_are_refused(changes, history, message):
    """Ids outside the vocabulary are an error, not a wrapped index."""
    with pytest.raises(UsageError, match=message):
        pick(np.zeros(4, np.float32), SamplingParams(**changes), history, 0, 0)


@pytest.mark.parametrize(
    ("name", "value", "permitted"),
    [
        ("max_tokens", 0, "an integer from 1"),
        ("max_tokens", True, "an integer from 1"),
        ("max_tokens", 2.0, "an integer from 1"),
        ("max_tokens", None, "an integer from 1"),
        ("temperature", -0.1, "a number from 0 to 100"),
        ("temperature", 1e-5, "0 (greedy), or a number from 0.0001 to 100"),
        ("temperature", math.nan, "a number from 0 to 100"),
        ("temperature", math.inf, "a number from 0 to 100"),
        ("temperature", "1", "a number from 0 to 100"),
        ("temperature", False, "a number from 0 to 100"),
        ("top_k", -1, "an integer from 0"),
        ("top_p", 0, "a number above 0, up to 1"),
        ("top_p", 1.01, "a number from 0 to 1"),
        ("min_p", -0.5, "a number from 0 to 1"),
        ("repetition_penalty", 0.0, "a number from 0.01 to 100"),
        ("repetition_window", -2, "an integer from 0"),
        ("logprobs", 1001, "an integer from 0 to 1000"),
        ("seed", -1, "an integer from 0 to 18446744073709551615"),
        ("stream", 2**64, "an integer from 0 to 18446744073709551615"),
        ("deadline_ms", 0, "a number above 0"),
        ("deadline_ms", math.nan, "a number from 0"),
        ("ignore_eos", 1, "true or false"),
        *(
            ("speculate", value, "'auto', 'off', or an integer from 1 to 16")
            for value in (0, 17, True, 2.0, "", "on", "-1", "9" * 5000, "٣", ["auto"], None)
        ),
        ("logit_bias", [1], "a mapping of token ids to numbers"),
        ("stop", 3, "a list of at most 64 entries"),
        ("stop", ["x"] * 65, "a list of at most 64 entries"),
        ("stop", [""], "texts of 1 to 1024 characters"),
        ("stop", ["x" * 1025], "texts of 1 to 1024 characters"),
        ("stop", [3], "texts of 1 to 1024 characters"),
        ("stop_tokens", [-1], "an integer from 0"),
        ("stop_tokens", 5, "a list of at most 64 entries"),
    ],
)
def test_values_out_of_range_are_refused(name, value, permitted):
    """The message has the field, the value and what is permitted."""
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.what.startswith(f"{name} = ")
    assert f"use {permitted}" in caught.value.do


@pytest.mark.parametrize("value", ["auto", "off", 1, 16])
def test_guesses_are_a_word_or_a_number(value):
    """Which may be written in digits, as a command line has it."""
    assert SamplingParams(speculate=value).speculate == value
    assert SamplingParams(speculate=str(value)).speculate == value


@pytest.mark.parametrize(
    ("bias", "named"),
    [({-1: 0.0}, "logit_bias, token = -1"), ({5: math.inf}, r"logit_bias\[5\] = inf")],
)
def test_bias_entries_are_checked(bias, named):
    """Each entry is checked, and named."""
    with pytest.raises(UsageError, match=named):
        SamplingParams(logit_bias=bias)


def test_values_get_their_canonical_types():
    """Integers become floats where floats are meant; one stop string is a list of one."""
    params = SamplingParams(
        temperature=1,
        top_k=np.int64(4),
        top_p=np.float32(0.5),
        stop="END",
        stop_tokens=[np.int32(7)],
        logit_bias=MappingProxyType({np.int64(3): 1}),
    )
    assert type(params.temperature) is float
    assert type(params.top_k) is int
    assert type(params.top_p) is float
    assert params.stop == ("END",)
    assert params.stop_tokens == (7,)
    assert params.logit_bias == {3: 1.0}


def test_replace_suggests_the_name():
    """A misspelt setting is answered with the nearest one."""
    with pytest.raises(UsageError, match="no sampling setting 'temprature'") as caught:
        SamplingParams().replace(temprature=1)
    assert caught.value.do == "did you mean 'temperature'?"


def test_replace_lists_the_names_if_none_is_near():
    """What is like no setting gets the list of all."""
    with pytest.raises(UsageError, match="the settings are: max_tokens, temperature"):
        SamplingParams().replace(zzz=1)


def test_replace_checks_values():
    """A copy is validated like the original."""
    assert SamplingParams().replace(top_k=5) == SamplingParams(top_k=5)
    with pytest.raises(UsageError, match="top_k = -5"):
        SamplingParams().replace(top_k=-5)


def test_overrides_win_over_defaults():
    """What the user gave counts, None is what was not given, the rest is the bundle's."""
    defaults = {"temperature": 0.6, "top_p": 0.9, "logit_bias": {"12": -1}}
    got = SamplingParams.from_mapping(defaults, {"temperature": 0, "top_p": None, "stop": "x"})
    assert got == SamplingParams(top_p=0.9, logit_bias={12: -1.0}, stop=("x",))


@pytest.mark.parametrize(("defaults", "overrides"), [({"top_k": -1}, {}), ({"topk": 1}, {})])
def test_faults_in_the_defaults_are_the_bundles(defaults, overrides):
    """They are a broken file, not a wrong argument."""
    with pytest.raises(BadBundle, match="the sampling defaults of the bundle"):
        SamplingParams.from_mapping(defaults, overrides)


@pytest.mark.parametrize("overrides", [{"top_k": -1}, {"topk": 1}, {"logit_bias": {"x": 1}}])
def test_faults_in_the_overrides_are_the_users(overrides):
    """They are a wrong argument."""
    with pytest.raises(UsageError):
        SamplingParams.from_mapping({}, overrides)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"top_k": 5, "top_p": 0.5, "stop": "x", "seed": 1}, False),
        ({"temperature": 1.0}, True),
        ({"logit_bias": {1: 1.0}}, True),
        ({"logit_bias": {}}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"logprobs": 0}, True),
    ],
)
def test_when_logits_are_needed(changes, needed):
    """Only plain greedy decoding makes do with the argmax inside the graph."""
    params = SamplingParams(**changes)
    assert params.needs_logits is needed
    assert params.greedy is (params.temperature == 0)
