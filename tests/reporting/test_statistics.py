"""Intervals and the matched comparison on simulated data with known answers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from simulated import control, truth

from dmr.reporting import statistics as S
from dmr.reporting.statistics import Point

# intervals


@pytest.mark.parametrize("n", [3, 5, 10])
def test_coverage_of_the_quoted_interval(n):
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(600):
        i = S.mean_interval(rng.normal(1.0, 2.0, n))
        assert i.method == "t" and i.values and len(i.values) == n
        hits += i.low <= 1.0 <= i.high
    assert abs(hits / 600 - 0.95) < 0.03


@pytest.mark.parametrize("n, percent", [(3, 0.75), (5, 0.84), (10, 0.90)])
def test_coverage_of_the_percentile_bootstrap_is_what_the_protocol_says(
    n, percent
):
    x = np.random.default_rng(n).normal(size=(3000, n))
    ci = stats.bootstrap(
        (x,),
        np.mean,
        axis=1,
        n_resamples=999,
        method="percentile",
        batch=100,
        random_state=np.random.default_rng(1),
    ).confidence_interval
    assert abs(np.mean((ci.low <= 0) & (0 <= ci.high)) - percent) < 0.025


def test_bootstraps_beside_are_scipys():
    x = np.random.default_rng(0).exponential(size=12)
    i = S.mean_interval(x)
    for method in ("percentile", "BCa"):
        ci = stats.bootstrap(
            (x,),
            np.mean,
            n_resamples=9999,
            method=method,
            batch=1000,
            random_state=np.random.default_rng(0),
        ).confidence_interval
        assert i.beside[method] == pytest.approx((ci.low, ci.high))
    ci = stats.ttest_1samp(x, 0.0).confidence_interval(0.95)
    assert (i.low, i.high) == pytest.approx((ci.low, ci.high)) and i.beside[
        "t"
    ] == (i.low, i.high)


def test_from_twenty_values_on_the_bootstrap_leads():
    x = np.random.default_rng(0).exponential(size=20)
    i = S.mean_interval(x)
    assert (
        i.method == "BCa"
        and (i.low, i.high) == i.beside["BCa"] != i.beside["t"]
    )
    assert S.mean_interval(x[:19]).method == "t"


def test_pairing_removes_what_the_seed_contributes():
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 10, 8)
    a, b = dict(enumerate(effect + 1)), dict(enumerate(effect))
    i = S.paired_difference(a, b)
    assert (i.low, i.high) == pytest.approx((1, 1))
    assert S.paired_p(a, b) < 1e-9 and S.paired_p(a, a) == 1.0


def test_holm_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = dict(enumerate(rng.uniform(0, 0.2, 7)))
        order = sorted(p, key=p.get)
        rejected = set()
        # step down until the first that is not rejected
        for k, name in enumerate(order):
            if p[name] >= 0.05 / (len(p) - k):
                break
            rejected.add(name)
        assert {k for k, v in S.holm(p).items() if v < 0.05} == rejected


@pytest.mark.parametrize("n", [2, 5, 10, 40])
def test_minimum_detectable_difference_is_found_four_times_in_five(n):
    d = S.minimum_detectable_difference(0.3, n)
    x = np.random.default_rng(n).normal(d, 0.3, (20_000, n))
    assert (
        abs(np.mean(stats.ttest_1samp(x, 0, axis=1).pvalue < 0.05) - 0.8)
        < 0.015
    )


# matched learning accuracy


@settings(max_examples=200, deadline=None)
@given(st.floats(1.5, 3.2))
def test_matched_forgetting_follows_the_branch_and_never_leaves_it(a):
    branch = S.control_branch({r: at[0] for r, at in control().items()})
    f, why = S.matched_forgetting(branch, a)
    if 2.1 <= a <= 2.5:
        assert why == "" and f == pytest.approx(truth(a), abs=0.01)
    else:
        assert math.isnan(f) and why == (S.SLOWER if a > 2.5 else S.FASTER)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.data())
def test_the_interpolant_is_monotone(steps, data):
    a = 2.0 + np.cumsum(steps)
    f = 1.0 - np.cumsum(
        data.draw(
            st.lists(
                st.floats(0, 0.3), min_size=len(steps), max_size=len(steps)
            )
        )
    )
    branch = S.control_branch(
        {1.0 / (k + 1): Point(x, y) for k, (x, y) in enumerate(zip(a, f))}
    )
    values = [
        S.matched_forgetting(branch, min(x, a[-1]))[0]
        for x in np.linspace(a[0], a[-1], 50)
    ]
    assert (np.diff(values) <= 1e-9).all()


@pytest.mark.parametrize(
    "curve, reason",
    [
        ({1.0: Point(2.0, 1.0), 2.0: Point(2.1, 2.0)}, "add smaller rates"),
        (
            {0.5: Point(2.2, 0.3), 1.0: Point(2.3, 0.4), 2.0: Point(2.1, 0.5)},
            "not monotone",
        ),
        ({0.5: Point(math.nan, 0.3), 1.0: Point(2.3, 0.4)}, "missing"),
        ({0.5: Point(math.nan, math.nan)}, "not measured"),
    ],
)
def test_a_control_that_cannot_serve_says_why(curve, reason):
    branch = S.control_branch(curve)
    assert (
        reason in branch.reason
        and S.matched_forgetting(branch, 2.2)[1] == branch.reason
    )


def test_a_diverged_rate_beyond_the_optimum_does_no_harm():
    with_nan = {r: at[0] for r, at in control().items()} | {
        4.0: Point(math.nan, math.nan)
    }
    assert S.control_branch(with_nan).rates.tolist() == [
        1.5,
        1.0,
        0.75,
        0.5,
        0.25,
    ]


@pytest.mark.parametrize(
    "inside, enough", [(10, True), (8, True), (7, False), (0, False)]
)
def test_four_fifths_of_the_seeds_must_be_comparable(inside, enough):
    arm = {
        s: Point((2.2 if s < inside else 2.9) + 0.01 * s, 0.3)
        for s in range(10)
    }
    m = S.match_control(arm, control())
    assert m.enough == enough and len(m.difference) == inside
    if inside < 10:
        assert f"{10 - inside} of 10 seeds: {S.SLOWER}" in m.fell_out()


def test_a_failed_seed_counts_as_not_comparable():
    arm = {s: Point(2.2 + 0.01 * s, 0.3) for s in range(7)}
    m = S.match_control(arm, control())
    assert (
        not m.enough
        and m.n == 10
        and "3 of 10 seeds: the arm's run is missing" in m.fell_out()
    )


def test_area_is_the_integral_of_the_gap():
    shifted = {
        r: {
            s: Point(p.learning_accuracy, p.forgetting * 0.5)
            for s, p in at.items()
        }
        for r, at in control(2).items()
    }
    got = S.area_between(shifted, control(2))[0]
    x = np.linspace(2.1, 2.5, 4001)
    assert (got.low, got.high) == pytest.approx((2.1, 2.5))
    assert got.area == pytest.approx(np.mean(-0.5 * truth(x)) * 0.4, abs=0.002)
    assert got.mean_gap == pytest.approx(got.area / 0.4)
